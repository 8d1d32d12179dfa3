# SPDX-License-Identifier: Apache-2.0
"""What one row of a shard is: its sample (shards, row), its pixels and patches (image, pixels, patches), its tokens and
labels (conversation, tokenizer), and what becomes of a row that cannot be read (reading, quarantine).
"""
