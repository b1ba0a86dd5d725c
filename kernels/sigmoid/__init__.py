"""The sigmoid loss of all pairs of two sets of rows."""
