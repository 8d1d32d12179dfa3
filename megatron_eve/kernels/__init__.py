# SPDX-License-Identifier: Apache-2.0
"""GPU kernels of our own, each with a twin in PyTorch. Written in Triton; only modules in here import it."""
