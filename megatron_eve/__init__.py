# SPDX-License-Identifier: Apache-2.0
"""megatron_eve: pre-training of encoder-free vision-language models (EVEv2) on megatron-core."""

__version__ = "0.1.0"
