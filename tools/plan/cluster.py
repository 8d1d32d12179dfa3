# SPDX-License-Identifier: Apache-2.0
"""GPUs and clusters, by data sheet.

Memory is the nominal size in units of 1e9 bytes, a little less than what the driver reports. Links are one direction of
one GPU (NVLink) or of one node (network). The network is a site's own: the default is two 200 Gbit/s adapters a node,
the number that the official scripts name; give --network-gbs."""

import difflib
import re
from dataclasses import dataclass, replace

from megatron_eve.errors import ConfigError
from megatron_eve.metrics.peak import peak_flops

WORKSPACE = 2.5e9
_DEFAULT_NETWORK = 50e9


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One kind of accelerator."""

    name: str
    device_name: str  # of torch.cuda.get_device_name(), the key of metrics/peak.py
    memory: float  # bytes
    memory_bytes_per_s: float
    nvlink_bytes_per_s: float  # one direction, all links of one GPU together

    @property
    def peak_flops(self) -> float:
        """Dense bf16 matrix products."""
        peak = peak_flops(self.device_name, dtype="bf16")
        assert peak is not None, f"metrics/peak.py does not list {self.device_name}"
        return peak


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            name="A100-40G",
            device_name="NVIDIA A100-SXM4-40GB",
            memory=40e9,
            memory_bytes_per_s=1.555e12,
            nvlink_bytes_per_s=300e9,
        ),
        Gpu(
            name="A100-80G",
            device_name="NVIDIA A100-SXM4-80GB",
            memory=80e9,
            memory_bytes_per_s=2.039e12,
            nvlink_bytes_per_s=300e9,
        ),
        Gpu(
            name="H100",
            device_name="NVIDIA H100 80GB HBM3",
            memory=80e9,
            memory_bytes_per_s=3.35e12,
            nvlink_bytes_per_s=450e9,
        ),
        Gpu(
            name="H200",
            device_name="NVIDIA H200",
            memory=141e9,
            memory_bytes_per_s=4.8e12,
            nvlink_bytes_per_s=450e9,
        ),
    )
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """`num_nodes` nodes of `gpus_per_node` GPUs."""

    num_nodes: int
    gpus_per_node: int
    gpu: Gpu
    network_bytes_per_s: float  # one direction of one node

    @property
    def num_gpus(self) -> int:
        return self.num_nodes * self.gpus_per_node

    def __str__(self) -> str:
        return f"{self.num_nodes}x{self.gpus_per_node}x{self.gpu.name}"

    def link(self, *, size: int, stride: int) -> float:
        """Bytes per second of a ring over a group of `size` ranks, `stride` apart, as each of its ranks sees it.

        Inside a node it is NVLink. A ring over several nodes leaves each of them once; the rings of the node's other
        ranks that are in other groups do so at the same time and share the network."""
        nvlink = self.gpu.nvlink_bytes_per_s
        if (size - 1) * stride < self.gpus_per_node:
            return nvlink
        in_node = max(1, self.gpus_per_node // stride)  # ranks of one group on one node
        return min(nvlink, self.network_bytes_per_s * in_node / self.gpus_per_node)


def parse_cluster(
    text: str, *, nvlink_gbs: float | None = None, network_gbs: float | None = None
) -> Cluster:
    """`16x8xA100-40G` -> the cluster; link speeds in GB/s (1e9 bytes, one direction) override the defaults.

    Raises: ConfigError for another form or an unknown GPU, naming the known ones.
    """
    match = re.fullmatch(r"(\d+)x(\d+)x(.+)", text)
    if match is None or not int(match[1]) or not int(match[2]):
        raise ConfigError(f"--cluster {text} is not NODESxGPUSxGPU, e.g. 16x8xA100-40G.")
    if match[3] not in GPUS:
        close = difflib.get_close_matches(match[3].upper(), GPUS, n=1, cutoff=0.3)
        hint = f"; did you mean {close[0]}?" if close else "."
        raise ConfigError(
            f"--cluster {text}: there is no GPU {match[3]}, there are {', '.join(GPUS)}{hint}"
        )
    for name, value in (("--nvlink-gbs", nvlink_gbs), ("--network-gbs", network_gbs)):
        if value is not None and not value > 0:
            raise ConfigError(f"{name} {value:g} is not a speed; give GB/s of one direction.")
    gpu = GPUS[match[3]]
    if nvlink_gbs is not None:
        gpu = replace(gpu, nvlink_bytes_per_s=nvlink_gbs * 1e9)
    return Cluster(
        num_nodes=int(match[1]),
        gpus_per_node=int(match[2]),
        gpu=gpu,
        network_bytes_per_s=_DEFAULT_NETWORK if network_gbs is None else network_gbs * 1e9,
    )
