"""The DFlash draft: masked slots follow the newest token, and one forward fills all of them."""
