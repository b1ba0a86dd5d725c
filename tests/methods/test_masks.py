"""Masks are blocks of the wanted size, balanced over a batch, and a function of seed, step, place and view."""

import numpy as np
import pytest
import torch

from fasttrain.methods.masks import MaskedPatches, Masking, masked_patches, no_masks

_HALF = ((0.5, 0.0, 0.0), (0.5, 0.1, 0.5))
_DINOV2 = Masking("mask_ratio_min_max", _HALF, least=4)
_IBOT = Masking("pred_ratio", ((0.5, 0.0, 0.0), (0.5, 0.1, 0.5)))
_GROUPS = [(2, (14, 14))]


def _draw(masking=_DINOV2, groups=_GROUPS, *, seed=0, step=0, first=0, batch=64):
    return masked_patches(masking, groups, seed=seed, step=step, first=first, batch=batch)


@pytest.mark.parametrize("masking", [_DINOV2, _IBOT, Masking("pred_ratio", _HALF, "rand")], ids=["v2", "ibot", "rand"])
def test_fractions_are_those_of_the_paper(masking):
    fractions = torch.cat([_draw(masking, step=step).masks[0].double().mean(1) for step in range(40)])
    masked = fractions[fractions > 0]
    assert len(masked) / len(fractions) == pytest.approx(0.5, abs=0.01)
    assert 0.05 < masked.min() < 0.13
    assert 0.47 < masked.max() <= 0.5
    assert masked.mean() == pytest.approx(0.3, abs=0.01)


def test_every_part_of_a_batch_has_about_the_same_number_of_rows():
    """So ranks wait little for each other. Independent draws of 64 images differ by 10 %."""
    counts = [_draw(step=step, first=64 * rank).count for step in range(10) for rank in range(4)]
    assert np.std(counts) / np.mean(counts) < 0.04


def test_masks_of_a_batch_do_not_depend_on_the_ranks():
    whole, parts = _draw(), [_draw(first=first, batch=16) for first in range(0, 64, 16)]
    views = [part.masks[0].view(2, 16, -1) for part in parts]
    assert torch.equal(torch.cat(views, 1), whole.masks[0].view(2, 64, -1))
    assert sum(part.count for part in parts) == whole.count


def test_other_seeds_steps_and_views_have_other_masks():
    one = _draw()
    assert torch.equal(one.masks[0], _draw().masks[0])
    for other in (_draw(seed=1), _draw(step=1), _draw(first=1)):
        assert not torch.equal(one.masks[0], other.masks[0])
    first, second = one.masks[0].view(2, 64, -1)
    assert 0.1 < ((first.any(1) & second.any(1)).float().mean()) < 0.45
    both = [_draw(step=step).masks[0].view(2, 64, -1).any(2).all(0).float().mean() for step in range(40)]
    assert np.mean(both) == pytest.approx(0.25, abs=0.03)  # as if the views were independent


def test_masks_are_blocks_in_the_shape_of_the_crop():
    (mask,) = _draw(Masking("x", ((1.0, 0.3, 0.3),), least=4), [(1, (6, 20))], batch=8).masks
    for one in mask.view(8, 6, 20).int():
        neighbours = (one[:, 1:] * one[:, :-1]).sum() + (one[1:] * one[:-1]).sum()
        assert neighbours > 1.2 * one.sum()  # single patches would have 0.5 each


def test_rows_and_weights_follow_from_the_masks():
    drawn = _draw(groups=[(1, (14, 14)), (1, (7, 7))], batch=6)
    flat = torch.cat([mask.flatten() for mask in drawn.masks])
    assert torch.equal(drawn.rows, flat.nonzero().flatten())
    counts = torch.cat([mask.sum(1) for mask in drawn.masks])
    assert drawn.weight.sum() == pytest.approx((counts > 0).double().mean().item())
    expected = torch.cat([torch.full((int(n),), 1 / (12 * int(n)), dtype=torch.float64) for n in counts if n])
    torch.testing.assert_close(drawn.weight, expected)
    assert drawn.count == len(flat.nonzero()) > 0


def test_batch_without_masks_has_one_row_of_weight_0():
    for drawn in (no_masks(_GROUPS, 3), _draw(Masking("x", ((1.0, 0.0, 0.0),)), batch=3)):
        assert isinstance(drawn, MaskedPatches)
        assert (drawn.count, drawn.rows.tolist(), drawn.weight.tolist()) == (0, [0], [0.0])
        assert not drawn.masks[0].any()
        assert drawn.masks[0].shape == (6, 196)


@pytest.mark.parametrize(
    ("ranges", "grid", "message"),
    [
        (((1.0, 0.3, 1.0),), (4, 4), "must leave patches"),
        (((1.0, -0.1, 0.3),), (4, 4), "must leave patches"),
        (((1.0, 0.1, 0.2),), (2, 2), "masks no patch, .*2 x 2"),
    ],
)
def test_masks_of_all_or_no_patches_are_refused(ranges, grid, message):
    with pytest.raises(ValueError, match=f"^--pred_ratio: {message}"):
        Masking("pred_ratio", ranges).check([grid])
