"""LARS and LAMB: timm's steps on whole parameters, and the same steps from shards, however the parameters are cut."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import timm.optim
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain.engine.zero_files import contiguous_spans, padded_spans
from fasttrain.optim.layerwise import Lamb, Lars, Piece
from fasttrain.optim.optimizers import parameter_groups

STEPS = 4
OURS = {"lars": Lars, "lamb": Lamb}
TIMMS = {
    "lars": lambda groups, **settings: timm.optim.Lars(groups, momentum=0.9, **settings),
    "lamb": lambda groups, **settings: timm.optim.Lamb(groups, max_grad_norm=None, **settings),
}
LR = {"lars": 3.0, "lamb": 0.05}
SHAPES = ([(3, 4), (1,), (5, 2, 2)], [(4,), (1,)], [(2, 3)])


def _draw(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def _parameters(shapes=SHAPES):
    """Return three groups of parameters. The second one of the first group is 0, as are the gradients of the third."""
    parameters = [_draw(group, i) for i, group in enumerate(shapes)]
    for zero in parameters[0][1:2]:
        zero.zero_()
    return [[x.requires_grad_() for x in group] for group in parameters]


def _groups(*parameters):
    """Three groups: with weight decay, without, and with."""
    return [{"params": list(p), "weight_decay": decay} for p, decay in zip(parameters, (0.1, 0.0, 0.1), strict=True)]


def _schedule(optimizer, step, name):
    """Do the engine's work before a step: the last group is frozen at first, and all values change."""
    for number, group in enumerate(optimizer.param_groups):
        group["lr"] = 0.0 if number == 2 and step == 0 else LR[name] * (1 + step)
        group["weight_decay"] = 0.0 if number == 1 else 0.1 + 0.2 * step


def _gradients(parameters, step):
    flat = [p for group in parameters for p in group]
    return [_draw([p.shape], 100 * step + i)[0] * float(i != 2) for i, p in enumerate(flat)]


def _train(optimizer, parameters, name, steps=range(STEPS)):
    for step in steps:
        _schedule(optimizer, step, name)
        flat = [p for group in parameters for p in group]
        for parameter, gradient in zip(flat, _gradients(parameters, step), strict=True):
            parameter.grad = gradient
        optimizer.step()


