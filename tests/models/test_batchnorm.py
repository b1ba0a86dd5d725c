"""BatchNorm over all ranks: on one rank it is torch's; that two ranks equal one is test_two_ranks.py's."""

import copy

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fasttrain.distributed.world import World, initialise
from fasttrain.models import batchnorm
from fasttrain.models.architectures import create_backbone
from fasttrain.models.batchnorm import RankBatchNorm, RankBatchNormAct, synchronise
from fasttrain.plan.group import PlannedGroup


@pytest.fixture
def group(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # there torch's own is used
    initialise(World.from_environment())
    return dist.group.WORLD


def _randomise(module):
    generator = torch.Generator().manual_seed(0)
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 1.5, generator=generator)
    return module


@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("kind", "shape"), [(nn.BatchNorm1d, (7, 5)), (nn.BatchNorm2d, (3, 5, 4, 2))])
def test_equals_torch_s(group, kind, shape, affine, momentum):
    theirs = _randomise(kind(5, eps=1e-3, momentum=momentum, affine=affine))
    ours = synchronise(copy.deepcopy(theirs), group)
    assert isinstance(ours, RankBatchNorm)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        x = 3 * torch.randn(shape, generator=generator) + 5
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        weights = torch.randn(shape, generator=generator)
        outputs = [module(i) for module, i in zip((ours, theirs), inputs, strict=True)]
        for output in outputs:
            (output * weights).sum().backward()
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-5)
    for (name, parameter), (other, their) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other
        torch.testing.assert_close(parameter.grad, their.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x))


def test_layer_sends_one_message_forward_and_one_backward():
    """Mean and variance were two messages forward and two backward: 48 of a DINO step's 54."""
    group = PlannedGroup(0, 2)
    with FakeTensorMode():
        layer = synchronise(nn.BatchNorm2d(3), group)
        x = torch.randn(4, 3, 5, 5, requires_grad=True)
        layer(x).sum().backward()
        with torch.no_grad():
            layer(x)
    assert [(m.kind, m.bytes) for m in group.messages] == [("all_gather", 48), ("all_reduce", 24), ("all_gather", 48)]


def test_two_ranks_equal_one_in_fp64(monkeypatch):
    """The ranks run one after the other on halves: output, gradients and statistics match to 1e-12."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (3 * torch.randn(8, 3, 4, dtype=torch.float64, generator=generator) + 5 for _ in range(2))
    whole = _randomise(nn.BatchNorm1d(3).double())
    ranks = [RankBatchNorm(3).double() for _ in range(2)]
    shared = {"mean": [], "sums": []}
    monkeypatch.setattr(batchnorm, "start_gather", lambda own, group: lambda: torch.cat(shared["mean"]))
    monkeypatch.setattr(batchnorm, "all_reduce_mean", lambda own, group: sum(shared["sums"]) / 2)
    monkeypatch.setattr(RankBatchNorm, "group_size", lambda self: 2)
    halves = [half.clone().requires_grad_() for half in x.chunk(2)]
    for half in halves:
        shared["mean"].append(torch.stack(torch.batch_norm_update_stats(half.detach(), None, None, 0.0))[None])
    inputs = x.clone().requires_grad_()
    expected = whole(inputs)
    expected.backward(grad)
    xhat = (expected.detach() - whole.bias[:, None]) / whole.weight[:, None]
    for part, g in zip(xhat.chunk(2), grad.chunk(2), strict=True):
        shared["sums"].append(torch.stack([(g * part).sum((0, 2)), g.sum((0, 2))]).detach())
    outputs = []
    for rank, half, g in zip(ranks, halves, grad.chunk(2), strict=True):
        rank.load_state_dict(_randomise(nn.BatchNorm1d(3).double()).state_dict())
        rank.group = object()
        outputs.append(rank(half))
        outputs[-1].backward(g)
    exact = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(torch.cat(outputs), expected, **exact)
    torch.testing.assert_close(torch.cat([half.grad for half in halves]), inputs.grad, **exact)
    for name, parameter in whole.named_parameters():
        total = sum(rank.get_parameter(name).grad for rank in ranks)
        torch.testing.assert_close(total, parameter.grad, **exact)
    torch.testing.assert_close(dict(ranks[0].named_buffers()), dict(whole.named_buffers()), **exact)


def test_half_precision_is_counted_in_single(group):
    """As under autocast: the answer is rounded once, the running statistics not at all."""
    theirs = _randomise(nn.BatchNorm1d(5))
    ours = synchronise(copy.deepcopy(theirs), group)
    x = (3 * torch.randn(64, 5, generator=torch.Generator().manual_seed(1)) + 5).bfloat16()
    assert torch.equal(ours(x), theirs(x.float()).bfloat16())
    torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))


def test_conversion_keeps_names_weights_and_frozen_parameters(group):
    for arch in ("conv_small", "resnet18"):
        theirs = _randomise(create_backbone(arch, img_size=32))
        frozen = [name for k, (name, _) in enumerate(theirs.named_parameters()) if k % 3 == 0]
        for name in frozen:
            theirs.get_parameter(name).requires_grad_(False)
        theirs.train()
        ours = synchronise(copy.deepcopy(theirs), group)
        kinds = {type(m) for m in ours.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
        assert kinds <= {RankBatchNorm, RankBatchNormAct}
        assert len(kinds) == 1
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
        assert [name for name, p in ours.named_parameters() if not p.requires_grad] == frozen
        x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-3, atol=1e-4)


def test_timm_s_layer_keeps_its_activation(group):
    theirs = _randomise(BatchNormAct2d(4, act_layer=nn.SiLU))
    ours = synchronise(copy.deepcopy(theirs), group)
    assert isinstance(ours, RankBatchNormAct)
    x = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    assert ours(x).min() < 0 < ours(x).max()
    assert ours(x).min() > -0.3  # SiLU's least


def test_converted_once_is_enough(group):
    once = synchronise(nn.Sequential(nn.BatchNorm1d(3)), group)
    layer = once[0]
    assert synchronise(once, group)[0] is layer


def test_evaluation_mode_stays(group):
    layer = synchronise(nn.BatchNorm1d(3).eval(), group)
    assert not layer.training
    before = layer.running_mean.clone()
    layer(torch.randn(4, 3) + 9)
    assert torch.equal(layer.running_mean, before)


def test_a_vector_is_refused():
    with pytest.raises(ValueError, match=r"at least 2 dimensions, got \(3,\)"):
        RankBatchNorm(3)._check_input_dim(torch.zeros(3))
