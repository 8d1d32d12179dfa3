# SPDX-License-Identifier: Apache-2.0
"""Stand-in, see transformer_engine/__init__.py."""

import torch


class Sequential(torch.nn.Sequential):
    """Only there to be derived from."""


class FusibleOperation(torch.nn.Module):
    """Only there to be named."""
