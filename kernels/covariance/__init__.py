"""Norms of covariance matrices, from whichever side is smaller."""
