"""Features at rest: layout, data types, writing, reading, and the cache of a run."""
