"""Weights in the layouts of other projects give the features of the project's own class.

transformers runs in its own process: here the root folder ``kernels`` is on the path, and transformers would import it
as the package of that name.
"""

import os
import subprocess
import sys
import types
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from lightly.models import ResNetGenerator
from lightly.models.modules import MaskedVisionTransformerTIMM
from timm.models.convnext import checkpoint_filter_fn as timms_convnext
from timm.models.eva import checkpoint_filter_fn as timms_dinov3
from timm.models.vision_transformer import checkpoint_filter_fn as timms_dinov2
from torch import nn

from fasttrain.errors import ConfigError
from fasttrain.models.architectures import create_backbone
from fasttrain.models.layouts import map_weights
from fasttrain.models.weights import load_weights, read_weights

IMAGES = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
_PEERS = """
import torch
from transformers import *

sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
gated = dict(intermediate_size=64, num_register_tokens=4, layer_norm_eps=1e-5, use_gated_mlp=True)
peers = {
    "dinov2": Dinov2Model(Dinov2Config(**sizes)),
    "registers": Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes)),
    "swiglu": Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes, use_swiglu_ffn=True)),
    "dinov3": DINOv3ViTModel(DINOv3ViTConfig(**sizes, **gated | {"use_gated_mlp": False})),
    "dinov3 gated": DINOv3ViTModel(DINOv3ViTConfig(**sizes, **gated, hidden_act="silu")),
    "vit": ViTModel(ViTConfig(**sizes, intermediate_size=128, layer_norm_eps=1e-6), add_pooling_layer=False),
}
images, results = torch.load("images.pt"), {}
for name, peer in peers.items():
    torch.manual_seed(1)
    for parameter in peer.eval().parameters():
        parameter.data += torch.randn_like(parameter) / 20
    peer.save_pretrained(name, max_shard_size="100KB")
    results[name] = peer.state_dict(), peer(images).last_hidden_state.detach()
torch.save(results, "results.pt")
"""
_META_NAMES = {  # from transformers' names to facebookresearch/dinov2's and dinov3's
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "embeddings.patch_embeddings": "patch_embed.proj",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.": "",
    "encoder.layer.": "blocks.",
    "model.layer.": "blocks.",
    "layers.": "blocks.",
    "attention.o_proj": "attn.proj",
    "attention.": "attn.",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "layernorm": "norm",
}


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    """Return the folder of transformers' models, and for each its weights and features of the images."""
    folder = tmp_path_factory.mktemp("peers")
    torch.save(IMAGES, folder / "images.pt")
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", _PEERS], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, torch.load(folder / "results.pt")


def _randomized(network):
    """Give every tensor other values than its initial ones, small enough for features of ordinary size."""
    torch.manual_seed(1)
    for name, x in network.state_dict().items():
        if x.is_floating_point():
            x.copy_(torch.rand_like(x) + 0.5 if "running_var" in name else x + torch.randn_like(x) / 20)
    return network.eval()


def _ours(name, **options):
    """Return timm's network of a name, in the size of the peers."""
    small = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 28, "patch_size": 14, **options}
    return timm.create_model(name, num_classes=0, **small).eval()


def _plain():
    return _ours("vit_small_patch16_224")


def _dinov2_vit(**options):
    return _ours("vit_small_patch14_dinov2", **options)


def _registers_vit():
    return _ours("vit_small_patch14_reg4_dinov2")


def _swiglu_vit():
    return _ours("vit_giant_patch14_reg4_dinov2", mlp_ratio=88 * 2 / 32)


def _dinov3_vit():
    return _ours("vit_small_patch16_dinov3_qkvb", mlp_ratio=2)


def _gated_vit():
    return _ours("vit_small_plus_patch16_dinov3_qkvb", mlp_ratio=2)


def _prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def _moved(state):
    return {name: tensor + 1 for name, tensor in state.items()}


