"""The views of an image: their recipe, and the parameters drawn for each."""
