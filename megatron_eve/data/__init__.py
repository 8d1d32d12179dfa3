# SPDX-License-Identifier: Apache-2.0
"""From MDS shards to packs: `read/` makes samples of rows, pixels of images and tokens of text; `plan/` decides which
samples form which pack; assemble, pack_builder and loader deliver. The way in: `loader.PackLoader`.
"""
