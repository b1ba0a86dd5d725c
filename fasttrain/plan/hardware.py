"""GPUs and their links, from data sheets. Nothing here was measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """A GPU on a board of eight."""

    name: str
    memory: float
    """Bytes that torch reports as the device's total, from public error messages. The nominal size is larger."""
    flops: float
    """Operations per second of dense products in bf16 or fp16 with fp32 sums."""
    flops_fp32: float
    """Operations per second in fp32 without tensor cores, which is torch's default."""
    bandwidth: float
    """Memory bandwidth, bytes per second."""
    nvlink: float
    """Bandwidth to the other GPUs of the node, bytes per second and direction."""
    network: float
    """InfiniBand bandwidth out of a DGX node of 8 GPUs, bytes per second and direction, all adapters together."""


# NVIDIA's data sheets: A100 (2021: SXM4 40 and 80 GB, 312 TFLOP/s bf16, 19.5 fp32, 1,555 and 2,039 GB/s, NVLink 600
# GB/s both ways), H100 SXM (2022: 989, 67, 3.35 TB/s, 900 GB/s), H200 SXM (2023: as H100, 4.8 TB/s), HGX B200 (2025:
# 2,250 dense, 75, 7.7 TB/s, 1.8 TB/s). DGX A100: 8 x HDR InfiniBand of 200 Gb/s; DGX H100, H200, B200: 8 x NDR of 400.
_A100 = {"flops": 312e12, "flops_fp32": 19.5e12, "nvlink": 300e9, "network": 8 * 25e9}
_HOPPER = {"flops": 989e12, "flops_fp32": 67e12, "nvlink": 450e9, "network": 8 * 50e9}
# Seconds for which NCCL 2.28 expects a small message (protocol LL) to wait at a GPU: over NVLink, and over the network
# in a tree and in a ring (ncclTunerConstantsDefaults).
_HOP_IN_NODE, _HOP_OF_TREE, _HOP_OF_RING = 0.6e-6, 5.0e-6, 2.7e-6
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40", memory=39.4 * GIB, bandwidth=1.555e12, **_A100),
        Gpu("a100-80", memory=79.1 * GIB, bandwidth=2.039e12, **_A100),
        Gpu("h100", memory=79.1 * GIB, bandwidth=3.35e12, **_HOPPER),
        Gpu("h200", memory=139.8 * GIB, bandwidth=4.8e12, **_HOPPER),
        Gpu(
            "b200",
            memory=178.3 * GIB,
            flops=2250e12,
            flops_fp32=75e12,
            bandwidth=7.7e12,
            nvlink=900e9,
            network=8 * 50e9,
        ),
    )
}


def gpu_named(name: str) -> Gpu:
    """Return the GPU of a name. Raise ConfigError if the table does not have it."""
    if name not in GPUS:
        raise ConfigError(f"--gpu: must be one of {', '.join(GPUS)}, got {name!r}.")
    return GPUS[name]


@dataclass(frozen=True)
class Cluster:
    """The machines, and the fractions of their peaks that the forecast assumes."""

    gpu: Gpu
    nodes: int = 1
    gpus_per_node: int = 8
    flops_fraction: float = 0.5
    """Achieved fraction of the peak of products."""
    bandwidth_fraction: float = 0.8
    """Achieved fraction of the memory bandwidth."""
    link_fraction: float = 0.8
    """Achieved fraction of the links' bandwidth."""
    latency: float = 30e-6
    """Seconds that a collective operation takes to start on every GPU."""
    host: float = 18.3e-6
    """Seconds that the host needs to call an operator and start its kernels (bench.scale.host_time)."""
    host_update: float = 69e-6
    """Seconds that the host needs to clip, step and average a trained tensor."""
    host_zero3: float = 598e-6
    """Further seconds that DeepSpeed's hooks need at a call of a module with weights at ZeRO 3."""
    copy: float = 20e9
    """Bytes per second from a GPU to the host, for checkpoints."""
    reserve: float = 3 * GIB
    """Bytes for the CUDA context, NCCL, workspaces of libraries, fragmentation and DALI's buffers."""

    @property
    def world(self) -> int:
        """GPUs of all nodes."""
        return self.nodes * self.gpus_per_node

    @property
    def usable(self) -> float:
        """Bytes per GPU that a run can use."""
        return self.gpu.memory - self.reserve

    @property
    def link(self) -> float:
        """Bytes per second and direction of the slowest link of a ring through all GPUs.

        With several nodes, NCCL runs one ring per network adapter. Together they use the whole network of a node.
        """
        nvlink = self.gpu.nvlink
        return nvlink if self.nodes == 1 else min(nvlink, self.gpu.network * self.gpus_per_node / 8)

    def seconds(self, kind: str, bytes: float, messages: int = 1) -> float:
        """Return the time of ring collectives. An all-reduce sends the data twice, all others once.

        A message also waits for the GPUs that pass it on: as a tree over the nodes in an all-reduce, else as a ring.
        """
        if self.world == 1:
            return 0.0
        passes = 2 if kind == "all_reduce" else 1
        share = (self.world - 1) / self.world
        return passes * share * bytes / (self.link * self.link_fraction) + messages * (self.latency + self._hops(kind))

    def _hops(self, kind: str) -> float:
        within = self.gpus_per_node - 1
        if kind == "all_reduce":
            return 2 * (within * _HOP_IN_NODE + math.log2(self.nodes) * _HOP_OF_TREE)
        between = 0 if self.nodes == 1 else self.nodes
        return self.nodes * within * _HOP_IN_NODE + between * _HOP_OF_RING

    def roofline(self, flops: float, bytes: float, precision: str) -> float:
        """Return the seconds of an operator: the larger of its time for products and for memory."""
        peak = self.gpu.flops_fp32 if precision == "fp32" else self.gpu.flops
        return max(flops / (peak * self.flops_fraction), bytes / (self.gpu.bandwidth * self.bandwidth_fraction))
