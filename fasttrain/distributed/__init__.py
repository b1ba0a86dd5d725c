"""Ranks: how they start, agree, stop and fail together."""
