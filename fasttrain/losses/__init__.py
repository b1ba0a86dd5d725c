"""Objectives as modules, for any trainer: a formula in the docstring, a few lines that call ``fasttrain.kernels``.

Needs torch, triton and numpy only. ``NTXentLoss``, ``NegativeCosineSimilarity`` and ``MemoryBankModule`` take the place
of lightly's: change the import and nothing else. Every loss takes projections of any norm and returns nats.
"""

from .cmc import CMCLoss, CMCMemoryLoss
from .entropy_reconstruction import Bound, EntropyReconstructionLoss
from .info_nce import InfoNCELoss
from .instance_bank import InstanceBank
from .memory_bank import MemoryBankModule
from .moco import MoCoLoss, MoCoV3Loss
from .negative_cosine import NegativeCosineSimilarity
from .nt_xent import NTXentLoss

__all__ = [
    "Bound",
    "CMCLoss",
    "CMCMemoryLoss",
    "EntropyReconstructionLoss",
    "InfoNCELoss",
    "InstanceBank",
    "MemoryBankModule",
    "MoCoLoss",
    "MoCoV3Loss",
    "NTXentLoss",
    "NegativeCosineSimilarity",
]
