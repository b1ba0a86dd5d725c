"""Triton launches on the current device. Tensors of another one would be read by their address there: wrong memory."""

from contextlib import contextmanager

import pytest
import torch

from fasttrain.kernels import (
    bidirectional_logsumexp,
    nearest_similarity,
    prototype_entropy,
    prototype_terms,
    row_logsumexp,
    siglip,
    sliced_characteristic,
)
from fasttrain.kernels.characteristic import launch as characteristic
from fasttrain.kernels.nearest import launch as nearest
from fasttrain.kernels.prototypes import launch as prototypes
from fasttrain.kernels.sigmoid import launch as sigmoid
from fasttrain.kernels.similarity import launch as similarity

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = {
    similarity: ("row_lse_kernel", "both_lse_kernel", "weighted_sum_kernel"),
    nearest: ("nearest_kernel",),
    characteristic: ("sums_kernel", "gradient_kernel"),
    sigmoid: ("sigmoid_kernel",),
    prototypes: ("attend_kernel",),
}


class Watched:
    """A kernel that notes whether its tensors' device was made the current one."""

    def __init__(self, kernel, current, launches):
        self.kernel, self.current, self.launches = kernel, current, launches

    def __getitem__(self, grid):
        def launch(x, *args, **options):
            self.launches.append(self.current[-1:] == [x.device])
            return self.kernel[grid](x, *args, **options)

        return launch


@pytest.fixture
def launches(monkeypatch):
    """Return a list for every kernel: for each of its launches, whether it was guarded."""
    current, made = [], {}

    @contextmanager
    def device_of(x):
        current.append(x.device)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for module, names in KERNELS.items():
        for name in names:
            made[name] = []
            monkeypatch.setattr(module, name, Watched(getattr(module, name), current, made[name]))
    return made


def test_every_launch_is_on_the_device_of_its_tensors(launches):
    x, w = (torch.eye(4, device=DEVICE).requires_grad_() for _ in range(2))
    row_logsumexp(x, x, scale=2.0, unit_norm=True, backend="triton").sum().backward()
    sum(lse.sum() for lse in bidirectional_logsumexp(x, w, scale=2.0, backend="triton")).backward()
    views = x.expand(2, 4, 4)
    sum(prototype_terms(views, views, w, w, student_temp=0.1, teacher_temp=0.1, backend="triton")).backward()
    sum(prototype_entropy(x, w, temp=0.1, backend="triton")).backward()
    nearest_similarity(x, backend="triton")
    siglip(x, w, scale=2.0, bias=-1.0, backend="triton")
    sliced_characteristic(x, w, backend="triton").backward()
    assert all(made and all(made) for made in launches.values()), launches
