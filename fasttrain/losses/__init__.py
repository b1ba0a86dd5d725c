"""Objectives as modules, for any trainer: a formula in the docstring, a few lines that call ``fasttrain.kernels``.

They need torch, triton and numpy only. ``NTXentLoss``, ``DINOLoss``, ``SwaVLoss``, ``NegativeCosineSimilarity``,
``MemoryBankModule`` and ``iBOTPatchLoss`` (there ``IBOTPatchLoss``) replace lightly's classes: only the import changes.
``compat`` has the interfaces of other projects. Contrastive losses accept projections of any norm; every loss returns
nats.
"""

from .barlow_twins import BarlowTerms, BarlowTwinsLoss
from .byol import BYOLLoss
from .cmc import CMCLoss, CMCMemoryLoss
from .dino import DINOLoss
from .entropy_reconstruction import Bound, EntropyReconstructionLoss
from .gram import GramLoss
from .ibot import iBOTPatchLoss
from .info_nce import InfoNCELoss
from .instance_bank import InstanceBank
from .koleo import KoLeoLoss
from .memory_bank import MemoryBankModule
from .moco import MoCoLoss, MoCoV3Loss
from .negative_cosine import NegativeCosineSimilarity
from .nt_xent import NTXentLoss
from .siglip import SigLIPLoss
from .sigreg import SIGRegLoss
from .simdino import SimDINOLoss
from .simsiam import SimSiamLoss
from .swav import SwaVLoss
from .vicreg import VICRegLoss, VICRegTerms

__all__ = [
    "BYOLLoss",
    "BarlowTerms",
    "BarlowTwinsLoss",
    "Bound",
    "CMCLoss",
    "CMCMemoryLoss",
    "DINOLoss",
    "EntropyReconstructionLoss",
    "GramLoss",
    "InfoNCELoss",
    "InstanceBank",
    "KoLeoLoss",
    "MemoryBankModule",
    "MoCoLoss",
    "MoCoV3Loss",
    "NTXentLoss",
    "NegativeCosineSimilarity",
    "SIGRegLoss",
    "SigLIPLoss",
    "SimDINOLoss",
    "SimSiamLoss",
    "SwaVLoss",
    "VICRegLoss",
    "VICRegTerms",
    "iBOTPatchLoss",
]
