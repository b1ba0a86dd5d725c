"""RankMe, alpha-ReQ and LiDAR on spectra that are known."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from fasttrain.evaluate.spectrum import alpha_req, lidar, rankme


def test_rankme_counts_directions_at_any_scale():
    assert rankme(torch.outer(torch.rand(50) + 1, torch.randn(6))) == pytest.approx(1, abs=1e-3)
    assert rankme(torch.eye(6)) == pytest.approx(6, abs=1e-3)
    z = torch.randn(40, 5)
    assert rankme(z) == pytest.approx(rankme(1000 * z))
    assert math.isfinite(rankme(torch.zeros(40, 5)))


def _with_spectrum(eigenvalues, rows=200):
    """Return rows whose covariance has these eigenvalues, up to a factor."""
    generator = torch.Generator().manual_seed(0)
    centred = torch.randn(rows, len(eigenvalues), generator=generator, dtype=torch.float64)
    left = torch.linalg.svd(centred - centred.mean(0), full_matrices=False).U
    right = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), generator=generator).double()).Q
    return left * torch.tensor(eigenvalues, dtype=torch.float64).sqrt() @ right + 3


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.5])
@pytest.mark.parametrize("dim", [5, 15, 80])
def test_alpha_req_is_the_exponent_of_the_spectrum(alpha, dim):
    assert alpha_req(_with_spectrum([j**-alpha for j in range(1, dim + 1)])) == pytest.approx(alpha, abs=1e-6)


def test_alpha_req_fits_the_middle_of_the_spectrum():
    bent = [100.0] * 10 + [j**-1.0 for j in range(11, 51)] + [1e-9] * 30
    assert alpha_req(_with_spectrum(bent)) == pytest.approx(1, abs=1e-6)


def test_alpha_req_of_fewer_than_three_directions_is_nan():
    assert math.isnan(alpha_req(_with_spectrum([1.0, 0.5, 0.0, 0.0])))
    assert math.isnan(alpha_req(torch.ones(20, 4)))


def test_lidar_matches_scipy_s_generalised_eigenvalues():
    rng = np.random.default_rng(0)
    views = rng.normal(size=(30, 1, 6)) * [3, 2, 1, 1, 0.1, 0] + 0.3 * rng.normal(size=(30, 4, 6))
    means = views.mean(1)
    inner = (views - means[:, None]).reshape(-1, 6)
    between, within = np.cov(means.T), inner.T @ inner / (30 * 3) + 1e-4 * np.eye(6)
    values = scipy.linalg.eigh(between, within, eigvals_only=True)
    p = values / values.sum() + 1e-8
    assert lidar(torch.tensor(views)) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-9)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_lidar_counts_the_directions_that_separate_images(rank):
    generator = torch.Generator().manual_seed(1)
    noise = 1e-3 * torch.randn(400, 5, 8, generator=generator)
    images = torch.randn(400, 1, rank, generator=generator) @ torch.eye(8)[:rank]
    assert lidar(images + noise) == pytest.approx(rank, rel=0.05)


@pytest.mark.parametrize("shape", [(1, 5, 4), (5, 1, 4)])
def test_lidar_of_one_image_or_one_view_is_refused(shape):
    with pytest.raises(ValueError, match="LiDAR"):
        lidar(torch.randn(shape))
