"""The checks for GPUs, on small sizes and interpreted: they accept correct kernels, and detect errors."""

import pytest
import torch

from tests.kernels.prototypes import stress

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", stress.KINDS)
@pytest.mark.parametrize("use", stress.USES)
def test_check_accepts_correct_kernels(use, kind, dtype, monkeypatch):
    if use.startswith("sinkhorn") and kind == "strided rows":
        pytest.skip("it takes scores, not rows")
    monkeypatch.setattr(stress, "REPEATS", 2)
    stress.KINDS[kind](use, (3, 2, 3, 21, 20), dtype, "one a view", DEVICE)


@pytest.mark.parametrize("center", stress.CENTERS)
@pytest.mark.parametrize("shape", [(1, 2, 5, 3, 17), (4, 2, 9, 150, 24)])
def test_check_accepts_other_shapes_and_centres(shape, center):
    for use in ("cross-entropy and entropy", "entropies"):
        stress.reference(use, shape, torch.float32, center, DEVICE)


@pytest.mark.parametrize("use", stress.USES)
def test_wrong_result_is_detected(use):
    drawn = stress.inputs(use, (3, 2, 3, 21, 20), torch.float32)
    expected = stress.results(use, "eager", stress.exact(drawn))
    stress.compare(expected, expected, torch.float32, use)
    for part, value in expected.items():
        with pytest.raises(AssertionError, match=f"{use}, {part}: RMS ratio"):
            stress.compare(expected | {part: 1.001 * value}, expected, torch.float32, use)
