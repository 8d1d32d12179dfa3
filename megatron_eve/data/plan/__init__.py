# SPDX-License-Identifier: Apache-2.0
"""Which samples are trained together: their lengths (counting, counts_file, lengths), their order (order) and the packs
that they form (packing, stream_packer). Integers only, the same on every rank; no image is read here.
"""
