"""Clipping each parameter's gradient, whole and from shards; on two ranks it is tested in test_two_ranks.py."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain.engine.clipping import clip_each_parameter
from fasttrain.engine.shards import Shards
from fasttrain.optim.layerwise import Piece


def _written_out(gradients, limit):
    """``utils.clip_gradients`` of facebookresearch/dino: every parameter by its own norm."""
    return [g * min(1.0, limit / (float(g.norm()) + 1e-6)) for g in gradients]


def _clipped(parameters, limit, shards=None):
    """What a step of SGD at a learning rate of 1 subtracts."""
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    clip_each_parameter(optimizer, limit, shards)
    before = [p.detach().clone() for p in parameters]
    optimizer.step()
    return [old - new.detach() for old, new in zip(before, parameters, strict=True)]


def _random(shapes):
    generator = torch.Generator().manual_seed(0)
    return [
        10.0**k * torch.randn(shape, generator=generator, dtype=torch.float64) for k, shape in enumerate(shapes, -2)
    ]


def test_long_gradients_are_cut_short_ones_stay():
    gradients = _random([(3, 4), (5,), (2, 2), ()])
    parameters = [torch.zeros_like(g).requires_grad_() for g in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    for found, expected in zip(_clipped(parameters, 0.5), _written_out(gradients, 0.5), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_in_fp16_the_limit_is_of_the_gradient_and_not_of_the_scaled_one(kind):
    gradients = [torch.tensor([3.0, 4.0]), torch.tensor([0.3, 0.4])]
    moved = []
    for scale in (None, 65536.0):
        parameters = [torch.zeros_like(g).requires_grad_() for g in gradients]
        optimizer = kind(parameters, lr=1.0, fused=True)
        clip_each_parameter(optimizer, 2.0, None)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient * (scale or 1)
        scaler = torch.amp.GradScaler("cpu", init_scale=65536.0, enabled=scale is not None)
        scaler.scale(torch.ones(()))  # makes the scale's tensor
        scaler.step(optimizer)
        moved.append([p.detach().clone() for p in parameters] + [s for p in parameters for s in _moments(optimizer, p)])
    for one, other in zip(*moved, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=0)


def _moments(optimizer, parameter):
    return [value for name, value in optimizer.state[parameter].items() if name.startswith("exp_avg")]


def test_a_parameter_without_gradient_is_left_alone():
    with_gradient, without = torch.zeros(3, requires_grad=True), torch.zeros(2, requires_grad=True)
    with_gradient.grad = torch.tensor([3.0, 0.0, 4.0])
    found = _clipped([without, with_gradient], 1.0)
    torch.testing.assert_close(found[1], torch.tensor([0.6, 0.0, 0.8]))
    assert not found[0].any()
    assert _clipped([without], 1.0)[0].tolist() == [0, 0]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), st.integers(1, 4), st.integers(0, 3))
def test_shards_of_any_cut_give_what_whole_parameters_do(sizes, ranks, padding):
    gradients = _random([(n,) for n in sizes])
    flat = torch.cat(gradients)
    edges = [len(flat) * r // ranks for r in range(ranks + 1)]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    pieces = [  # of each rank: where its part of each parameter lies in its shard
        [
            Piece(max(start, low) - low, max(0, min(start + size, high) - max(start, low)))
            for start, size in zip(starts, sizes, strict=True)
        ]
        for low, high in pairwise(edges)
    ]
    squares = [  # what the reduction over ranks would find
        sum(
            float(flat[low + p.start : low + p.start + p.numel].square().sum())
            for low, p in zip(edges, of, strict=False)
        )
        for of in zip(*pieces, strict=True)
    ]
    found = []
    for (low, high), layout in zip(pairwise(edges), pieces, strict=True):
        shard = torch.zeros(high - low + padding, dtype=torch.float64, requires_grad=True)
        shard.grad = torch.cat([flat[low:high], torch.full((padding,), float("nan"), dtype=torch.float64)])
        shards = Shards({shard: layout}, None, torch.device("cpu"))
        object.__setattr__(shards, "sum_over_ranks", lambda x: x.copy_(torch.tensor(squares, dtype=x.dtype)))
        found.append(_clipped([shard], 0.3, shards)[0][: high - low])
    torch.testing.assert_close(torch.cat(found), torch.cat(_written_out(gradients, 0.3)))
