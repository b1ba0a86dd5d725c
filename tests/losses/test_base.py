import pytest
import torch

from fasttrain import losses
from fasttrain.losses.base import Loss, default_group, unit_pair, unit_rows
from tests.losses.pairs import draw


def test_rows_have_unit_norm_and_keep_their_type():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        rows = unit_rows(draw(6, 9).to(dtype), "x")
        assert rows.dtype == dtype
        torch.testing.assert_close(rows.double().norm(dim=1), torch.ones(6).double(), rtol=0.01, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_row_of_zeros_stays_zero(dtype):
    assert torch.equal(unit_rows(torch.zeros(2, 3, dtype=dtype), "x"), torch.zeros(2, 3, dtype=dtype))


def test_fp16_rows_whose_squares_overflow_are_normalised():
    rows = unit_rows(torch.full((1, 16), 60000.0, dtype=torch.float16), "x")
    assert torch.equal(rows, torch.full((1, 16), 0.25, dtype=torch.float16))


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"query must be \[N, D\].*\(4,\)"):
        unit_rows(torch.zeros(4), "query")
    with pytest.raises(ValueError, match=r"out0 and out1 must have the same shape, got \(2, 3\) and \(4, 3\)"):
        unit_pair(torch.zeros(2, 3), torch.zeros(4, 3), "out0", "out1")
    with pytest.raises(ValueError, match=r"key must be floating point, got torch\.int64"):
        unit_rows(torch.ones(2, 2, dtype=torch.long), "key")


def test_a_lone_process_gathers_nothing():
    assert default_group(True) is None
    assert Loss(True, "auto").group is None


def test_a_torch_without_ranks_refuses_to_gather(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    with pytest.raises(ValueError, match="gather_distributed"):
        Loss(True, "auto")
    Loss(False, "auto")


@pytest.mark.parametrize(
    ("kind", "options", "inputs"),
    [
        (losses.NTXentLoss, {}, 2),
        (losses.NTXentLoss, {"memory_bank_size": (8, 3)}, 2),
        (losses.InfoNCELoss, {}, 2),
        (losses.InfoNCELoss, {}, 3),
        (losses.InfoNCELoss, {"symmetric": True}, 2),
        (losses.MoCoLoss, {"memory_bank_size": (8, 3)}, 2),
        (losses.MoCoV3Loss, {}, 4),
        (losses.EntropyReconstructionLoss, {}, 2),
        (losses.CMCLoss, {}, None),
        (losses.CMCMemoryLoss, {"num_images": 8, "dim": 3}, None),
    ],
)
def test_every_loss_hands_its_backend_to_the_kernels(kind, options, inputs):
    x = draw(4, 3)
    index = [torch.arange(4)] if kind is losses.CMCMemoryLoss else []
    arguments = [[x, x], *index] if inputs is None else [x] * inputs
    kind(**options)(*arguments)
    with pytest.raises(ValueError, match=r"backend must be one of .*'cuda'"):
        kind(**options, backend="cuda")(*arguments)
