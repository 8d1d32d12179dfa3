# SPDX-License-Identifier: Apache-2.0
"""Data preparation: annotations and images to shards, tokenizers, demo data. Command line: python -m data_prep."""
