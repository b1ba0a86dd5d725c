"""The views of an image: their recipe, and their random parameters."""
