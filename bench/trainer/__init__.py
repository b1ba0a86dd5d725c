"""Compare whole training steps with another trainer."""
