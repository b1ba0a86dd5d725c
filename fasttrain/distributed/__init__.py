"""Ranks: how they start, exchange values, stop together and fail together."""
