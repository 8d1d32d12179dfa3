# SPDX-License-Identifier: Apache-2.0
"""Asking a released model: batched answers (answers.py) and the command line (generate.py)."""
