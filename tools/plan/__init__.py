# SPDX-License-Identifier: Apache-2.0
"""Which layouts of a recipe fit a cluster, how long a step would take, and what limits it. docs/planning.md"""
