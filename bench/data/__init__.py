"""Benchmarks of reading, decoding and augmenting images."""