def _meta(state, *, third=False):
    """Return transformers' weights under the names of facebookresearch/dinov2, or with ``third`` dinov3."""
    renamed = {}
    for name, tensor in state.items():
        for theirs, metas in _META_NAMES.items():
            name = name.replace(theirs, metas)
        renamed[name] = tensor
    state = renamed
    for block in range(2):
        attn, mlp = f"blocks.{block}.attn", f"blocks.{block}.mlp"
        state.setdefault(f"{attn}.k_proj.bias", torch.zeros(32))
        for kind in ("weight", "bias"):
            state[f"{attn}.qkv.{kind}"] = torch.cat([state.pop(f"{attn}.{part}_proj.{kind}") for part in "qkv"])
            if f"{mlp}.gate_proj.{kind}" in state:
                gate, up, down = (state.pop(f"{mlp}.{part}_proj.{kind}") for part in ("gate", "up", "down"))
                parts = {"w1": gate, "w2": up} if third else {"w12": torch.cat([gate, up])}
                state |= {f"{mlp}.{part}.{kind}": tensor for part, tensor in (parts | {"w3": down}).items()}
            elif third:
                state[f"{mlp}.fc1.{kind}"] = state.pop(f"{mlp}.up_proj.{kind}")
                state[f"{mlp}.fc2.{kind}"] = state.pop(f"{mlp}.down_proj.{kind}")
        if third:
            state[f"{attn}.qkv.bias"][32:64] = 7.0  # the mask hides it
            state[f"{attn}.qkv.bias_mask"] = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(32)
    if third:
        state["storage_tokens"] = state.pop("register_tokens")
        state["rope_embed.periods"] = torch.ones(4)
    return state


def _meta3(state):
    return _meta(state, third=True)


def _in_chunks(state):
    return {name.replace("blocks.", "blocks.0."): tensor for name, tensor in _meta(state).items()}


HEAD = {"head.0.weight": torch.ones(2, 2), "head.last_layer.weight_g": torch.ones(5, 1)}


