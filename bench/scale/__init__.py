"""Ranks, machines, ZeRO stages, and the plan's predictions."""
