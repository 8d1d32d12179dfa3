# SPDX-License-Identifier: Apache-2.0
"""Asking a released model.

engine.py answers requests in batches with a cache, from the released weights alone, for megatron_eve.generate and the
server (serve.py). answers.py asks through transformers and the folder's own Python files, as its users do, for the
demo's evaluation. A test compares the two. More in docs/inference.md.
"""
