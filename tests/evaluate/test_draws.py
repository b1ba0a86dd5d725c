"""The same fraction of every class, at least one, and another draw for another seed."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain.evaluate.draws import class_balanced, held_out

_LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=80).map(torch.tensor)


@given(labels=_LABELS, fraction=st.floats(0.01, 1), seed=st.integers(0, 9))
@settings(deadline=None)
def test_every_class_gives_its_fraction(labels, fraction, seed):
    rows = class_balanced(labels, fraction, seed)
    assert rows.tolist() == sorted(set(rows.tolist()))
    for label in labels.unique():
        count = int((labels == label).sum())
        assert int((labels[rows] == label).sum()) == max(1, round(fraction * count))


@given(labels=_LABELS, seed=st.integers(0, 9))
@settings(deadline=None)
def test_a_split_has_every_row_once_and_fits_on_every_class(labels, seed):
    fitted, held = held_out(labels, seed=seed)
    assert set(labels[fitted].tolist()) == set(labels.tolist())
    if labels.bincount().max() == 1:
        assert fitted.tolist() == held.tolist() == list(range(len(labels)))
    else:
        assert sorted(fitted.tolist() + held.tolist()) == list(range(len(labels)))
        assert len(held) > 0


def test_draws_differ_by_seed_and_not_otherwise():
    labels = torch.arange(300) % 3
    first = class_balanced(labels, 0.1, 0)
    assert torch.equal(first, class_balanced(labels, 0.1, 0))
    assert not torch.equal(first, class_balanced(labels, 0.1, 1))
