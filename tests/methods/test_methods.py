"""What every method must hold, base and twin."""

import pytest
import torch
from torch import nn

from fasttrain import methods
from fasttrain.methods.base import Branch, Step, global_views

_SMALL = {
    "dino": {"out_dim": 32, "hidden_dim": 16, "bottleneck_dim": 8, "use_bn_in_head": True},
    "simclr": {"hidden_dim": 16, "out_dim": 8},
    "swav": {"nmb_prototypes": 32, "hidden_dim": 16, "out_dim": 8},
}


class _Backbone(nn.Module):
    num_features = 12

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 12)
        self.calls = []

    def forward(self, x):
        self.calls.append(tuple(x.shape))
        return self.linear(x.mean((2, 3)))


def _build(name, entropy, **settings):
    torch.manual_seed(0)
    kind = methods.load(name)
    return kind(_Backbone(), kind.Settings(**{**_SMALL[name], **settings}), entropy=entropy, n_global=2)


def _views(batch=16):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(v, batch, 3, s, s, generator=generator) for v, s in ((2, 8), (3, 4))]


_STEP = Step(index=0, total=100, per_epoch=10)


def test_every_method_has_a_small_configuration_here():
    assert methods.names() == sorted(_SMALL)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("name", sorted(_SMALL))
def test_a_step_lowers_the_loss_and_every_trained_parameter_has_a_gradient(name, entropy):
    method = _build(name, entropy)
    views = _views()
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(15):
        objective = method(views, _STEP)
        optimizer.zero_grad()
        objective.loss.backward()
        optimizer.step()
        losses.append(objective.loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for p in method.student.parameters())


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("name", sorted(_SMALL))
def test_the_bound_is_finite_detached_and_below_its_ceiling(name, entropy):
    bound = _build(name, entropy)(_views(), _STEP).bound
    for value in (bound.entropy, bound.reconstruction, bound.information):
        assert torch.isfinite(value)
        assert not value.requires_grad
    assert bound.entropy <= bound.entropy_max + 1e-4


@pytest.mark.parametrize("name", sorted(_SMALL))
def test_the_twin_s_loss_is_minus_the_information_it_reports(name):
    objective = _build(name, True)(_views(), _STEP)
    information = objective.bound.information.to(objective.loss.dtype)
    torch.testing.assert_close(objective.loss.detach(), -information, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", sorted(_SMALL))
def test_the_bound_is_measured_only_when_it_is_asked_for(name):
    step = Step(index=0, total=100, per_epoch=10, measure=False)
    assert _build(name, False)(_views(), step).bound is None


@pytest.mark.parametrize("name", sorted(_SMALL))
def test_each_resolution_is_one_forward_pass_of_each_branch(name):
    method = _build(name, False)
    method(_views(), _STEP)
    assert method.student.backbone.calls == [(32, 3, 8, 8), (48, 3, 4, 4)]
    if method.teacher is not None:
        assert method.teacher.backbone.calls == [(32, 3, 8, 8)]


@pytest.mark.parametrize("name", sorted(_SMALL))
def test_one_global_view_is_refused(name):
    kind = methods.load(name)
    with pytest.raises(ValueError, match="needs 2 global views, the recipe has 1"):
        kind(_Backbone(), kind.Settings(**_SMALL[name]), entropy=False, n_global=1)


def test_unknown_method_lists_the_known_ones():
    with pytest.raises(ValueError, match="'dinno' is unknown; choose one of dino, simclr, swav"):
        methods.load("dinno")


def test_global_views_may_share_a_resolution_with_local_ones():
    groups = [torch.arange(4.0).view(4, 1, 1, 1, 1)]
    assert [g.flatten().tolist() for g in global_views(groups, 2)] == [[0, 1]]
    groups = [torch.zeros(1, 1), torch.zeros(3, 1)]
    assert [len(g) for g in global_views(groups, 2)] == [1, 1]


def test_a_branch_projects_to_unit_rows_in_the_order_of_the_views():
    branch = Branch(_Backbone(), nn.Linear(12, 5))
    views = _views(batch=4)
    z = branch(views)
    assert z.shape == (5, 4, 5)
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(5, 4))
    alone = branch([views[1][2:3]])
    torch.testing.assert_close(z[4], alone[0])
