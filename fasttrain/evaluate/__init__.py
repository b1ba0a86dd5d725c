"""How good the features are: nearest neighbours and the spectrum."""
