"""Draws have the same fraction of every class, and depend on the seed only."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain.evaluate.draws import class_balanced, held_out

_LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=80).map(torch.tensor)


@given(labels=_LABELS, fraction=st.floats(0.01, 1), seed=st.integers(0, 9))
@settings(deadline=None)
def test_class_balanced_takes_the_fraction_of_every_class(labels, fraction, seed):
    rows = class_balanced(labels, fraction, seed)
    assert rows.tolist() == sorted(set(rows.tolist()))
    for label in labels.unique():
        count = int((labels == label).sum())
        assert int((labels[rows] == label).sum()) == max(1, round(fraction * count))


@given(labels=_LABELS, seed=st.integers(0, 9))
@settings(deadline=None)
def test_held_out_splits_all_rows_and_fits_every_class(labels, seed):
    fitted, tuning = held_out(labels, seed=seed)
    assert set(labels[fitted].tolist()) == set(labels.tolist())
    if labels.bincount().max() == 1:
        assert fitted.tolist() == tuning.tolist() == list(range(len(labels)))
    else:
        assert sorted(fitted.tolist() + tuning.tolist()) == list(range(len(labels)))
        assert len(tuning) > 0


def test_class_balanced_depends_on_the_seed_only():
    first, again, other = (class_balanced(torch.arange(300) % 3, 0.1, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
