import pytest
import torch
from torch import nn

from fasttrain.heads import Prototypes
from fasttrain.optimizers import NAMES, Role, create_optimizer, parameter_groups


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
