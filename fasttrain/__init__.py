"""High-throughput multi-view self-supervised learning through the entropy-reconstruction bound.

:func:`train` runs a training from Python; ``fasttrain.losses`` are the objectives for other trainers, and
``fasttrain.kernels`` their fused reductions.
"""

from .api import Result, train
from .errors import Collapsed, ConfigError, Crashed, DataError, Diverged, Interrupted, SaveError

__version__ = "0.1.0"
__all__ = [
    "Collapsed",
    "ConfigError",
    "Crashed",
    "DataError",
    "Diverged",
    "Interrupted",
    "Result",
    "SaveError",
    "__version__",
    "train",
]
