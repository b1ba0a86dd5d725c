"""The tokens of a ViT: [CLS] and registers, patches, and masked patches (for iBOT, DINOv2 and the like)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..pipelines.views.recipe import Size, sides


class Tokens(NamedTuple):
    """The output of a ViT after its last norm, for images [B, C, H, W] of N patches."""

    features: Tensor
    """The features [B, D] that the network returns by itself: [CLS], or the pooled patches."""
    prefix: Tensor
    """[CLS] and the registers [B, P, D]; P is 0 for a network without."""
    patches: Tensor
    """The patches [B, N, D], row by row."""


class MaskToken(nn.Module):
    """The learnt embedding that replaces a hidden patch. It belongs to the method, not to the exported network.

    It starts at 0, and as a matrix [1, D] it has weight decay, as in the code of iBOT and DINOv2.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dim))

    def forward(self, patches: Tensor, mask: Tensor) -> Tensor:
        """Replace the embeddings of masked patches, [B, N, D] or, where timm keeps the grid, [B, H, W, D].

        ``mask`` [B, N] bool is True for hidden patches. Raise ValueError for a mask of another shape.
        """
        if mask.shape[0] != patches.shape[0] or mask[0].numel() != patches[0, ..., 0].numel():
            raise ValueError(f"mask: must be [B, N] for patches {tuple(patches.shape)}, got {tuple(mask.shape)}")
        hidden = mask.view(patches.shape[:-1])[..., None]
        return torch.where(hidden, self.weight.to(patches.dtype), patches)


def tokens_of(
    backbone: nn.Module, images: Tensor, *, mask: Tensor | None = None, mask_token: MaskToken | None = None
) -> Tokens:
    """Return the tokens of images [B, C, H, W] from any ViT of timm that :func:`check_tokens` accepts.

    With a ``mask_token``, it replaces the patches for which ``mask`` [B, N] is True. The network is called as a module,
    so that ZeRO-3 gathers its parameters, and stays as it is.
    """
    vit: Any = backbone
    outputs: list[Tensor] = []
    hooks = [vit.norm.register_forward_hook(lambda *call: outputs.append(call[2]))]
    if mask_token is not None:
        hooks.append(vit.patch_embed.register_forward_hook(lambda *call: mask_token(call[2], mask)))
    try:
        features = vit(images)
    finally:
        for hook in hooks:
            hook.remove()
    tokens, prefix = outputs[-1], vit.num_prefix_tokens
    return Tokens(features, tokens[:, :prefix], tokens[:, prefix:])


def check_tokens(backbone: nn.Module) -> None:
    """Raise ValueError, which names the flag, for a network without patch tokens after a last norm."""
    has_patches = hasattr(getattr(backbone, "patch_embed", None), "dynamic_feat_size")
    has_norm = isinstance(getattr(backbone, "norm", None), nn.Module)
    if not (has_patches and has_norm and isinstance(getattr(backbone, "num_prefix_tokens", None), int)):
        raise ValueError(f"--arch: must be a ViT with patch tokens, got {type(backbone).__name__}. Use vit_small.")


def patch_grid(backbone: nn.Module, size: Size) -> tuple[int, int]:
    """Return the rows and columns of patches of an image."""
    vit: Any = backbone
    rows, columns = vit.patch_embed.dynamic_feat_size(sides(size))
    return int(rows), int(columns)


def patch_width(backbone: nn.Module) -> int:
    """Return the dimension of the patch embeddings, which some networks widen afterwards."""
    vit: Any = backbone
    return int(getattr(vit, "embed_dim", vit.num_features))
