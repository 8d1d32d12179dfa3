# SPDX-License-Identifier: Apache-2.0
"""Asking a released model.

engine.py answers requests in batches with a cache, from the released weights alone: the path of megatron_eve.generate
and of the server (serve.py). answers.py asks through transformers and the folder's own Python files, as its users do:
the path of the demo's evaluation. A test holds the two against each other. docs/inference.md has the whole.
"""
