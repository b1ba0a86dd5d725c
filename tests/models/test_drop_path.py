"""Stochastic depth that computes a part of the samples."""

import copy

import pytest
import torch
from torch import nn

from fasttrain.models.architectures import checkpoint_activations, create_backbone
from fasttrain.models.drop_path import drop_samples, residual
from fasttrain.models.teacher import make_teacher

_VITS = {"vit_tiny": {"patch_size": 8}, "eva02_tiny_patch14_224": {}}


def _pair(arch, rate=0.5):
    torch.manual_seed(0)
    plain = create_backbone(arch, img_size=28 if arch != "vit_tiny" else 32, **_VITS[arch]).double()
    dropping = copy.deepcopy(plain)
    drop_samples(dropping, rate)
    return plain, dropping


def test_residual_has_the_expectation_of_stochastic_depth():
    x = torch.randn(6, 3, dtype=torch.float64)
    torch.manual_seed(1)
    mean = torch.stack([residual(x, torch.sin, 0.5) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, x + x.sin(), atol=0.06, rtol=0)  # four standard errors of a scale of 1


@pytest.mark.parametrize(("batch", "rate", "kept"), [(8, 0.3, 5), (4, 0.99, 1), (8, 0.0, 8)])
def test_residual_computes_only_the_kept_samples(batch, rate, kept):
    x, seen = torch.randn(batch, 2, dtype=torch.float64), []
    out = residual(x, lambda part: (seen.append(len(part)), part)[1], rate)
    assert seen == [kept]
    changed = (out - x).abs().sum(1) > 0
    assert changed.sum() == kept
    torch.testing.assert_close(out[changed], x[changed] * (1 + batch / kept))


@pytest.mark.parametrize("arch", _VITS)
def test_evaluation_and_the_teacher_equal_the_plain_network(arch):
    plain, dropping = _pair(arch)
    assert list(plain.state_dict()) == list(dropping.state_dict())
    x = torch.randn(4, 3, *[28 if arch != "vit_tiny" else 32] * 2, dtype=torch.float64)
    torch.testing.assert_close(dropping.eval()(x), plain.eval()(x))
    assert not torch.allclose(dropping.train()(x), plain(x))
    torch.testing.assert_close(make_teacher(dropping).train()(x), plain(x))


@pytest.mark.parametrize("arch", _VITS)
def test_gradients_equal_those_of_recomputed_blocks(arch):
    _, dropping = _pair(arch)
    recomputing = copy.deepcopy(dropping)
    checkpoint_activations(recomputing)
    x = torch.randn(4, 3, *[28 if arch != "vit_tiny" else 32] * 2, dtype=torch.float64)
    for network in (dropping, recomputing):
        torch.manual_seed(3)
        network.train()(x).square().sum().backward()
    for one, two in zip(dropping.parameters(), recomputing.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


def test_a_network_without_vit_blocks_is_refused():
    with pytest.raises(ValueError, match="--drop_path_subset: Linear"):
        drop_samples(nn.Linear(2, 2), 0.1)
