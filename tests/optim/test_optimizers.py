"""Parameter groups from rules, and the implementation behind each optimizer's name."""

import json
import math
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from fasttrain.models.heads import Prototypes
from fasttrain.optim.layerwise import Lamb, Lars
from fasttrain.optim.optimizers import (
    ParameterRule,
    apex_lamb,
    create_optimizer,
    default_rule,
    in_use,
    parameter_groups,
    set_schedules,
)


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)  # biases and norms come first here
        self.linear = nn.Linear(3, 4)
        self.prototypes = Prototypes(4, 5)
        self.teacher = nn.Linear(3, 4).requires_grad_(False)


@pytest.mark.parametrize(
    ("options", "groups"),
    [
        ({}, {"weight matrices": (1, 0.3), "biases and norms": (3, 0.0), "prototypes": (1, 0.3)}),
        ({"decay_all": True}, {"weight matrices": (4, 0.3), "prototypes": (1, 0.3)}),
        (
            {"constant_lr": {"linear"}},
            {
                "biases and norms": (2, 0.0),
                "prototypes": (1, 0.3),
                "linear's weight matrices": (1, 0.3),
                "linear's biases and norms": (1, 0.0),
            },
        ),
    ],
    ids=["default", "decay_all", "constant_lr"],
)
def test_default_rules_give_the_published_groups(options, groups):
    """The order is part of the behaviour: ZeRO's shards in older checkpoints depend on it."""
    made = parameter_groups(_Net(), 0.3, lambda name, parameter: default_rule(name, parameter, **options))
    assert [(g["name"], (len(g["params"]), g["weight_decay"])) for g in made] == list(groups.items())
    assert {g["name"]: g["layerwise"] for g in made} == {name: decay > 0 for name, (_, decay) in groups.items()}
    assert {g["name"] for g in made if g["constant_lr"]} == {name for name in groups if "linear's" in name}
    json.dumps([{key: value for key, value in g.items() if key != "params"} for g in made])  # checkpoints hold them


def test_rules_express_layerwise_decay_and_a_patch_embedding():
    """Layer-wise decay of DINOv2, its factor 0.2 for the patch embedding, and two heads with their own freezing."""
    names = ["patch_embed", *(f"blocks.{depth}" for depth in range(3)), "heads.dino", "heads.ibot"]
    net = nn.ModuleDict({name.replace(".", "_"): nn.Linear(2, 2) for name in names})

    def rule_for(name, parameter):
        rule = default_rule(name, parameter)
        part, _, number = name.split(".")[0].partition("_")
        if part == "heads":
            return replace(rule, group=f"{number} head", frozen_epochs={"dino": 1.0, "ibot": 2.0}[number])
        depth = int(number) + 1 if part == "blocks" else 0
        scale = 0.5 ** (3 - depth) * (0.2 if part == "patch" else 1.0)
        return replace(rule, group=f"{part} {number}'s {rule.group}", lr_scale=scale)

    groups = parameter_groups(net, 0.1, rule_for)
    assert sorted(p for g in groups for p in map(id, g["params"])) == sorted(map(id, net.parameters()))
    for group in groups:
        set_schedules(group, lr=4.0, peak_lr=8.0, weight_decay=0.3, epoch=1.5)
    rates = {g["name"]: (g["lr"], g["weight_decay"]) for g in groups}
    assert rates["patch embed's weight matrices"] == pytest.approx((4 * 0.2 / 8, 0.3))
    assert rates["blocks 0's biases and norms"] == (1.0, 0.0)
    assert rates["blocks 2's weight matrices"] == (4.0, 0.3)
    assert rates["dino head"][0] == 4.0
    assert rates["ibot head"][0] == 0.0


def test_constant_lr_stays_at_its_peak_and_scales_weight_decay():
    rule = ParameterRule("temperature", lr_scale=0.5, weight_decay_scale=2.0, constant_lr=True)
    (group,) = parameter_groups(nn.Linear(2, 2), 0.1, lambda *_: rule)
    set_schedules(group, lr=1.0, peak_lr=8.0, weight_decay=0.3, epoch=0)
    assert (group["lr"], group["weight_decay"]) == (4.0, 0.6)


@pytest.mark.parametrize("name", ["lr_scale", "weight_decay_scale"])
@pytest.mark.parametrize("value", [-1, math.nan])
def test_rule_with_a_negative_scale_raises(name, value):
    with pytest.raises(ValueError, match=name):
        ParameterRule(**{name: value})


def test_unknown_optimizer_lists_the_known_ones():
    with pytest.raises(ValueError, match="adamw, sgd, lars, lamb"):
        create_optimizer("adamm", [], lr=1)


class _FusedLAMB:
    def __init__(self, groups, **settings):
        self.groups, self.settings = groups, settings


@pytest.fixture
def install_apex(monkeypatch, tmp_path):
    """A function that makes ``import apex`` find a kind of apex, on a machine with a GPU."""

    def install(kind):
        modules = {"apex": ModuleType("apex"), "apex.optimizers": None, "apex.multi_tensor_apply": None}
        if kind.startswith("nvidia"):
            modules["apex.optimizers"] = modules["apex"].optimizers = ModuleType("apex.optimizers")
            modules["apex.optimizers"].FusedLAMB = _FusedLAMB
            modules["apex.multi_tensor_apply"] = ModuleType("apex.multi_tensor_apply")
            modules["apex.multi_tensor_apply"].multi_tensor_applier = SimpleNamespace(available=kind == "nvidia")
        if kind == "absent":
            modules["apex"] = None
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        if kind == "failing":  # PyPI's fails in a way that depends on what else is installed
            (tmp_path / "apex.py").write_text("raise AttributeError('pyramid')")
            monkeypatch.syspath_prepend(tmp_path)
            monkeypatch.delitem(sys.modules, "apex")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    return install


@pytest.mark.parametrize("kind", ["absent", "pypi", "nvidia without extensions", "failing"])
def test_lamb_without_nvidias_apex_is_ours(install_apex, kind):
    install_apex(kind)
    assert apex_lamb() is None
    assert in_use().endswith("lamb: fasttrain's")


@pytest.mark.parametrize(
    ("name", "sharded", "on_gpu", "weight_decay", "kind"),
    [
        ("lars", False, True, 0.1, Lars),
        ("lamb", True, True, 0.1, Lamb),
        ("lamb", False, False, 0.1, Lamb),
        ("lamb", False, True, 0.0, Lamb),  # apex would scale no step of a group with trust ratio
        ("lamb", False, True, 0.1, _FusedLAMB),
    ],
)
def test_apex_is_used_only_where_its_steps_are_the_same(
    install_apex, monkeypatch, name, sharded, on_gpu, weight_decay, kind
):
    install_apex("nvidia")
    monkeypatch.setattr(nn.Parameter, "is_cuda", on_gpu, raising=False)
    groups = [{"params": [nn.Parameter(torch.ones(2))], "weight_decay": weight_decay, "layerwise": True}]
    optimizer = create_optimizer(name, groups, lr=0.1, sharded=sharded)
    assert type(optimizer) is kind
    if kind is _FusedLAMB:
        assert (optimizer.groups, optimizer.settings) == (groups, {"lr": 0.1, "max_grad_norm": math.inf})
        assert "apex's FusedLAMB" in in_use()
