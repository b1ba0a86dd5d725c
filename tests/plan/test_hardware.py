"""GPUs, links and rooflines."""

import pytest

from fasttrain.errors import ConfigError
from fasttrain.plan.hardware import GIB, GPUS, Cluster, gpu_named

_H100 = GPUS["h100"]
_IDEAL = {"flops_fraction": 1.0, "bandwidth_fraction": 1.0, "link_fraction": 1.0, "latency": 0.0}


def test_gpus_are_in_order_and_named():
    for name in ("memory", "flops", "flops_fp32", "bandwidth", "nvlink", "network"):
        values = [getattr(gpu, name) for gpu in GPUS.values()]
        assert values == sorted(values)
        assert values[0] > 0
    with pytest.raises(ConfigError, match=r"--gpu: .*a100-40.*b200.*'h300'"):
        gpu_named("h300")


def test_rings_use_nvlink_in_a_node_and_the_network_between():
    one, two = (Cluster(_H100, nodes, 8, **_IDEAL) for nodes in (1, 2))
    assert one.seconds("all_reduce", 8e9) == pytest.approx(2 * 7 / 8 * 8e9 / 450e9, rel=1e-3)
    assert one.seconds("all_gather", 8e9) == pytest.approx(7 / 8 * 8e9 / 450e9, rel=1e-3)
    assert two.seconds("reduce_scatter", 8e9) == pytest.approx(15 / 16 * 8e9 / 400e9, rel=1e-2)
    assert Cluster(_H100, 2, 4, **_IDEAL).link == 200e9  # half of the adapters
    assert Cluster(_H100, 1, 1).seconds("all_reduce", 1e9, messages=100) == 0


@pytest.mark.parametrize(
    ("kind", "nodes", "microseconds"),
    [
        ("all_reduce", 1, 10 + 2 * 7 * 0.6),
        ("all_reduce", 8, 10 + 2 * (7 * 0.6 + 3 * 5)),
        ("all_gather", 1, 10 + 7 * 0.6),
        ("all_gather", 8, 10 + 8 * 7 * 0.6 + 8 * 2.7),
    ],
)
def test_small_messages_wait_at_each_gpu(kind, nodes, microseconds):
    seconds = Cluster(_H100, nodes, 8, latency=1e-5).seconds(kind, 0, messages=100)
    assert seconds == pytest.approx(100e-6 * microseconds)


def test_roofline_is_the_larger_of_two_times():
    cluster = Cluster(_H100, **_IDEAL)
    assert cluster.roofline(989e12, 3.35e12 / 2, "bf16") == pytest.approx(1)
    assert cluster.roofline(989e12 / 2, 3.35e12, "bf16") == pytest.approx(1)
    assert cluster.roofline(67e12, 0, "fp32") == pytest.approx(1)
    assert Cluster(_H100, flops_fraction=0.5).roofline(989e12, 0, "fp16") == pytest.approx(2)


def test_usable_memory_excludes_the_reserve():
    assert Cluster(_H100, reserve=2 * GIB).usable == _H100.memory - 2 * GIB
    assert Cluster(_H100, 3, 4).world == 12
