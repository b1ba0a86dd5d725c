"""The interfaces of other projects than lightly, over the same kernels: change the import and nothing else.

- ``fasttrain.losses.compat.dino.DINOLoss``: facebookresearch/dino, ``main_dino.DINOLoss``
- ``fasttrain.losses.compat.info_nce.InfoNCE``: info-nce-pytorch, ``info_nce.InfoNCE``
- ``fasttrain.losses.compat.open_clip.ClipLoss``: open_clip, ``open_clip.loss.ClipLoss``
"""
