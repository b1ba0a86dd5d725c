"""The checks for GPUs, on small sizes and interpreted: they accept correct kernels, and detect errors."""

import pytest
import torch

from tests.kernels.similarity import stress, uses

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "use"),
    [
        ("reference", "rows with bias"),
        ("same bits", "self with bias"),
        ("several blocks of rows", "self without own"),
        ("several blocks of rows", "both directions"),
        ("offsets beyond 2^31", "rows"),
        *(("learnt scale, strided rows", use) for use in stress.LEARNT),
    ],
)
def test_check_accepts_correct_kernels(kind, use, dtype, monkeypatch):
    monkeypatch.setattr(stress, "REPEATS", 2)
    stress.KINDS[kind](use, 70, 45, 20, dtype, 10.0, True, DEVICE)


@pytest.mark.parametrize("use", stress.LARGE)
def test_chunked_results_equal_the_reference(use):
    x, y = uses.rows(25, 6, 0), uses.rows(17, 6, 1)
    symmetric = use == "self without own"
    parts = stress.chunked_results(x, x if symmetric else y, 8.0, symmetric, chunk=10)
    expected = uses.results(use, "eager", x, y, y[:, 0], 8.0, True)
    assert parts.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-12, atol=1e-12)


def test_other_bits_are_detected(monkeypatch):
    calls = iter(range(9))
    monkeypatch.setattr(stress, "results", lambda *_: {"lse 0": torch.tensor([1.0, float(next(calls) > 2)])})
    with pytest.raises(AssertionError, match="call 3 gave 1 other numbers than call 0"):
        stress.same_bits("rows", 3, 3, 2, torch.float32, 1.0, True, "cpu")
