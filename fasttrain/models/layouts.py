"""Map the weights of other projects to timm's names: the layouts as data, and one function that applies them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models import adapt_input_conv
from torch import Tensor, nn

Tensors = dict[str, Tensor]
Renames = tuple[tuple[str, str], ...]


class Layout(NamedTuple):
    """The names of a project's weights."""

    name: str
    marker: str
    """A regular expression that a name in such a file contains. It only chooses between layouts that fit equally."""
    renames: Renames = ()
    """Regular expressions and replacements, applied in turn. Each matches from the start of a part of a name."""


_META_VIT = (
    (r"blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # blocks in chunks
    (r"(?:register|storage)_tokens$", "reg_token"),
    (r"mlp\.w12\.", "mlp.fc1."),
    (r"mlp\.w1\.", "mlp.fc1_g."),
    (r"mlp\.w2\.", "mlp.fc1_x."),
    (r"mlp\.w3\.", "mlp.fc2."),
)
_TRANSFORMERS_VIT = (
    (r"embeddings\.(cls_token|mask_token)$", r"\1"),
    (r"embeddings\.position_embeddings$", "pos_embed"),
    (r"embeddings\.register_tokens$", "reg_token"),
    (r"embeddings\.patch_embeddings\.(?:projection\.)?", "patch_embed.proj."),
    (r"(?:encoder\.|model\.)?layers?\.(\d+)\.", r"blocks.\1."),
    (r"attention\.(?:attention\.query|q_proj)\.", "attn.q_proj."),
    (r"attention\.(?:attention\.key|k_proj)\.", "attn.k_proj."),
    (r"attention\.(?:attention\.value|v_proj)\.", "attn.v_proj."),
    (r"attention\.(?:output\.dense|o_proj)\.", "attn.proj."),
    (r"layernorm_before\.", "norm1."),
    (r"layernorm_after\.", "norm2."),
    (r"intermediate\.dense\.", "mlp.fc1."),
    (r"output\.dense\.", "mlp.fc2."),
    (r"layer_scale([12])\.lambda1$", r"ls\1.gamma"),
    (r"mlp\.weights_in\.", "mlp.fc1."),
    (r"mlp\.(?:weights_out|down_proj)\.", "mlp.fc2."),
    (r"mlp\.gate_proj\.", "mlp.fc1_g."),
    (r"mlp\.up_proj\.", "mlp.fc1_x."),
    (r"layernorm\.", "norm."),
)
_STATISTIC = "(weight|bias|running_mean|running_var|num_batches_tracked)$"
# torchvision's ResNet as nn.Sequential(*list(resnet.children())[:-1]).
_SEQUENTIAL_RESNET = (
    (r"4\.(\d+)\.(conv|bn|downsample)", r"layer1.\1.\2"),
    (r"5\.(\d+)\.(conv|bn|downsample)", r"layer2.\1.\2"),
    (r"6\.(\d+)\.(conv|bn|downsample)", r"layer3.\1.\2"),
    (r"7\.(\d+)\.(conv|bn|downsample)", r"layer4.\1.\2"),
    (r"(?<!downsample\.)0\.weight$", "conv1.weight"),
    (rf"(?<!downsample\.)1\.{_STATISTIC}", r"bn1.\1"),
)
_META_CONVNEXT = (
    (r"downsample_layers\.0\.", "stem."),
    (r"downsample_layers\.(\d)\.", r"stages.\1.downsample."),
    (r"stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"dwconv\.", "conv_dw."),
    (r"pwconv([12])\.", r"mlp.fc\1."),
    (r"(?<!\d\.)norm\.", "head.norm."),
)

LAYOUTS = (
    Layout("DINOv3", r"storage_tokens$|qkv\.bias_mask$|rope_embed\.periods$", _META_VIT),
    Layout("DINOv2", r"register_tokens$|mlp\.w12\.|ls1\.gamma$", _META_VIT),
    Layout("iBOT", r"masked_embed$", _META_VIT),
    Layout("ConvNeXt of Meta", r"downsample_layers\.", _META_CONVNEXT),
    Layout("transformers", r"embeddings\.patch_embeddings\.", _TRANSFORMERS_VIT),
    Layout("an nn.Sequential of a ResNet", r"(^|\.)4\.0\.conv1\.weight$", _SEQUENTIAL_RESNET),
    Layout("lightly's ResNet", r"shortcut\.0\.weight$", ((r"shortcut\.", "downsample."),)),
    Layout("MoCo v3", r"base_encoder\."),
    Layout("MoCo v1 or v2", r"encoder_q\."),
    Layout("VISSL", r"_feature_blocks\.|classy_state_dict\."),
    Layout("SwAV or DeepCluster v2", r"(^|module\.)(prototypes|projection_head)"),
    Layout("SimSiam", r"module\.encoder\.conv1\."),
    Layout("BYOL", r"(?i)online_?(encoder|network|backbone)"),
    Layout("solo-learn", r"(?:momentum_)?projector\."),
    Layout("timm or torchvision", ""),
)
"""Every layout. The layout with the most names of the network wins, then the first layout with a marker in the file."""

# Of several copies of a network in a file, teachers and averages come first, and momentum encoders last.
_FIRST = re.compile(r"(^|[._])teacher|(state_dict|model)_ema")
_LAST = re.compile(r"(^|[._])(student|target|key|ema|encoder_k)|momentum")
# Parts of a network that have no place in a backbone, next to its own names.
_HEADS = re.compile(
    r"(fc|heads?|classifier|linear|projection_head|projector|predictor|prototypes\d*|pooler|queue\w*|mask_token"
    r"|masked_embed|dino_head|ibot_head|local_cls_norm|rope_embed|decoder\w*|lm_head|norms|.*\.bias_mask"
    r"|(online_)?(linear_)?classifier)(\.|$)"
)


@dataclass(frozen=True)
class Report:
    """What became of the tensors of a file."""

    layout: str
    prefix: str
    """The part of the names in the file that is in front of the backbone's names."""
    mapped: int
    """Tensors of the network that come from the file."""
    renamed: int
    """Tensors with another name in the file, apart from the prefix."""
    changed: tuple[str, ...]
    """One line per kind of change to values: joined, folded, resampled."""
    dropped: tuple[str, ...]
    """Parts of the file that the network does not have, with their number of tensors."""

    def lines(self) -> list[str]:
        """Return the report for a user."""
        below = f" below {self.prefix!r}" if self.prefix else ""
        renamed = f", {self.renamed} renamed" if self.renamed else ""
        first = f"weights: {self.mapped} tensors in the layout of {self.layout}{below}{renamed}"
        dropped = [f"dropped {', '.join(self.dropped)}"] if self.dropped else []
        return [first, *(f"weights: {line}" for line in (*self.changed, *dropped))]


def map_weights(tensors: Mapping[str, Tensor], network: nn.Module) -> tuple[Tensors, Report]:
    """Return the tensors of a file under a network's names and in its shapes, and a report. Neither is changed.

    Tensors with other names are returned too, and tensors of other shapes that cannot be resampled, so that the caller
    can name them. Heads, decoders and mask tokens are dropped. The result is empty if no name fits.
    """
    expected = network.state_dict()
    layout, prefix = _fitting(tensors, _skeleton(expected))
    new_names = {name: _renamed(name, layout.renames) for name in tensors}
    below = {name: new.removeprefix(prefix) for name, new in new_names.items() if new.startswith(prefix)}
    mapped = {new: tensors[name] for name, new in below.items()}
    changed = [line for change in _CHANGES if (line := change(mapped, expected, network)) is not None]
    heads = tuple(f"{name}." for name in _names(network, "classifier"))
    left = [name for name in mapped if name not in expected and (_HEADS.match(name) or name.startswith(heads))]
    kept = {name: tensor for name, tensor in mapped.items() if name not in left}
    outside = [name for name in tensors if name not in below]
    report = Report(
        layout.name,
        prefix,
        mapped=sum(name in expected for name in kept),
        renamed=sum(not name.endswith(new) for name, new in below.items() if new in kept),
        changed=tuple(changed),
        dropped=tuple(_grouped(left) + _grouped(outside)),
    )
    return kept, report


def _fitting(tensors: Mapping[str, Tensor], expected: set[str]) -> tuple[Layout, str]:
    """Return the layout and prefix with which most names of a file are names of the network."""
    best: tuple[Any, ...] | None = None
    for position, layout in enumerate(LAYOUTS):
        prefixes: Counter[str] = Counter()
        for name in tensors:
            new = _renamed(name, layout.renames)
            prefixes.update(new[: len(new) - len(end)] for end in _endings(new) if end in expected)
        marked = any(re.search(layout.marker, name) for name in tensors)
        for order, (prefix, count) in enumerate(prefixes.items()):
            rank = 0 if _FIRST.search(prefix) else 2 if _LAST.search(prefix) else 1
            key = (-count, rank, not marked, position, order)
            if best is None or key < best[0]:
                best = key, layout, prefix
    return (LAYOUTS[-1], "") if best is None else (best[1], best[2])


def _skeleton(expected: Iterable[str]) -> set[str]:
    """Return the names of a network, and the names of the parts that :data:`_CHANGES` joins into them."""
    return {*expected} | {
        name.replace(whole, part) for name in expected for whole, parts in _JOINED.items() for part in parts
    }


def _endings(name: str) -> list[str]:
    """Return a name without its first 0, 1, 2, ... parts."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _renamed(name: str, renames: Renames) -> str:
    for pattern, replacement in renames:
        name = re.sub(rf"(?<![^.]){pattern}", replacement, name)
    return name


def _grouped(names: Iterable[str]) -> list[str]:
    """Return the first parts of names with the number of names, such as ``head (6)``."""
    counts = Counter(name.partition(".")[0] for name in names)
    return [f"{part} ({count})" if count > 1 else part for part, count in counts.items()]


def _names(network: nn.Module, key: str) -> tuple[str, ...]:
    """Return timm's names of a network's classifiers or first convolutions."""
    value = getattr(network, "pretrained_cfg", {}).get(key) or ()
    return (value,) if isinstance(value, str) else tuple(value)


_JOINED = {"attn.qkv.": ("attn.q_proj.", "attn.k_proj.", "attn.v_proj."), "mlp.fc1.": ("mlp.fc1_g.", "mlp.fc1_x.")}
"""Layers that some projects store in parts, which follow each other in the rows of the whole."""


def _join(tensors: Tensors, expected: Mapping[str, Tensor], network: nn.Module) -> str | None:
    """Concatenate queries, keys and values, and the two halves of a gated layer. A missing bias of keys is 0."""
    joined = []
    for whole, parts in _JOINED.items():
        for last in [name for name in tensors if parts[-1] in name and name not in expected]:
            rows = [tensors.pop(last.replace(parts[-1], part), None) for part in parts]
            if rows[0] is None:  # a plain layer, whose name transformers shares with a half of the gated layer
                rows = rows[-1:]
            tensors[last.replace(parts[-1], whole)] = torch.cat(
                [torch.zeros_like(rows[-1]) if row is None else row for row in rows]  # type: ignore[arg-type]
            )
            joined += [whole.rstrip(".")] * (len(rows) > 1)
    return None if not joined else f"joined {', '.join(dict.fromkeys(joined))} from parts"


def _mask_key_bias(tensors: Tensors, expected: Mapping[str, Tensor], network: nn.Module) -> str | None:
    """Apply DINOv3's masks of the biases of keys. Split a bias into queries' and values', or drop it if it is 0."""
    for name in [name for name in tensors if name.endswith("attn.qkv.bias")]:
        bias = tensors[name]
        if (mask := tensors.pop(f"{name}_mask", None)) is not None:
            bias = tensors[name] = torch.where(mask == 0, 0, bias)
        queries, keys, values = bias.chunk(3)
        split = name.replace("qkv.bias", "q_bias")
        if name in expected or keys.any():
            continue
        if split in expected:
            tensors[split], tensors[split.replace("q_bias", "v_bias")] = queries, values
            del tensors[name]
        elif not bias.any():
            del tensors[name]
    return None


def _scale_layers(tensors: Tensors, expected: Mapping[str, Tensor], network: nn.Module) -> str | None:
    """Rename LayerScale's gamma as the network has it. Multiply it into the layer before it if the network has none."""
    folded = 0
    for name in [name for name in tensors if re.search(r"\.(ls[12]\.gamma|gamma_[12])$", name)]:
        block, number = name.partition(".ls")[0].partition(".gamma_")[0], re.findall(r"[12]", name)[-1]
        names = (f"{block}.ls{number}.gamma", f"{block}.gamma_{number}")
        layer = f"{block}.{'attn.proj' if number == '1' else 'mlp.fc2'}"
        new = next((other for other in names if other in expected), None)
        if new is not None:
            tensors[new] = tensors.pop(name)
        elif f"{layer}.weight" in tensors:
            gamma = tensors.pop(name)
            for kind in [kind for kind in ("weight", "bias") if f"{layer}.{kind}" in tensors]:
                rows = tensors[f"{layer}.{kind}"]
                tensors[f"{layer}.{kind}"] = rows.float() * (gamma[:, None] if rows.ndim == 2 else gamma).float()
            folded += 1
    return f"multiplied {folded} LayerScales into the layers before them" if folded else None


def _fit_positions(tensors: Tensors, expected: Mapping[str, Tensor], network: nn.Module) -> str | None:
    """Interpolate a ViT's positions for another grid, and move the class token's position where the network has it."""
    patches: Any = getattr(network, "patch_embed", None)
    positions, own = tensors.get("pos_embed"), expected.get("pos_embed")
    if positions is None or own is None or patches is None or not positions.ndim == own.ndim == 3:
        return None
    grid = getattr(patches, "grid_size", None)
    if positions.shape == own.shape or positions.shape[-1] != own.shape[-1] or grid is None:
        return None
    prefix = own.shape[1] - grid[0] * grid[1]
    sides = [(n, round((positions.shape[1] - n) ** 0.5)) for n in (0, 1, 2, prefix)]
    stored = next(((n, side) for n, side in sides if n + side**2 == positions.shape[1]), None)
    if stored is None:
        return None
    lines, (n, side) = [], stored
    if n == 1 and prefix == 0 and "cls_token" in tensors:
        tensors["cls_token"] = tensors["cls_token"] + positions[:, :1]
        positions, n = positions[:, 1:], 0
        lines.append("added the class token's position to the class token")
    elif n == 0 and prefix == 1:
        positions, n = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1), 1
    if n == prefix and (side, side) != tuple(grid):
        positions = resample_abs_pos_embed(positions.float(), [*grid], num_prefix_tokens=prefix)
        lines.append(f"resampled pos_embed from {side} x {side} to {grid[0]} x {grid[1]} patches")
    tensors["pos_embed"] = positions
    return "; ".join(lines) or None


def _fit_first_convolution(tensors: Tensors, expected: Mapping[str, Tensor], network: nn.Module) -> str | None:
    """Resample the patch projection for another patch size, and adapt RGB weights to other channels as timm does."""
    lines = []
    for name in dict.fromkeys(f"{name}.weight" for name in (*_names(network, "first_conv"), "patch_embed.proj")):
        if name not in tensors or name not in expected:
            continue
        weight, own = tensors[name], expected[name].shape
        if weight.ndim != 4 or len(own) != 4 or weight.shape[0] != own[0]:
            continue
        if name == "patch_embed.proj.weight" and weight.shape[2:] != own[2:]:
            lines.append(f"resampled {name} from {_size(weight.shape)} to {_size(own)} pixels")
            weight = resample_patch_embed(weight.float(), [*own[2:]])
        if weight.shape[1] == 3 != own[1]:
            lines.append(f"adapted {name} from 3 to {own[1]} channels")
            weight = adapt_input_conv(own[1], weight)
        tensors[name] = weight
    return "; ".join(lines) or None


def _size(shape: torch.Size) -> str:
    return f"{shape[2]} x {shape[3]}"


_CHANGES: tuple[Callable[[Tensors, Mapping[str, Tensor], nn.Module], str | None], ...] = (
    _join,
    _mask_key_bias,
    _scale_layers,
    _fit_positions,
    _fit_first_convolution,
)
"""Changes to a file's tensors, in this order. Each returns a line for the report, or None if it changed no values."""
