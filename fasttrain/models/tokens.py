"""The tokens of a ViT: [CLS] and registers, patches, and masked patches (for iBOT, DINOv2 and the like)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Tokens(NamedTuple):
    """The output of a ViT after its last norm, for images [B, C, H, W] of N patches."""

    features: Tensor
    """The pooled features [B, D] that the network returns by itself."""
    prefix: Tensor
    """[CLS] and the registers [B, P, D]; P is 0 for a network without."""
    patches: Tensor
    """The patches [B, N, D], row by row."""

    @property
    def cls(self) -> Tensor:
        """The [CLS] token [B, D]. Raise ValueError for a network without one."""
        if not self.prefix.shape[1]:
            raise ValueError("arch: the network has no [CLS] token")
        return self.prefix[:, 0]


class TokenBackbone(nn.Module):
    """Runs any ViT of timm and returns all its tokens; masked patches are replaced by a learnt mask token.

    The network is called as a module, so that ZeRO-3 gathers its parameters. Its own output is unchanged: it can be
    evaluated and exported as before. Raise ValueError for a network without ``patch_embed`` and a last ``norm``.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        if not (hasattr(backbone, "patch_embed") and isinstance(getattr(backbone, "norm", None), nn.Module)):
            raise ValueError(f"arch: must be a ViT with patches and a last norm, got {type(backbone).__name__}")
        self.backbone: Any = backbone
        self.prefix_tokens = int(getattr(backbone, "num_prefix_tokens", 0))
        self.mask_token = nn.Parameter(torch.zeros(int(backbone.num_features)))  # type: ignore[arg-type]
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tokens:
        """Return the tokens of images [B, C, H, W]. ``mask`` [B, N] bool is True for patches that are hidden.

        Raise ValueError for a mask of another shape.
        """
        outputs: list[Tensor] = []
        hooks = [self.backbone.norm.register_forward_hook(lambda *call: outputs.append(call[2]))]
        if mask is not None:
            hooks.append(self.backbone.patch_embed.register_forward_hook(lambda *call: self._hide(call[2], mask)))
        try:
            features = self.backbone(images)
        finally:
            for hook in hooks:
                hook.remove()
        tokens = outputs[-1]
        return Tokens(features, tokens[:, : self.prefix_tokens], tokens[:, self.prefix_tokens :])

    def _hide(self, patches: Tensor, mask: Tensor) -> Tensor:
        """Replace the embeddings of masked patches, [B, N, D] or, where timm keeps the grid, [B, H, W, D]."""
        if mask.shape[0] != patches.shape[0] or mask[0].numel() != patches[0, ..., 0].numel():
            raise ValueError(f"mask: must be [B, N] for patches {tuple(patches.shape)}, got {tuple(mask.shape)}")
        hidden = mask.view(patches.shape[:-1])[..., None]
        return torch.where(hidden, self.mask_token.to(patches.dtype), patches)
