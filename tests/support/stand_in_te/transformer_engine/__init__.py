# SPDX-License-Identifier: Apache-2.0
"""A stand-in for Transformer Engine 2.11 on machines without a GPU, for tests of what is built on its interfaces.

Signatures, parameter names and attributes are those of the release (tests/model/test_te_signatures.py compares them
with a table made from its sources); the arithmetic is PyTorch's. FP8 is imitated: inputs and weights are rounded to
float8_e4m3 with one scale a tensor. A test puts the folder above on sys.path of processes of its own, before they
import megatron-core, whose real wrappers then derive from these classes."""

from transformer_engine import common, pytorch

__version__ = "2.11.0"
__all__ = ["common", "pytorch"]
