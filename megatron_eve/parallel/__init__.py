# SPDX-License-Identifier: Apache-2.0
"""Process groups of a layout."""

from megatron_eve import device

device.install()  # before megatron.core is imported by any module of this package
