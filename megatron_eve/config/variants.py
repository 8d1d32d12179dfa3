# SPDX-License-Identifier: Apache-2.0
"""Named choices of which decoder components are split by modality, and their official spelling.

The EVEv2 paper compares four decoders on one patch embedding; the official code selects them with a string,
`moe_part`, in which it looks for `layernorm`, `self_attn` and `mlp` (modeling_qwen2.py:262, 804-806). A dense model has
`add_moe: false` and no `moe_part`. EVEv1.2 (re-parameterised FFN) is not one of them: it has no vision branch."""

from megatron_eve.config.schema import SplitConfig
from megatron_eve.errors import ConfigError

VARIANTS: dict[str, SplitConfig] = {
    "eve-v1.0": SplitConfig(norm=False, attention=False, ffn=False),
    "eve-v1.5": SplitConfig(norm=False, attention=False, ffn=True),
    "norm-only": SplitConfig(norm=True, attention=False, ffn=False),
    "eve-v2.0": SplitConfig(norm=True, attention=True, ffn=True),
}
"""Paper's name -> split. `model.split=eve-v1.5` on the command line selects one."""

_NORM, _ATTENTION, _FFN = "layernorm", "self_attn", "mlp"


def split_from_moe_part(moe_part: str | None) -> SplitConfig:
    """The split that an official config's `moe_part` stands for; None is a dense model.

    Raises: ConfigError if a part between the dashes is not one of the three official ones.
    """
    parts = [] if moe_part is None else moe_part.split("-")
    unknown = [part for part in parts if part not in (_NORM, _ATTENTION, _FFN)]
    if unknown:
        raise ConfigError(
            f"moe_part='{moe_part}' holds '{unknown[0]}'; expected {_NORM}, {_ATTENTION} and {_FFN} joined by '-', "
            "or null for a dense model."
        )
    return SplitConfig(norm=_NORM in parts, attention=_ATTENTION in parts, ffn=_FFN in parts)


def moe_part_from_split(split: SplitConfig) -> str | None:
    """The official `moe_part` of a split, parts in the order of the released model; None for a dense model."""
    chosen = ((_NORM, split.norm), (_ATTENTION, split.attention), (_FFN, split.ffn))
    return "-".join(name for name, is_split in chosen if is_split) or None
