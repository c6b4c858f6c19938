"""Features on disk: layout, data types, writing, reading, and the cache of a run."""
