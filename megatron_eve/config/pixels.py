# SPDX-License-Identifier: Apache-2.0
"""How pixels are normalised: CLIP's statistics, as in the official code. Training uses them, a release
names them, and a folder that names others is another model."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
