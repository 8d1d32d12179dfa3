# SPDX-License-Identifier: Apache-2.0
"""From MDS shards to packs, in the order of the files: row, shards (read); conversation, image, patches (make tokens
and pixels); lengths, packing, plan (decide); assemble, pack_builder, loader (deliver). The way in:
`loader.PackLoader`.
"""
