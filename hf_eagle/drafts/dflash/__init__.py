"""The DFlash draft: behind the newest token stand masked slots, and one forward fills all of them at once."""
