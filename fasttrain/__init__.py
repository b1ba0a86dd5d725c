"""fasttrain: multi-view self-supervised learning through the entropy-reconstruction bound.

``fasttrain.losses`` and ``fasttrain.kernels`` need only torch, triton and numpy; the trainer, ``fasttrain[train]``.
"""

from .api import Result, train

__all__ = ["Result", "__version__", "train"]

__version__ = "0.1.0"
