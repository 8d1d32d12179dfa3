# SPDX-License-Identifier: Apache-2.0
"""The files that travel with a released checkpoint: configuration, modelling and processing for transformers.

They import torch, transformers, PIL and numpy only, so that a released folder loads anywhere with
`trust_remote_code=True`. automodel_layout.py copies them verbatim.
"""
