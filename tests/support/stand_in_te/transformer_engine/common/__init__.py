# SPDX-License-Identifier: Apache-2.0
"""Stand-in, see transformer_engine/__init__.py."""

from transformer_engine.common import recipe

__all__ = ["recipe"]
