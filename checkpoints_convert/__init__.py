# SPDX-License-Identifier: Apache-2.0
"""Conversion between Hugging Face folders and distributed checkpoints; see __main__.py for the commands."""
