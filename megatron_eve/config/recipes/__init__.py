# SPDX-License-Identifier: Apache-2.0
"""Every run that the command line can name. A recipe is a function without arguments that returns a complete
RunConfig; `RECIPES` is the plain table of ours and `load_recipe` finds one by name, in a user's own file
(`my_recipes.py:my_run`) or in the config.txt that a run wrote.

eve7b_*    EVEv2-7B on Qwen2.5-7B-Instruct, 16 nodes x 8 GPUs (eve7b.py)
eve_tiny_* the same curriculum on two CPU processes, after a text stage that makes its own small LLM (eve_tiny.py)
smollm2_*  the same curriculum on a real small LLM, SmolLM2-135M-Instruct (smollm2.py)"""

import difflib
from collections.abc import Callable
from pathlib import Path

from megatron_eve.config.recipes import eve7b, eve_tiny, smollm2
from megatron_eve.config.recipes.own import recipe_of_function, recipe_of_text
from megatron_eve.config.schema import RunConfig
from megatron_eve.errors import ConfigError

RECIPES: dict[str, Callable[[], RunConfig]] = {
    "eve7b_stage1": eve7b.eve7b_stage1,
    "eve7b_stage2_1_ld": eve7b.eve7b_stage2_1_ld,
    "eve7b_stage2_1_hd": eve7b.eve7b_stage2_1_hd,
    "eve7b_stage2_2": eve7b.eve7b_stage2_2,
    "eve7b_stage3": eve7b.eve7b_stage3,
    "eve_tiny_text": eve_tiny.eve_tiny_text,
    "eve_tiny_stage1": eve_tiny.eve_tiny_stage1,
    "eve_tiny_stage2_1": eve_tiny.eve_tiny_stage2_1,
    "eve_tiny_stage2_2": eve_tiny.eve_tiny_stage2_2,
    "eve_tiny_stage3": eve_tiny.eve_tiny_stage3,
    "smollm2_stage1": smollm2.smollm2_stage1,
    "smollm2_stage2_1": smollm2.smollm2_stage2_1,
    "smollm2_stage2_2": smollm2.smollm2_stage2_2,
    "smollm2_stage3": smollm2.smollm2_stage3,
}


def load_recipe(reference: str) -> RunConfig:
    """The configuration of a recipe of RECIPES, of `FILE.py:FUNCTION` or of a path that ends in `.txt`.

    Raises: ConfigError naming close matches if there is no such recipe, or what is wrong with the file.
    """
    if reference in RECIPES:
        return RECIPES[reference]()
    if reference.rpartition(":")[0].endswith(".py"):
        return recipe_of_function(reference)
    if reference.endswith(".txt"):
        return recipe_of_text(Path(reference))
    close = difflib.get_close_matches(reference, RECIPES, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(RECIPES)}."
    raise ConfigError(
        f"there is no recipe {reference!r}; {hint} Your own: FILE.py:FUNCTION, or RUN_DIR/config.txt."
    )


__all__ = ["RECIPES", "load_recipe"]
