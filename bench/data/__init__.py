"""Reading, decoding and augmenting."""
