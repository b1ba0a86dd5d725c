"""Benchmarks and campaigns: one folder per subject, one command per result."""
