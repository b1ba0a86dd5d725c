"""Gram anchoring (DINOv3, arXiv 2508.10104, section 4): keep the similarities of patches of an earlier teacher."""

from __future__ import annotations

from torch import Tensor, nn

from ..kernels.gram import gram_error
from ..kernels.normalize import normalize_rows
from ..kernels.precision import at_least_single


class GramLoss(nn.Module):
    """Mean squared difference of the cosines between the patches, of the student and of the target.

        loss = mean over i, j of (f(cos(x_i, x_j)) - f(cos(t_i, t_j)))^2        (equation 2, divided by their number)

    The patches i and j are of one image with ``img_level``, else of the whole batch. f sets negative cosines to 0 with
    ``remove_neg``. With ``remove_only_teacher_neg`` it does so for the target, and for the student where both are
    negative. Without ``apply_norm`` products replace cosines. The target gets no gradient. No matrix is stored.

    Replaces facebookresearch/dinov3's class of this name, with its arguments. Raise ValueError for both kinds of
    removal at once.
    """

    def __init__(
        self,
        apply_norm: bool = True,
        img_level: bool = True,
        remove_neg: bool = True,
        remove_only_teacher_neg: bool = False,
    ) -> None:
        super().__init__()
        if remove_neg and remove_only_teacher_neg:
            raise ValueError("remove_neg and remove_only_teacher_neg: give one of them")
        self.apply_norm, self.img_level = apply_norm, img_level
        self.remove_neg, self.remove_only_teacher_neg = remove_neg, remove_only_teacher_neg

    def forward(self, output_feats: Tensor, target_feats: Tensor, img_level: bool | None = None) -> Tensor:
        """Return the loss of patches [B, N, D] of the student and [B, N, E] of the target; a scalar.

        ``img_level`` overrides the constructor's. Without it the patches may also be [B N, D]. Raise ValueError for
        shapes that do not fit.
        """
        per_image = self.img_level if img_level is None else img_level
        if output_feats.ndim != 3 and (per_image or output_feats.ndim != 2):
            raise ValueError(f"output_feats must be patches [B, N, D], got {tuple(output_feats.shape)}")
        x, target = (at_least_single(features) for features in (output_feats, target_feats.detach()))
        if self.apply_norm:
            x, target = normalize_rows(x), normalize_rows(target)
        if not per_image:
            x, target = (features.flatten(0, -2)[None] for features in (x, target))
        if self.remove_neg:
            return gram_error(x, target, negatives="zero")
        return gram_error(x, target, negatives="zero_with_target" if self.remove_only_teacher_neg else "keep")
