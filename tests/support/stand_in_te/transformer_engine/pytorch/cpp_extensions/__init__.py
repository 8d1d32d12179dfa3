# SPDX-License-Identifier: Apache-2.0
"""Stand-in, see transformer_engine/__init__.py."""
