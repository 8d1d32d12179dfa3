# SPDX-License-Identifier: Apache-2.0
"""Peak FLOP/s of devices, for utilisation. A device that is not listed gets no figure; none is guessed.

Names are those of torch.cuda.get_device_name(), whole: a MIG slice, a PCIe or an NVL card of the same chip has
another peak under a longer name. Source: NVIDIA's data sheets, dense bf16 (half of the figure with sparsity)."""

_BF16_PEAK = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device_name: str | None, *, dtype: str) -> float | None:
    """FLOP/s of one device at dense matrix products. None on a CPU (no name), for a device that is not listed, and for
    any dtype but bf16."""
    return _BF16_PEAK.get(device_name or "") if dtype == "bf16" else None
