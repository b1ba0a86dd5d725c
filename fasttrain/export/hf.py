"""Export as a Hugging Face folder: ``transformers.ViTModel`` for plain ViTs, timm's wrapper for all other networks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save_file
from timm.models import VisionTransformer
from torch import Tensor

from ..models.weights import save_tensors
from ..pipelines import Size, evaluation_view, sides
from ..pretrained import Backbone, Blueprint, timm_arguments
from .check import check_same
from .vit import plain_vit

_NAMES = (
    (r"^(cls_token)$", r"embeddings.\1"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)


def write_hf(backbone: Backbone, path: Path) -> str:
    """Write config.json and model.safetensors into the folder ``path``; return the line that loads them.

    A plain ViT gets ViTModel's names. Its features are ``last_hidden_state[:, 0]``, and they are checked if
    transformers is installed. Other networks keep timm's names, for ``timm.create_model("local-dir:PATH")`` and
    transformers' TimmWrapperModel. Raise ConfigError for a network that neither library has.
    """
    path.mkdir()
    vit = plain_vit(backbone.network)
    if vit is None:
        return _write_timm(backbone, path)
    b = backbone.blueprint
    save_file(vit_model_tensors(vit), path / "model.safetensors", metadata={"format": "pt"})
    _write_json(path / "config.json", vit_model_config(vit, b.size, b.encoders[0]))
    (path / "README.md").write_text(model_card(backbone))
    if b.pixels.color_space == "rgb" and isinstance(b.size, int):
        _write_json(path / "preprocessor_config.json", vit_processor_config(b))
    line = f"transformers.ViTModel.from_pretrained({path.name!r}, add_pooling_layer=False)"
    try:
        from transformers import ViTModel
    except ImportError:  # not installed, or Python runs in this repository's root, where it imports the folder kernels
        return f"{line}  (not checked: transformers cannot be imported)"
    loaded = ViTModel.from_pretrained(path, add_pooling_layer=False).eval()
    check_same(backbone, lambda images: loaded(images).last_hidden_state[:, 0], "transformers.ViTModel")
    return line


def vit_model_tensors(vit: VisionTransformer) -> dict[str, Tensor]:
    """Return the weights with ``transformers.ViTModel``'s names. Queries, keys and values are separate there."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in vit.state_dict().items():
        if ".attn.qkv." in name:
            base, _, kind = name.partition(".attn.qkv.")
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                tensors[f"{_renamed(base + '.')}attention.attention.{part}.{kind}"] = rows.clone()
        else:
            tensors[_renamed(name)] = tensor.clone()
    return tensors


def vit_model_config(vit: VisionTransformer, size: Size, channels: int) -> dict[str, Any]:
    """Return the content of config.json for ``transformers.ViTModel``."""
    block = vit.blocks[0]
    return {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": vit.embed_dim,
        "num_hidden_layers": len(vit.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": vit.norm.eps,
        "image_size": size if isinstance(size, int) else list(size),
        "patch_size": vit.patch_embed.patch_size[0],
        "num_channels": channels,
        "qkv_bias": True,
    }


def vit_processor_config(blueprint: Blueprint) -> dict[str, Any]:
    """Return the content of preprocessor_config.json for the evaluation's view.

    ViT's own processor changes the aspect ratio, so this is a processor that crops. It resizes first and then crops
    whole pixels, so its view can differ by half a pixel from ours.
    """
    b = blueprint
    whole = evaluation_view(b.recipe, b.size).views[0].scale[0]
    height, width = sides(b.size)
    return {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": round(min(height, width) / whole)},
        "resample": {"linear": 2, "cubic": 3}[b.pixels.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(b.pixels.mean),
        "image_std": list(b.pixels.std),
        "do_convert_rgb": b.pixels.channels == 3,
    }


def timm_config(network: Any, name: str, options: dict[str, Any], blueprint: Blueprint) -> dict[str, Any]:
    """Return the content of config.json for timm's wrapper: the network's arguments and its pixels."""
    b = blueprint
    kept = ("first_conv", "classifier", "fixed_input_size")
    noted = {key: network.pretrained_cfg[key] for key in kept if key in network.pretrained_cfg}
    return {
        "architecture": name,
        "num_classes": 0,
        "num_features": network.num_features,
        "model_args": options,
        "pretrained_cfg": noted
        | {
            "input_size": [b.encoders[0], *sides(b.size)],
            "interpolation": {"linear": "bilinear", "cubic": "bicubic"}[b.pixels.interpolation],
            "crop_pct": evaluation_view(b.recipe, b.size).views[0].scale[0],
            "crop_mode": "center",
            "mean": list(b.pixels.mean),
            "std": list(b.pixels.std),
            "num_classes": 0,
        },
    }


def model_card(backbone: Backbone) -> str:
    """Return the content of README.md: the network, and how its input is made from the values of an image."""
    b = backbone.blueprint
    height, width = sides(b.size)
    space = f", {b.pixels.color_space}" if b.pixels.channels == 3 else ""
    lines = [
        "---",
        f"library_name: {'transformers' if plain_vit(backbone.network) is not None else 'timm'}",
        "tags: [self-supervised, image-feature-extraction]",
        "---",
        f"# {backbone.name}",
        "",
        f"Features of {b.arch}, trained without labels by fasttrain.",
        "",
        f"- input: float32 [batch, {b.pixels.channels}, {height}, {width}]{space}",
        f"- mean: {list(b.pixels.mean)}",
        f"- standard deviation: {list(b.pixels.std)}",
    ]
    if b.pixels.pixel_range is not None:
        lines.append(
            f"- range that becomes 0 to 1 before: {list(b.pixels.pixel_range)} (MIN MAX, for all channels or each)"
        )
    return "\n".join(lines) + "\n"


def _write_timm(backbone: Backbone, path: Path) -> str:
    name, options = timm_arguments(backbone.blueprint)
    network = timm.create_model(name, num_classes=0, **options)
    save_tensors(backbone.network, path / "model.safetensors", {"format": "pt"})
    _write_json(path / "config.json", timm_config(network, name, options, backbone.blueprint))
    (path / "README.md").write_text(model_card(backbone))
    check_same(backbone, timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=0).eval(), "timm")
    return f"timm.create_model('local-dir:{path.name}', pretrained=True, num_classes=0)"


def _renamed(name: str) -> str:
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
