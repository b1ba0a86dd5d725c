"""Balanced assignments by Sinkhorn-Knopp."""
