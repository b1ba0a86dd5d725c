import pytest
import torch

from fasttrain.losses.base import Loss, default_group, unit_rows
from tests.losses.pairs import draw


def test_rows_have_unit_norm_and_keep_their_type():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        rows = unit_rows(draw(6, 9).to(dtype), "x")
        assert rows.dtype == dtype
        torch.testing.assert_close(rows.double().norm(dim=1), torch.ones(6).double(), rtol=0.01, atol=0)


def test_fp16_rows_whose_squares_overflow_are_normalised():
    rows = unit_rows(torch.full((1, 16), 60000.0, dtype=torch.float16), "x")
    assert torch.equal(rows, torch.full((1, 16), 0.25, dtype=torch.float16))


def test_a_lone_process_gathers_nothing():
    assert default_group(True) is None
    assert Loss(True, "auto").group is None


def test_a_torch_without_ranks_refuses_to_gather(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    with pytest.raises(ValueError, match="gather_distributed"):
        Loss(True, "auto")
    Loss(False, "auto")
