"""The checks for real GPUs, small and interpreted: they pass where nothing is wrong, and see what is."""

import pytest
import torch

from tests.kernels.prototypes import stress

_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Sinkhorn takes scores, so it has no rows that could be strided.
_APPLICABLE = [
    (use, kind)
    for use in stress.USES
    for kind in stress.KINDS
    if not (use.startswith("sinkhorn") and kind == "strided rows")
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("use", "kind"), _APPLICABLE)
def test_passes_where_nothing_is_wrong(use, kind, dtype, monkeypatch):
    monkeypatch.setattr(stress, "REPEATS", 2)
    stress.KINDS[kind](use, (3, 2, 3, 21, 20), dtype, "one a view", _DEVICE)


def test_more_teachers_than_views_and_more_rows_than_prototypes():
    for center in stress.CENTERS:
        stress.reference("cross-entropy and entropy", (1, 2, 5, 3, 17), torch.float32, center, _DEVICE)


@pytest.mark.parametrize("use", stress.USES)
def test_what_is_wrong_is_seen(use):
    drawn = stress.inputs(use, (3, 2, 3, 21, 20), torch.float32)
    expected = stress.results(use, "eager", stress.exact(drawn))
    stress.compare(expected, expected, torch.float32, use)
    for part, value in expected.items():
        with pytest.raises(AssertionError, match=f"{use}, {part}: RMS ratio"):
            stress.compare(expected | {part: 1.001 * value}, expected, torch.float32, use)


def test_scores_reach_both_forms_of_sinkhorn():
    for use, apart in (("sinkhorn", (20, 80)), ("sinkhorn, far apart", (80, 201))):
        scores = stress.inputs(use, (3, 2, 3, 21, 20), torch.float32)["scores"]
        assert apart[0] < (scores.max() - scores.min()) / 0.05 < apart[1]
