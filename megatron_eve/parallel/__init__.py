# SPDX-License-Identifier: Apache-2.0
"""Layout, groups, each rank's slice of a pack."""

from megatron_eve import device

device.install()  # before megatron.core is imported by any module of this package
