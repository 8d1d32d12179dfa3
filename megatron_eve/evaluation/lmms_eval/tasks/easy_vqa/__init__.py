# SPDX-License-Identifier: Apache-2.0
"""easy-VQA's held-out questions as a task of lmms-eval with local data."""
