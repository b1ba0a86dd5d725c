"""Threads are set before torch is imported, as the command does it; DeepSpeed stays quiet.

Without a GPU the Triton kernels are interpreted, which Triton decides when it reads them.
"""

import os

from fasttrain.distributed import has_nvidia_device, prepare_environment

prepare_environment()
if not has_nvidia_device():
    os.environ["TRITON_INTERPRET"] = "1"
