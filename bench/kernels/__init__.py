"""Benchmarks of the kernels: speed, compiled resources, and parity with other projects."""