def _ibot(state):
    state = {name.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2"): x for name, x in state.items()}
    student = _prefixed("module.backbone.", _moved(state) | {"masked_embed": torch.ones(1, 32)})
    return {"student": student, "teacher": _prefixed("backbone.", state) | HEAD, "epoch": 3}


def _mocov3(state):
    copies = _prefixed("momentum_encoder.", _moved(state) | HEAD) | _prefixed("base_encoder.", state | HEAD)
    return {"state_dict": _prefixed("module.", copies | {"predictor.0.weight": torch.ones(2, 2)})}


VITS = {
    "dinov2": ("dinov2", _meta, _dinov2_vit),
    "dinov2 in chunks": ("dinov2", _in_chunks, _dinov2_vit),
    "dinov2 teacher": ("dinov2", lambda s: {"teacher": _prefixed("backbone.", _meta(s)) | HEAD}, _dinov2_vit),
    "dinov2 into a ViT without LayerScale": ("dinov2", _meta, _plain),
    "dinov2 with registers": ("registers", _meta, _registers_vit),
    "dinov2 with SwiGLU": ("swiglu", _meta, _swiglu_vit),
    "dinov3": ("dinov3", _meta3, _dinov3_vit),
    "dinov3 with SwiGLU": ("dinov3 gated", _meta3, _gated_vit),
    "ibot": ("dinov2", lambda s: _ibot(_meta(s)), _dinov2_vit),
    "moco v3": ("vit", lambda s: _mocov3(_meta(s)), _plain),
    "transformers dinov2": ("dinov2", dict, _dinov2_vit),
    "transformers registers": ("registers", lambda s: _prefixed("dinov2_with_registers.", s), _registers_vit),
    "transformers swiglu": ("swiglu", dict, _swiglu_vit),
    "transformers dinov3": ("dinov3", dict, _dinov3_vit),
    "transformers dinov3 gated": ("dinov3 gated", dict, _gated_vit),
    "transformers vit": ("vit", lambda s: _prefixed("vit.", s) | {"classifier.weight": torch.ones(2, 2)}, _plain),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", VITS)
@torch.no_grad()
def test_vit_weights_give_the_features_of_their_class(case, peers, tmp_path):
    """transformers' names in a folder differ from its names in memory."""
    peer, convert, build = VITS[case]
    folder, results = peers
    state, features = results[peer]
    torch.save(convert(state), tmp_path / "weights.pth")
    for path in [tmp_path / "weights.pth", *([folder / peer] if case.startswith("transformers") else [])]:
        network = build()
        load_weights(network, read_weights(path), "it")
        torch.testing.assert_close(network.forward_features(IMAGES), features, rtol=1e-5, atol=1e-5)


def _official(network):
    """Return the weights of timm's DINOv2 or DINOv3 under Meta's names."""
    state = {"mask_token": torch.ones(1, 32)}
    tokens = (
        "register_tokens" if hasattr(network, "no_embed_class") and network.pos_embed is not None else "storage_tokens"
    )
    for name, tensor in _randomized(network).state_dict().items():
        for ours, theirs in (("reg_token", tokens), ("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma")):
            name = name.replace(ours, theirs)
        state[name] = tensor
    if "register_tokens" in state:
        state["pos_embed"] = torch.cat([torch.randn(1, 1, 32), state["pos_embed"]], dim=1)
    for name in [name for name in state if name.endswith("q_bias")]:
        parts = state.pop(name), torch.zeros(32), state.pop(name.replace("q_bias", "v_bias"))
        state[name.replace("q_bias", "qkv.bias")] = torch.cat(parts)
        state[name.replace("q_bias", "qkv.bias_mask")] = torch.ones(96)
    return state


@pytest.mark.parametrize(
    ("build", "timms"),
    [(_dinov2_vit, timms_dinov2), (_registers_vit, timms_dinov2), (_dinov3_vit, timms_dinov3)],
)
def test_meta_weights_are_mapped_as_by_timm(build, timms):
    network = build()
    state = _official(network)
    ours, _ = map_weights(state, network)
    theirs = timms(dict(state), network)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def _numbered(state):
    """Return the names of nn.Sequential(*list(resnet.children())[:-1])."""
    children = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
    return {children[name.partition(".")[0]] + name[name.index(".") :]: tensor for name, tensor in state.items()}


def _lightning(state):
    """Return a checkpoint of Lightning whose hyper-parameters are objects of OmegaConf, as solo-learn's are."""
    module = types.ModuleType("omegaconf.dictconfig")
    module.DictConfig = type("DictConfig", (), {"__module__": "omegaconf.dictconfig"})
    sys.modules["omegaconf.dictconfig"] = module
    config = module.DictConfig()
    config.content = {"lr": 0.3, "path": Path("x"), "mean": np.ones(3), "best": np.float64(0.5)}
    return {"hyper_parameters": config, "state_dict": state, "seen": defaultdict(list, a=[ONE]), "epoch": 3}


FC = {"fc.0.weight": torch.ones(3, 512), "fc.0.bias": torch.ones(3), "fc.2.weight": torch.ones(3, 3)}
ONE = torch.ones(1)


def _moco(state):
    queries, keys = _prefixed("module.encoder_q.", state | FC), _prefixed("module.encoder_k.", _moved(state) | FC)
    return {"state_dict": keys | queries | {"module.queue": ONE, "module.queue_ptr": ONE}}


def _lucidrains(state):
    online = _prefixed("online_encoder.net.", state) | {"online_encoder.projector.net.0.weight": ONE}
    return _prefixed("target_encoder.net.", _moved(state)) | _prefixed("net.", state) | online


def _yaox12(state):
    online = _prefixed("module.encoder.", _numbered(state)) | {"module.predictor.l1.weight": ONE}
    return {"target_network": _prefixed("module.encoder.", _moved(_numbered(state))), "online_network": online}


def _vissl(state):
    model = {"trunk": _prefixed("_feature_blocks.", state), "heads": {"0.clf.weight": ONE}}
    return {"classy_state_dict": {"base_model": {"model": model}}}


def _solo(state):
    copies = _prefixed("momentum_backbone.", _moved(state)) | _prefixed("backbone.", state)
    return _lightning(copies | {"projector.0.weight": ONE})


RESNETS = {
    "MoCo v1 or v2": _moco,
    "MoCo v3": _mocov3,
    "SwAV or DeepCluster v2": lambda s: _prefixed(
        "module.", s | {"projection_head.0.weight": ONE, "prototypes.weight": ONE}
    ),
    "SwAV or DeepCluster v2 ": lambda s: {
        "state_dict": _prefixed("module.", s | {"prototypes.prototypes0.weight": ONE})
    },
    "SimSiam": lambda s: {"state_dict": _prefixed("module.encoder.", s | FC) | {"module.predictor.0.weight": ONE}},
    "timm or torchvision": lambda s: {name: x for name, x in s.items() if "num_batches" not in name},  # byol-convert
    "BYOL": _lucidrains,
    "an nn.Sequential of a ResNet": _yaox12,
    "an nn.Sequential of a ResNet ": lambda s: {
        "state_dict": _prefixed("backbone_momentum.", _moved(_numbered(s))) | _prefixed("backbone.", _numbered(s))
    },
    "VISSL": _vissl,
    "solo-learn": _solo,
    "timm or torchvision ": lambda s: {
        "model": _prefixed("module._orig_mod.backbone.", s),
        "optimizer": {"state": {0: s}},
    },
}


@pytest.fixture(scope="module")
def resnet():
    peer = torchvision.models.resnet18()
    peer.fc = nn.Identity()
    return _randomized(peer)


@pytest.mark.parametrize("case", RESNETS)
@torch.no_grad()
def test_resnet_weights_give_torchvisions_features(case, resnet, tmp_path):
    torch.save(RESNETS[case](resnet.state_dict()), tmp_path / "weights.pth")
    network = timm.create_model("resnet18", num_classes=0).eval()
    report = load_weights(network, read_weights(tmp_path / "weights.pth"), "it")
    assert report.layout == case.strip()
    torch.testing.assert_close(network(IMAGES), resnet(IMAGES), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_lightlys_own_networks_give_their_features():
    images = IMAGES[..., :16, :16].tile(2, 2)
    peer = _randomized(ResNetGenerator("resnet-18"))
    network = create_backbone("resnet18", img_size=32).eval()
    load_weights(network, _prefixed("backbone.", peer.state_dict()), "it")
    peer.linear = nn.Identity()
    torch.testing.assert_close(network(images), peer(images), rtol=1e-5, atol=1e-5)
    vit = MaskedVisionTransformerTIMM(_randomized(_plain())).eval()
    network = _plain()
    load_weights(network, _prefixed("teacher_backbone.", vit.state_dict()), "it")
    torch.testing.assert_close(network(IMAGES), vit(IMAGES), rtol=1e-5, atol=1e-5)


def test_convnext_of_meta_is_mapped_as_by_timm():
    network = _randomized(timm.create_model("test_convnext", num_classes=0))
    theirs = {"norms.3.weight": ONE}
    for name, tensor in network.state_dict().items():
        for ours, metas in (("head.norm", "norm"), (".blocks.", "."), ("conv_dw", "dwconv"), ("mlp.fc", "pwconv")):
            name = name.replace(ours, metas)
        stage, _, layer = name.partition(".downsample.")
        name = f"downsample_layers.{stage[-1]}.{layer}" if layer else name.replace("stem.", "downsample_layers.0.")
        theirs[name] = tensor.flatten(1) if "pwconv" in name and tensor.ndim == 4 else tensor
    ours, _ = map_weights(theirs, network)
    expected = timms_convnext({name: x for name, x in theirs.items() if "norms" not in name}, network)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


def test_report_names_what_was_mapped_resampled_and_dropped():
    state = _prefixed("teacher.backbone.", _official(_registers_vit())) | {"teacher.dino_head.0.weight": ONE}
    network = _ours("vit_small_patch14_reg4_dinov2", img_size=32, patch_size=8, in_chans=4)
    report = load_weights(network, state, "it")
    assert (report.layout, report.prefix, report.mapped) == ("DINOv2", "teacher.backbone.", len(network.state_dict()))
    assert report.dropped == ("mask_token", "teacher")
    changed = "\n".join(report.changed)
    for change in ("class token", "2 x 2 to 4 x 4", "14 x 14 to 8 x 8", "3 to 4 channels"):
        assert change in changed
    assert len(report.lines()) == 4


@pytest.mark.parametrize(
    ("state", "build", "line"),
    [
        (lambda: {"a": ONE, "b": ONE}, _plain, "none of its names"),
        (lambda: _official(_dinov2_vit()), lambda: _dinov2_vit(depth=3), "it has 2 blocks, not 3"),
        (lambda: _official(_dinov2_vit()), lambda: _dinov2_vit(embed_dim=64), r"is \[.*\], not"),
        (lambda: _official(_registers_vit()), _dinov2_vit, "it has 'reg_token'"),
        (lambda: _official(_dinov2_vit()), _registers_vit, "it has no 'reg_token'"),
        (lambda: _official(_dinov3_vit()), lambda: _ours("vit_small_patch16_dinov3", mlp_ratio=2), "qkv.bias"),
    ],
)
def test_weights_of_another_network_are_refused_in_one_line(state, build, line):
    with pytest.raises(ConfigError, match=rf"^FILE: .*{line}") as error:
        load_weights(build(), state(), "FILE")
    assert "\n" not in str(error.value)
