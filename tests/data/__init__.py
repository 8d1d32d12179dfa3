# SPDX-License-Identifier: Apache-2.0
"""Tests of megatron_eve.data."""
