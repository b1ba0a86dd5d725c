"""Clipping of each parameter's gradient, whole and from shards. Two ranks: tests/distributed/test_two_ranks.py."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain.engine.clipping import clip_each_parameter, clip_whole_gradient
from fasttrain.engine.shards import Shards
from fasttrain.engine.zero_files import contiguous_spans
from fasttrain.optim.layerwise import Piece
from tests.checkpoints import small_engine, train


def _reference(gradients, limit):
    """``utils.clip_gradients`` of facebookresearch/dino: every parameter by its own norm."""
    return [g * min(1.0, limit / (float(g.norm()) + 1e-6)) for g in gradients]


def _clipped(gradients, limit, shards=None):
    """Return the change of parameters (None: without gradient) by a step of SGD at a learning rate of 1."""
    parameters = [torch.zeros(2 if g is None else g.shape, dtype=torch.float64) for g in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.requires_grad_().grad = None if gradient is None else gradient.clone()
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    clip_each_parameter(optimizer, limit, None if shards is None else shards(*parameters))
    optimizer.step()
    return [-parameter.detach() for parameter in parameters]


def _random(shapes):
    generator = torch.Generator().manual_seed(0)
    return [
        10.0**k * torch.randn(shape, generator=generator, dtype=torch.float64) for k, shape in enumerate(shapes, -2)
    ]


def test_long_gradients_are_shortened_and_short_ones_stay():
    gradients = _random([(3, 4), (5,), (2, 2), ()])
    for clipped, expected in zip(_clipped(gradients, 0.5), _reference(gradients, 0.5), strict=True):
        torch.testing.assert_close(clipped, expected)


def test_parameter_without_gradient_does_not_move():
    gradient = torch.tensor([3.0, 0.0, 4.0], dtype=torch.float64)
    idle, clipped = _clipped([None, gradient], 1.0)
    torch.testing.assert_close(clipped, gradient / 5)
    assert not idle.any()
    assert not _clipped([None], 1.0)[0].any()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_fp16_limit_applies_to_the_unscaled_gradient(kind):
    gradients = [torch.tensor([3.0, 4.0]), torch.tensor([0.3, 0.4])]
    results = []
    for scale in (None, 65536.0):
        parameters = [torch.zeros_like(g).requires_grad_() for g in gradients]
        optimizer = kind(parameters, lr=1.0, fused=True)
        clip_each_parameter(optimizer, 2.0, None)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient * (scale or 1)
        scaler = torch.amp.GradScaler("cpu", init_scale=65536.0, enabled=scale is not None)
        scaler.scale(torch.ones(()))  # creates the scale's tensor
        scaler.step(optimizer)
        moments = [v for p in parameters for name, v in optimizer.state[p].items() if name.startswith("exp_avg")]
        results.append([p.detach().clone() for p in parameters] + moments)
    for unscaled, scaled in zip(*results, strict=True):
        torch.testing.assert_close(unscaled, scaled, rtol=1e-5, atol=0)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), st.integers(1, 4), st.integers(0, 3))
def test_shards_of_any_cut_are_clipped_like_whole_parameters(sizes, ranks, padding):
    gradients = _random([(n,) for n in sizes])
    flat, names = torch.cat(gradients), [str(number) for number in range(len(sizes))]
    shard = -(-len(flat) // ranks)
    parts = [flat[rank * shard : (rank + 1) * shard] for rank in range(ranks)]
    cut = contiguous_spans(dict(zip(names, sizes, strict=True)), shard, ranks)
    squares = [float(g.square().sum()) for g in gradients]  # the result of the reduction over ranks
    clipped = []
    for rank, part in enumerate(parts):
        layout = [Piece(*cut[name][rank]) for name in names]

        def shards(shard, layout=layout):
            result = Shards({shard: layout}, None, torch.device("cpu"))
            object.__setattr__(result, "sum_over_ranks", lambda x: x.copy_(torch.tensor(squares, dtype=x.dtype)))
            return result

        padded = torch.cat([part, torch.full((padding,), float("nan"), dtype=torch.float64)])
        clipped.append(_clipped([padded], 0.3, shards)[0][: len(part)])
    torch.testing.assert_close(torch.cat(clipped), torch.cat(_reference(gradients, 0.3)))


@pytest.mark.parametrize("scale", [1.0, 65536.0])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("limit", [0.3, 30.0])
def test_whole_gradient_is_clipped_like_torchs(limit, known, scale):
    gradients = _random([(3, 4), (5,), (1,)])
    parameters = [torch.zeros_like(g).requires_grad_() for g in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
    clipped = [gradient * scale for gradient in gradients]
    clip_whole_gradient(clipped, limit, norm if known else None, scale)
    torch.testing.assert_close([gradient / scale for gradient in clipped], [p.grad for p in parameters])


def test_engine_clips_at_stage_0_without_deepspeed(monkeypatch):
    """DeepSpeed computed the norm again: 9 of the milliseconds of a ViT-tiny's step."""
    seen = []
    with small_engine(clip_grad=1e-3, optimizer="sgd") as engine:
        assert engine.deepspeed.gradient_clipping() == 0
        engine.optimizer.register_step_pre_hook(
            lambda optimizer, *_: seen.append([p.grad for g in optimizer.param_groups for p in g["params"]])
        )
        train(engine, [0])
    norm = torch.stack([g.norm() for g in seen[0] if g is not None]).norm()
    torch.testing.assert_close(norm, torch.tensor(1e-3), rtol=2e-3, atol=0)
