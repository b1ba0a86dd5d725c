"""Objectives as modules, for any trainer: a formula in the docstring, a few lines that call ``fasttrain.kernels``.

They need torch, triton and numpy only. ``NTXentLoss``, ``DINOLoss``, ``SwaVLoss``, ``NegativeCosineSimilarity``,
``MemoryBankModule`` and ``iBOTPatchLoss`` (there ``IBOTPatchLoss``) replace lightly's classes: only the import changes.
``compat`` has the interfaces of other projects. Contrastive losses accept projections of any norm; every loss returns
nats.
"""

from .byol import BYOLLoss
from .cmc import CMCLoss, CMCMemoryLoss
from .dino import DINOLoss
from .entropy_reconstruction import Bound, EntropyReconstructionLoss
from .ibot import iBOTPatchLoss
from .info_nce import InfoNCELoss
from .instance_bank import InstanceBank
from .koleo import KoLeoLoss
from .memory_bank import MemoryBankModule
from .moco import MoCoLoss, MoCoV3Loss
from .negative_cosine import NegativeCosineSimilarity
from .nt_xent import NTXentLoss
from .simsiam import SimSiamLoss
from .swav import SwaVLoss

__all__ = [
    "BYOLLoss",
    "Bound",
    "CMCLoss",
    "CMCMemoryLoss",
    "DINOLoss",
    "EntropyReconstructionLoss",
    "InfoNCELoss",
    "InstanceBank",
    "KoLeoLoss",
    "MemoryBankModule",
    "MoCoLoss",
    "MoCoV3Loss",
    "NTXentLoss",
    "NegativeCosineSimilarity",
    "SimSiamLoss",
    "SwaVLoss",
    "iBOTPatchLoss",
]
