# SPDX-License-Identifier: Apache-2.0
"""The model on megatron-core."""

from megatron_eve import device

device.install()  # before megatron.core is imported by any module of this package
