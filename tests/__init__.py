# SPDX-License-Identifier: Apache-2.0
"""Tests; the tree mirrors the one of the packages. A regular package, so that no installed `tests` shadows it."""
