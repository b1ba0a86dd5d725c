import pytest
import torch

from fasttrain.evaluate.spectrum import rankme


def test_a_line_has_rank_one_and_an_orthogonal_frame_all():
    assert rankme(torch.outer(torch.rand(50) + 1, torch.randn(6))) == pytest.approx(1, abs=1e-3)
    assert rankme(torch.eye(6)) == pytest.approx(6, abs=1e-3)


def test_scale_does_not_matter_and_zeros_do_not_break_it():
    z = torch.randn(40, 5)
    assert rankme(z) == pytest.approx(rankme(1000 * z))
    assert torch.isfinite(torch.tensor(rankme(torch.zeros(40, 5))))
