"""The similarity kernels against their peers: one forward and backward, by operation and size.

    pip install -e '.[bench]'
    pytest bench/ --benchmark-only --benchmark-group-by=group --benchmark-columns=min,median,rounds

pytest-benchmark times one contestant after the other; for ratios on a machine whose speed drifts, see paired.py. In
extra_info: ``peak_mib`` beyond the inputs, ``peak_over_<baseline>`` as a part of that peer's, and for our NT-Xent
``pct_sgemm``, its operations a second as a part of a plain matrix product's.
"""

from __future__ import annotations

import pytest

from bench.peers.similarity import BIDIRECTIONAL, INFO_NCE, INFO_NCE_QUEUE, NT_XENT, VMF_ENTROPY


def grid(operation):
    """Every contestant in every case, those of a case in turn."""
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
