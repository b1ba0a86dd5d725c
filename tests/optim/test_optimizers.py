import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from fasttrain.models.heads import Prototypes
from fasttrain.optim.layerwise import Lamb, Lars
from fasttrain.optim.optimizers import NAMES, Role, apex_lamb, create_optimizer, in_use, parameter_groups


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.prototypes = Prototypes(4, 5)
        self.teacher = nn.Linear(3, 4).requires_grad_(False)


def test_groups_hold_every_trained_parameter_once_by_role():
    net = _Net()
    groups = {g["name"]: g for g in parameter_groups(net, 0.3)}
    assert [p is net.linear.weight for p in groups["decay"]["params"]] == [True]
    assert len(groups["no_decay"]["params"]) == 3
    assert [p is net.prototypes.weight for p in groups["prototypes"]["params"]] == [True]
    assert {n: g["weight_decay"] for n, g in groups.items()} == {"decay": 0.3, "no_decay": 0.0, "prototypes": 0.3}


def test_weight_decay_may_reach_every_parameter():
    groups = {g["name"]: g for g in parameter_groups(_Net(), 0.3, decay_all=True)}
    assert {n: (len(g["params"]), g["weight_decay"]) for n, g in groups.items()} == {
        "decay": (4, 0.3),
        "prototypes": (1, 0.3),
    }


def test_a_module_with_a_constant_learning_rate_has_groups_of_its_own():
    groups = {g["name"]: g for g in parameter_groups(_Net(), 0.3, constant_lr={"linear"})}
    assert {n: len(g["params"]) for n, g in groups.items()} == {
        "no_decay": 2,
        "prototypes": 1,
        "constant_decay": 1,
        "constant_no_decay": 1,
    }
    assert [name for name in groups if Role(name).constant_lr] == ["constant_decay", "constant_no_decay"]
    assert [name for name in groups if Role(name).decays] == ["prototypes", "constant_decay"]


@pytest.mark.parametrize("name", NAMES)
def test_every_named_optimizer_lowers_a_loss(name):
    torch.manual_seed(0)
    net = nn.Linear(3, 1)
    target = torch.randn(8, 3)
    optimizer = create_optimizer(name, [{"params": list(net.parameters()), "weight_decay": 1e-4}], lr=0.1)
    losses = []
    for _ in range(20):
        loss = (net(target) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_unknown_optimizer_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'adamm' is unknown; choose one of adamw, sgd, lars, lamb"):
        create_optimizer("adamm", [], lr=1)


class _FusedLAMB:
    def __init__(self, groups, **settings):
        self.groups, self.settings = groups, settings


def _install_apex(monkeypatch, kind):
    """Put a module called apex where imports look first."""
    made = {"apex": ModuleType("apex"), "apex.optimizers": None, "apex.multi_tensor_apply": None}
    if kind in ("nvidia's", "nvidia's without extensions"):
        made["apex.optimizers"] = made["apex"].optimizers = ModuleType("apex.optimizers")
        made["apex.optimizers"].FusedLAMB = _FusedLAMB
        made["apex.multi_tensor_apply"] = ModuleType("apex.multi_tensor_apply")
        made["apex.multi_tensor_apply"].multi_tensor_applier = SimpleNamespace(available=kind == "nvidia's")
    if kind == "absent":
        made["apex"] = None  # as if it were not installed
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)


def _on_gpu(monkeypatch):
    """Groups whose parameters say that they are on a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return [{"name": "decay", "params": [SimpleNamespace(is_cuda=True)], "weight_decay": 0.1}]


def test_lamb_is_apex_s_where_nvidia_s_apex_is(monkeypatch):
    _install_apex(monkeypatch, "nvidia's")
    groups = _on_gpu(monkeypatch)
    made = create_optimizer("lamb", groups, lr=0.5)
    assert isinstance(made, _FusedLAMB)
    assert (made.groups, made.settings) == (groups, {"lr": 0.5, "max_grad_norm": math.inf})
    assert "lamb: apex's FusedLAMB at --zero_stage 0, fasttrain's above" in in_use()


@pytest.mark.parametrize("kind", ["absent", "pypi's", "nvidia's without extensions"])
def test_lamb_is_ours_without_nvidia_s_apex(monkeypatch, kind):
    _install_apex(monkeypatch, kind)
    _on_gpu(monkeypatch)
    assert apex_lamb() is None
    assert in_use().endswith("lamb: fasttrain's")


def test_an_apex_that_fails_when_imported_is_as_none(monkeypatch, tmp_path):
    """PyPI's does, in a way that depends on what else is installed."""
    (tmp_path / "apex.py").write_text("raise AttributeError('pyramid')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    assert apex_lamb() is None


@pytest.mark.parametrize(("name", "kind"), [("lars", Lars), ("lamb", Lamb)])
@pytest.mark.parametrize("sharded", [False, True])
def test_shards_and_the_cpu_get_ours(monkeypatch, name, kind, sharded):
    _install_apex(monkeypatch, "nvidia's")
    parameter = nn.Parameter(torch.ones(2))
    monkeypatch.setattr(nn.Parameter, "is_cuda", sharded, raising=False)
    groups = [{"params": [parameter], "weight_decay": 0.1}]
    assert type(create_optimizer(name, groups, lr=0.1, sharded=sharded)) is kind


def test_lamb_is_ours_where_apex_would_scale_nothing(monkeypatch):
    """It takes a weight decay of 0 for a group whose steps stay as they are."""
    _install_apex(monkeypatch, "nvidia's")
    monkeypatch.setattr(nn.Parameter, "is_cuda", True, raising=False)
    for decay, kind in ((0.0, Lamb), (0.1, _FusedLAMB)):
        groups = [{"params": [nn.Parameter(torch.ones(2))], "weight_decay": decay, "layerwise": True}]
        assert type(create_optimizer("lamb", groups, lr=0.1)) is kind
