"""Checkpoints: their cards, how they are written, chosen and restored, and the one reader of their tensors."""