def _assert_same(one, other):
    for a, b in zip((p for group in one for p in group), (p for group in other for p in group), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("start", [0, 2], ids=["whole run", "timm's state after 2 steps"])
@pytest.mark.parametrize("name", OURS)
def test_whole_parameters_move_as_in_timm(name, start):
    """Older checkpoints hold timm's state. The operations differ only by a root of a square in fp64.

    A norm of 0, of a weight or a gradient, scales nothing.
    """
    ours, timms = _parameters(), _parameters()
    reference = TIMMS[name](_groups(*timms), lr=1)
    _train(reference, timms, name)
    optimizer = OURS[name](_groups(*ours), lr=1)
    if start:
        first = TIMMS[name](_groups(*ours), lr=1)
        _train(first, ours, name, range(start))
        optimizer.load_state_dict(first.state_dict())
    _train(optimizer, ours, name, range(start, STEPS))
    _assert_same(ours, timms)


@pytest.mark.parametrize("name", OURS)
def test_steps_stay_scaled_at_a_weight_decay_of_zero(name):
    linear, lr = torch.nn.Linear(4, 2), 4.8
    weight, bias = (parameter.detach().clone() for parameter in linear.parameters())
    optimizer = OURS[name](parameter_groups(linear, 0.0), lr=lr)
    for parameter in linear.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    share = {"lars": 0.001 * lr, "lamb": lr}[name]
    torch.testing.assert_close((linear.weight - weight).norm() / weight.norm(), torch.tensor(share))
    torch.testing.assert_close(bias - linear.bias, torch.full((2,), lr))  # no trust ratio
    assert torch.equal(linear.weight.grad, torch.ones(2, 4))


class _Ranks:
    """Imaginary ranks, one thread each, with an all-reduce that counts its calls."""

    def __init__(self, count):
        self.barrier, self.sent, self.reductions = Barrier(count), [None] * count, [0] * count

    def sum_over_ranks(self, rank):
        def replace(tensor):
            self.reductions[rank] += 1
            self.sent[rank] = tensor.clone()
            self.barrier.wait(30)
            tensor.copy_(torch.stack(self.sent).sum(0))
            self.barrier.wait(30)

        return replace


def _layouts(group, count, stage):
    """Return a group's layouts on all ranks, and the size of a shard, which ends in padding."""
    sizes = {str(number): parameter.numel() for number, parameter in enumerate(group)}
    part = sum(-(-n // count) for n in sizes.values()) if stage == 3 else -(-sum(sizes.values()) // (2 * count)) * 2
    cut = padded_spans(sizes, count) if stage == 3 else contiguous_spans(sizes, part, count)
    return [[Piece(*cut[name][rank]) for name in sizes] for rank in range(count)], part


def _shard(tensors, rank, layouts, size):
    """Return a rank's flat shard, with NaN in the padding. Ranks hold a parameter's elements in order."""
    flat = torch.full((size,), torch.nan)
    for number, (x, piece) in enumerate(zip(tensors, layouts[rank], strict=True)):
        offset = sum(layout[number].numel for layout in layouts[:rank])
        flat.narrow(0, *piece).copy_(x.detach().flatten()[offset : offset + piece.numel])
    return flat


def _one_rank(name, stage, shapes, rank, count, ranks):
    """Train a rank's shards with the gradients of the whole parameters. Return the shards, layouts and state."""
    whole = _parameters(shapes)
    cuts = [_layouts(group, count, stage) for group in whole]
    shards = [_shard(group, rank, *cut).requires_grad_() for group, cut in zip(whole, cuts, strict=True)]
    layouts = [cut[0][rank] for cut in cuts]
    optimizer = OURS[name](_groups(*([shard] for shard in shards)), lr=1)
    optimizer.shard(dict(zip(shards, layouts, strict=True)), ranks.sum_over_ranks(rank))
    for step in range(STEPS):
        _schedule(optimizer, step, name)
        gradients = iter(_gradients(whole, step))
        for group, shard, cut in zip(whole, shards, cuts, strict=True):
            shard.grad = _shard([next(gradients) for _ in group], rank, *cut)
        optimizer.step()
    return shards, layouts, [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]


_shapes = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=2).map(tuple), min_size=1, max_size=5)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(OURS)),
    st.sampled_from([2, 3]),
    st.tuples(_shapes, _shapes, _shapes),
    st.integers(1, 4),
)
def test_shards_make_the_step_of_whole_parameters(name, stage, shapes, count):
    whole, ranks = _parameters(shapes), _Ranks(count)
    with ThreadPoolExecutor(count) as pool:
        results = list(pool.map(lambda rank: _one_rank(name, stage, shapes, rank, count, ranks), range(count)))
    _train(OURS[name](_groups(*whole), lr=1), whole, name)
    assert ranks.reductions == [STEPS] * count  # one for all groups
    for g, group in enumerate(whole):
        local = [(shards[g].detach(), layouts[g]) for shards, layouts, _ in results]
        for i, parameter in enumerate(group):
            joined = torch.cat([flat.narrow(0, *layout[i]) for flat, layout in local])
            # The squares of a norm are summed in another order: a few units in the last place.
            torch.testing.assert_close(joined, parameter.detach().flatten(), rtol=2e-6, atol=2e-6)
        for flat, layout in local:
            assert flat.isnan().sum() == flat.numel() - sum(piece.numel for piece in layout)  # the padding only
    assert not any(value.isnan().any() for _, _, state in results for value in state)


def test_shard_without_a_layout_raises():
    shard = torch.ones(3, requires_grad=True)
    shard.grad = torch.ones(3)
    optimizer = Lars([shard], lr=1)
    optimizer.shard({}, lambda squares: None)
    with pytest.raises(LookupError, match="3 elements"):
        optimizer.step()


@pytest.mark.parametrize("setting", ["lr", "momentum", "weight_decay"])
def test_negative_setting_raises(setting):
    with pytest.raises(ValueError, match=f"{setting}: .*got -1"):
        Lars([torch.ones(1)], **{setting: -1})


def test_lambs_state_has_the_keys_that_apex_reads():
    parameters = _parameters()
    optimizer = Lamb(_groups(*parameters), lr=1)
    _train(optimizer, parameters, "lamb", range(3))
    for group in optimizer.state_dict()["param_groups"]:
        assert (group["step"], group["bias_correction"], group["grad_averaging"]) == (3, True, True)
        assert {"lr", "betas", "eps", "weight_decay"} <= group.keys()


def test_step_returns_a_closures_loss_and_skips_idle_parameters():
    weight, idle = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))

    def closure():
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert Lars([weight, idle], lr=0.1).step(closure) == 2
    assert torch.equal(idle, torch.ones(2))
    assert not torch.equal(weight, idle)
