"""Reductions for multi-view self-supervised learning: similarity log-sum-exp, entropies, prototypes, Sinkhorn.

This package knows tensors only. It imports neither ``fasttrain`` nor ``fasttrain.pipelines``. Every entropy is in nats.
``group`` is the process group of a reduction across ranks. None means that this process has the whole batch. All ranks
must have batches of one shape and type. Otherwise every rank raises ValueError. ``check_batches=False`` skips this
check and its exchange between the ranks, for callers that know it. :func:`sinkhorn` needs no equal batches.
"""

if __name__ == "kernels":
    # A clone's root is on Python's path, and a library, such as transformers, looks for PyPI's package "kernels".
    # Imported under that name too, this package would register its operators twice.
    raise ModuleNotFoundError(
        "No module named 'kernels': found fasttrain's instead; start Python in another folder than fasttrain's root",
        name="kernels",
    )

from .characteristic.sliced import sliced_characteristic
from .coding_rate import coding_rate
from .contrastive import info_nce, nt_xent
from .covariance.norms import covariance_norms
from .entropy import gaussian_entropy, vmf_entropy, vmf_reconstruction
from .gram import gram_error
from .nearest.similarity import nearest_similarity
from .prototypes.objective import (
    patch_cross_entropy,
    prototype_cross_entropy,
    prototype_entropy,
    prototype_terms,
)
from .sigmoid.siglip import siglip
from .similarity.logsumexp import bidirectional_logsumexp, row_logsumexp
from .sinkhorn.chunks import prototype_sinkhorn_center
from .sinkhorn.potentials import sinkhorn, sinkhorn_center
from .vmf import log_sphere_area, log_vmf_normalizer, reference_log_vmf_normalizer

__all__ = [
    "bidirectional_logsumexp",
    "coding_rate",
    "covariance_norms",
    "gaussian_entropy",
    "gram_error",
    "info_nce",
    "log_sphere_area",
    "log_vmf_normalizer",
    "nearest_similarity",
    "nt_xent",
    "patch_cross_entropy",
    "prototype_cross_entropy",
    "prototype_entropy",
    "prototype_sinkhorn_center",
    "prototype_terms",
    "reference_log_vmf_normalizer",
    "row_logsumexp",
    "siglip",
    "sinkhorn",
    "sinkhorn_center",
    "sliced_characteristic",
    "vmf_entropy",
    "vmf_reconstruction",
]
