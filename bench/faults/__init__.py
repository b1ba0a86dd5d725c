"""The fault campaign: what a run survives."""
