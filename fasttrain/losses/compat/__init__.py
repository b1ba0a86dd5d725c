"""Interfaces of other projects over the same kernels: only the import changes.

- ``fasttrain.losses.compat.dino.DINOLoss``: facebookresearch/dino, ``main_dino.DINOLoss``
- ``fasttrain.losses.compat.dinov2``: facebookresearch/dinov2, ``DINOLoss``, ``iBOTPatchLoss`` and ``KoLeoLoss``
- ``fasttrain.losses.compat.dinov3``: facebookresearch/dinov3, the same and ``GramLoss``
- ``fasttrain.losses.compat.info_nce.InfoNCE``: info-nce-pytorch, ``info_nce.InfoNCE``
- ``fasttrain.losses.compat.open_clip.ClipLoss``: open_clip, ``open_clip.loss.ClipLoss``
- ``fasttrain.losses.compat.open_clip.SigLipLoss``: open_clip, ``open_clip.loss.SigLipLoss``
"""
