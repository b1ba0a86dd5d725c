"""LARS and LAMB: timm's on whole parameters, and the same step from shards, however the parameters are cut."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import timm.optim
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain.engine.shards import parameter_by_parameter
from fasttrain.optim.layerwise import Lamb, Lars, Piece
from fasttrain.optim.optimizers import parameter_groups

STEPS = 4
OURS = {"lars": Lars, "lamb": Lamb}
TIMMS = {
    "lars": lambda groups, **settings: timm.optim.Lars(groups, momentum=0.9, **settings),
    "lamb": lambda groups, **settings: timm.optim.Lamb(groups, max_grad_norm=None, **settings),
}
LR = {"lars": 3.0, "lamb": 0.05}


def _draw(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def _groups(*parameters):
    """Every role that the trainer has: with weight decay, without, and with again."""
    return [
        {"name": name, "params": list(held), "weight_decay": decay}
        for name, held, decay in zip(("decay", "no_decay", "prototypes"), parameters, (0.1, 0.0, 0.1), strict=True)
    ]


def _schedule(optimizer, step, name):
    """What the engine does before a step: prototypes are frozen at first, rates and weight decay move."""
    for group in optimizer.param_groups:
        frozen = group["name"] == "prototypes" and step == 0
        group["lr"] = 0.0 if frozen else LR[name] * (1 + step)
        if group["name"] != "no_decay":
            group["weight_decay"] = 0.1 + 0.2 * step


SHAPES = ([(3, 4), (1,), (5, 2, 2)], [(4,), (1,)], [(2, 3)])


def _train(optimizer, parameters, name, steps=range(STEPS)):
    for step in steps:
        _schedule(optimizer, step, name)
        for i, parameter in enumerate(parameters):
            parameter.grad = _draw([parameter.shape], 100 * step + i)[0]
        optimizer.step()


def _flat(groups):
    return [parameter for group in groups for parameter in group]


def _parameters(shapes=SHAPES):
    return [[x.requires_grad_() for x in _draw(group, i)] for i, group in enumerate(shapes)]


@pytest.mark.parametrize("name", OURS)
def test_whole_parameters_move_as_timm_s(name):
    ours, timms = _parameters(), _parameters()
    _train(OURS[name](_groups(*ours), lr=1), _flat(ours), name)
    _train(TIMMS[name](_groups(*timms), lr=1), _flat(timms), name)
    # The operations are the same in the same order; only the root of a square in fp64 is taken in between.
    for a, b in zip(_flat(ours), _flat(timms), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("zero", ["weight", "gradient"])
def test_a_norm_of_zero_scales_nothing_as_in_timm(name, zero):
    moved = []
    for made in (OURS[name], TIMMS[name]):
        weight = torch.nn.Parameter(torch.zeros(3) if zero == "weight" else torch.ones(3))
        weight.grad = torch.zeros(3) if zero == "gradient" else torch.ones(3)
        made([{"params": [weight], "weight_decay": 0.1}], lr=0.5).step()
        moved.append(weight.detach())
    assert torch.equal(*moved)
    assert moved[0].isfinite().all()


@pytest.mark.parametrize("name", OURS)
def test_steps_stay_scaled_where_a_schedule_takes_the_weight_decay_to_zero(name):
    linear, lr = torch.nn.Linear(4, 2), 4.8
    before = [parameter.detach().clone() for parameter in linear.parameters()]
    optimizer = OURS[name](parameter_groups(linear, 0.0), lr=lr)
    for parameter in linear.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    (weight, bias), share = before, {"lars": 0.001 * lr, "lamb": lr}[name]
    torch.testing.assert_close((linear.weight - weight).norm() / weight.norm(), torch.tensor(share))
    torch.testing.assert_close(bias - linear.bias, torch.full((2,), lr))  # as it is, without trust ratio


@pytest.mark.parametrize("name", OURS)
def test_gradients_stay_and_parameters_without_stay(name):
    a, b = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    a.grad = torch.ones(3)
    OURS[name]([{"params": [a, b], "weight_decay": 0.1}], lr=1).step()
    assert torch.equal(a.grad, torch.ones(3))
    assert torch.equal(b, torch.ones(3))
    assert not torch.equal(a, b)


class _Ranks:
    """Imaginary ranks, one thread each; ``sum_over_ranks`` of each is an all-reduce."""

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


def _end_to_end(numels, rank, count):
    """ZeRO-1 and 2: all parameters one after another, padded to equal shards. Layout and elements of a rank's shard."""
    size = -(-sum(numels) // (2 * count)) * 2
    pieces, offset = [], 0
    for numel in numels:
        start, stop = max(offset, rank * size), min(offset + numel, (rank + 1) * size)
        pieces.append(Piece(start - rank * size, stop - start) if stop > start else Piece(0, 0))
        offset += numel
    return pieces, size


def _by_parameter(numels, rank, count):
    """ZeRO-3: a part of every parameter, padded to equal parts."""
    parts = [(numel, -(-numel // count)) for numel in numels]
    return parameter_by_parameter(parts, rank), sum(part for _, part in parts)


def _spans(cut, numels, rank, count):
    """For every parameter, which of its elements a rank holds; ranks hold them in order."""
    before = [sum(cut(numels, r, count)[0][i].numel for r in range(rank)) for i in range(len(numels))]
    pieces, _ = cut(numels, rank, count)
    return [slice(b, b + piece.numel) for b, piece in zip(before, pieces, strict=True)]


def _shard(tensors, cut, rank, count):
    """A rank's flat shard of some tensors, NaN in the padding, and its layout."""
    numels = [x.numel() for x in tensors]
    pieces, size = cut(numels, rank, count)
    flat = torch.full((size,), torch.nan)
    for x, piece, span in zip(tensors, pieces, _spans(cut, numels, rank, count), strict=True):
        flat[piece.start : piece.start + piece.numel] = x.detach().flatten()[span]
    return flat, pieces


def _one_rank(name, cut, whole, rank, count, ranks):
    """Train this rank's shards with the gradients of the whole parameters; what each parameter's pieces became."""
    shards, layouts = [], {}
    for group in whole:
        flat, layout = _shard(group, cut, rank, count)
        shards.append(flat.requires_grad_())
        layouts[flat] = layout
    optimizer = OURS[name](_groups(*([shard] for shard in shards)), lr=1)
    optimizer.shard(layouts, ranks.sum_over_ranks(rank))
    for step in range(STEPS):
        _schedule(optimizer, step, name)
        number = 0
        for group, shard in zip(whole, shards, strict=True):
            gradients = [_draw([p.shape], 100 * step + number + i)[0] for i, p in enumerate(group)]
            number += len(group)
            shard.grad = _shard(gradients, cut, rank, count)[0]
        optimizer.step()
    state = [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    return shards, list(layouts.values()), state


_shapes = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=2).map(tuple), min_size=1, max_size=5)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(OURS)),
    st.sampled_from([_end_to_end, _by_parameter]),
    st.tuples(_shapes, _shapes, _shapes),
    st.integers(1, 4),
)
def test_shards_make_the_step_of_the_whole(name, cut, shapes, count):
    whole = _parameters(shapes)
    ranks = _Ranks(count)
    with ThreadPoolExecutor(count) as pool:
        tasks = [pool.submit(_one_rank, name, cut, _parameters(shapes), rank, count, ranks) for rank in range(count)]
        found = [task.result() for task in tasks]
    _train(OURS[name](_groups(*whole), lr=1), _flat(whole), name)
    assert ranks.reductions == [STEPS] * count  # all groups in one
    for g, group in enumerate(whole):
        held = [(shards[g].detach(), layouts[g]) for shards, layouts, _ in found]
        for i, parameter in enumerate(group):
            joined = torch.cat([flat.narrow(0, *layout[i]) for flat, layout in held])
            # What differs is the order in which a norm's squares are summed: a few units in the last place.
            torch.testing.assert_close(joined, parameter.detach().flatten(), rtol=2e-6, atol=2e-6)
        for flat, layout in held:
            assert flat.isnan().sum() == flat.numel() - sum(piece.numel for piece in layout)  # padding, and only it
    assert not any(value.isnan().any() for _, _, state in found for value in state)


def test_a_shard_of_which_nothing_is_known_is_refused():
    shard = torch.ones(3, requires_grad=True)
    shard.grad = torch.ones(3)
    optimizer = Lars([shard], lr=1)
    optimizer.shard({}, lambda squares: None)
    with pytest.raises(LookupError, match="no layout was given for a shard of 3 elements"):
        optimizer.step()


@pytest.mark.parametrize("setting", ["lr", "momentum", "weight_decay"])
def test_negative_settings_are_named(setting):
    with pytest.raises(ValueError, match=f"{setting} must be at least 0, got -1"):
        Lars([torch.ones(1)], **{setting: -1})


@pytest.mark.parametrize("name", OURS)
def test_a_state_of_timm_s_goes_on(name):
    """As checkpoints do that were written before these optimizers were."""
    runs = []
    for second in (TIMMS, OURS):
        parameters = _parameters()
        first = TIMMS[name](_groups(*parameters), lr=1)
        _train(first, _flat(parameters), name, range(2))
        optimizer = second[name](_groups(*parameters), lr=1)
        optimizer.load_state_dict(first.state_dict())
        _train(optimizer, _flat(parameters), name, range(2, STEPS))
        runs.append(_flat(parameters))
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_lamb_s_state_has_what_apex_reads():
    parameters = _parameters()
    optimizer = Lamb(_groups(*parameters), lr=1)
    _train(optimizer, _flat(parameters), "lamb", range(3))
    for group in optimizer.state_dict()["param_groups"]:
        assert (group["step"], group["bias_correction"], group["grad_averaging"]) == (3, True, True)
        assert {"lr", "betas", "eps", "weight_decay"} <= group.keys()


def test_a_closure_s_loss_is_returned():
    weight = torch.nn.Parameter(torch.ones(2))

    def closure():
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert Lars([weight], lr=0.1).step(closure) == 2
