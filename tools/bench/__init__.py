# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: `python -m tools.bench.NAME --out DIR` writes JSON and prints a Markdown table."""
