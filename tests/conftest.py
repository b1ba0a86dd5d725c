"""Threads are set before torch is imported, as the command does it; DeepSpeed stays quiet."""

from fasttrain.distributed import prepare_environment

prepare_environment()
