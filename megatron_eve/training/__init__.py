# SPDX-License-Identifier: Apache-2.0
"""The training loop."""

from megatron_eve import device

device.install()  # before megatron.core is imported by any module of this package
