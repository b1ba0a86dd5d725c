"""Time the similarity kernels and their peers: one forward and backward pass per operation and size.

    pip install -e '.[bench]'
    pytest bench/ --benchmark-only --benchmark-group-by=group --benchmark-columns=min,median,rounds

pytest-benchmark times one contestant after the other. For ratios on a machine whose speed drifts, use paired.py.
extra_info has ``peak_mib`` beyond the inputs and ``peak_over_<baseline>`` relative to that peer's peak. For our NT-Xent
``pct_sgemm`` has its operations per second relative to a plain matrix product.
"""

from __future__ import annotations

import pytest

from bench.peers.similarity import BIDIRECTIONAL, INFO_NCE, INFO_NCE_QUEUE, NT_XENT, VMF_ENTROPY


def grid(operation):
    """Parametrize over every contestant of every case, case by case."""
    pairs = [
        pytest.param(case, name, id=f"{case.name}-{name}".replace(" ", "-").replace("=", ""))
        for case in operation.cases
        for name in operation.contestants
    ]
    return pytest.mark.parametrize(("case", "name"), pairs)


@grid(NT_XENT)
def test_nt_xent(race, case, name):
    race(NT_XENT, name, case)


@grid(INFO_NCE)
def test_info_nce(race, case, name):
    race(INFO_NCE, name, case)


@grid(INFO_NCE_QUEUE)
def test_info_nce_with_a_queue(race, case, name):
    race(INFO_NCE_QUEUE, name, case)


@grid(BIDIRECTIONAL)
def test_bidirectional(race, case, name):
    race(BIDIRECTIONAL, name, case)


@grid(VMF_ENTROPY)
def test_vmf_entropy(race, case, name):
    race(VMF_ENTROPY, name, case)
