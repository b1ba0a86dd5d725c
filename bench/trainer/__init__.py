"""Whole training steps, paired with another trainer."""
