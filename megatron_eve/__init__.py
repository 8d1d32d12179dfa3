# SPDX-License-Identifier: Apache-2.0
"""megatron_eve: pre-training of encoder-free vision-language models (EVEv2) on megatron-core.

In a wheel data_prep, checkpoints_convert, slurm and tools are subpackages of this one (setup.py), so that an
installation has one top-level name. In a checkout they lie beside it and have these names, too: one program is
`python -m megatron_eve.data_prep` in both, whatever folders the working directory has."""

from pathlib import Path

__version__ = "0.1.0"

_CHECKOUT = Path(__file__).parents[1]
if (_CHECKOUT / "setup.py").is_file():
    __path__.append(str(_CHECKOUT))
