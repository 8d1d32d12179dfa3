# SPDX-License-Identifier: Apache-2.0
"""A peak is looked up, never guessed."""

import pytest

from megatron_eve import device
from megatron_eve.metrics.peak import peak_flops


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
    ],
)
def test_peak_of_a_device(name: str, tflops: int) -> None:
    assert peak_flops(name, dtype="bf16") == tflops * 1e12
    assert peak_flops(name, dtype="fp32") is None


@pytest.mark.parametrize(
    "name", [None, "", "NVIDIA A100-SXM4-80GB MIG 1g.10gb", "NVIDIA H100 NVL", "Tesla T4"]
)
def test_no_peak_for_what_is_not_listed(name: str | None) -> None:
    assert peak_flops(name, dtype="bf16") is None


def test_a_cpu_has_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "has_gpu", lambda: False)
    assert device.device_name() is None
