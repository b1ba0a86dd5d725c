"""Benchmarks of ranks, machines and ZeRO stages, and of the plan's predictions."""
