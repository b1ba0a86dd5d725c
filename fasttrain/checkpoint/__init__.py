"""Checkpoints: what one holds, how it is written, chosen and read."""
