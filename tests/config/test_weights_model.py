# SPDX-License-Identifier: Apache-2.0
"""The model comes from one place: every constant of the weights is compared with the run's, or taken from them."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_eve.config.model_lines import flat_model, model_fields
from megatron_eve.config.overrides import apply_overrides
from megatron_eve.config.recipes import load_recipe
from megatron_eve.config.schema import ModelConfig, SplitConfig
from megatron_eve.config.weights_model import FREE, differences, model_of_weights
from megatron_eve.errors import CheckpointError, ConfigError
from tests.support.tiny import DENSE, tiny_model
from tests.support.weights_text import write_model_folder

FFN = SplitConfig(norm=False, attention=False, ffn=True)


def changed(model: ModelConfig, name: str) -> ModelConfig:
    """With another value of one field, whatever its type."""
    section, _, field = name.rpartition(".")
    owner = getattr(model, section) if section else model
    value = getattr(owner, field)
    other = not value if isinstance(value, bool) else value * 2
    part = replace(owner, **{field: other})
    return replace(model, **{section: part}) if section else part


def lines(model: ModelConfig, stored: ModelConfig, *, copy: bool = False) -> list[str]:
    return list(differences(model, stored, weights="W", copy_text_to_vision=copy))


@pytest.mark.parametrize("name", sorted(model_fields()))
def test_a_difference_in_any_constant_is_one_line_with_both_values(name: str) -> None:
    model = tiny_model()
    stored = changed(model, name)
    found = lines(model, stored)
    if name in FREE:
        assert found == []
        return
    (line,) = found
    here, there = (flat_model(m)[f"model.{name}"] for m in (model, stored))
    assert line.startswith(f"model.{name}={here}, but the weights of W have {there}")
    assert f"model.{name}={there}" in line


def test_only_what_draws_new_weights_may_differ() -> None:
    """Anything else that joins this set changes the function, or the shapes."""
    assert {"init_std"} == FREE


def test_every_difference_has_its_line() -> None:
    stored = replace(tiny_model(), rope_theta=1e4, rms_norm_eps=1e-5, num_layers=8)
    assert [line.partition("=")[0] for line in lines(tiny_model(), stored)] == [
        "model.num_layers",
        "model.rms_norm_eps",
        "model.rope_theta",
    ]


def test_a_float_that_went_through_fp32_is_the_same() -> None:
    """As a GGUF file has it."""
    stored = replace(tiny_model(), rms_norm_eps=9.999999747378752e-06)
    assert lines(replace(tiny_model(), rms_norm_eps=1e-5), stored) == []
    assert lines(replace(tiny_model(), rms_norm_eps=1.00001e-5), stored)


def test_a_component_that_the_weights_do_not_split_needs_the_copy() -> None:
    found = lines(tiny_model(FFN), tiny_model(DENSE))
    assert len(found) == 1
    assert "checkpoint.copy_text_to_vision=true" in found[0]
    assert lines(tiny_model(FFN), tiny_model(DENSE), copy=True) == []


def test_vision_weights_of_their_own_are_not_dropped() -> None:
    (line,) = lines(tiny_model(DENSE), tiny_model(FFN), copy=True)
    assert line.startswith("model.split.ffn=false, but the weights of W have true")


def test_the_model_of_a_folder_is_read_back(tmp_path: Path) -> None:
    assert model_of_weights(tmp_path / "nothing") is None
    assert model_of_weights(write_model_folder(tmp_path / "w", tiny_model())) == tiny_model()


def test_a_run_directory_says_its_newest_whole_checkpoint(tmp_path: Path) -> None:
    for step, layers in ((2, 2), (4, 4), (8, 8)):
        folder = tmp_path / "checkpoints" / f"step_{step:08d}"
        write_model_folder(folder, tiny_model(layers=layers))
    (folder / "complete.json").unlink()
    stored = model_of_weights(tmp_path)
    assert stored is not None
    assert stored.num_layers == 4


def test_weights_that_do_not_say_their_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is neither a checkpoint nor a run directory"):
        model_of_weights(tmp_path)
    folder = write_model_folder(tmp_path / "old", tiny_model(), without="rope_theta")
    with pytest.raises(CheckpointError, match=r"config\.txt has no line 'model\.rope_theta: "):
        model_of_weights(folder)
    (folder / "config.txt").unlink()
    with pytest.raises(CheckpointError, match=r"config\.txt cannot be read"):
        model_of_weights(folder)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    model = replace(load_recipe("eve_tiny_stage1").model, rope_theta=1e4, num_layers=8)
    return write_model_folder(tmp_path / "weights", model)


def overridden(weights: Path, *overrides: str, recipe: str = "eve_tiny_stage2_1") -> ModelConfig:
    start = [f"checkpoint.load_weights_from={weights}", f"run_dir={weights.parent / 'run'}"]
    return apply_overrides(load_recipe(recipe), [*start, *overrides]).model


def test_a_constant_is_taken_from_the_weights(weights: Path) -> None:
    model = overridden(weights, "model.rope_theta=from_weights")
    assert (model.rope_theta, model.num_layers) == (1e4, 4)


def test_all_constants_but_the_split_are_taken_from_the_weights(weights: Path) -> None:
    """Stage 2.1 splits what stage 1 does not."""
    stored = model_of_weights(weights)
    assert stored is not None
    model = overridden(weights, "model=from_weights")
    assert model == replace(stored, split=model.split)
    assert model.split.any
    assert overridden(weights, "model=from_weights", "model.split=from_weights") == stored


def test_the_later_override_counts(weights: Path) -> None:
    assert overridden(weights, "model=from_weights", "model.num_layers=2").num_layers == 2
    assert overridden(weights, "model.num_layers=2", "model=from_weights").num_layers == 8


def test_a_run_that_resumes_takes_its_own_constants(weights: Path) -> None:
    """What it loaded at its first start may be gone."""
    own = replace(load_recipe("eve_tiny_stage2_1").model, rope_theta=5e5)
    write_model_folder(weights.parent / "run" / "checkpoints" / "step_00000002", own)
    assert overridden(weights, "model.rope_theta=from_weights").rope_theta == 5e5


def test_without_weights_there_is_nothing_to_take(tmp_path: Path) -> None:
    recipe = load_recipe("eve_tiny_text")
    with pytest.raises(ConfigError, match=r"rope_theta=from_weights needs .*, found none"):
        apply_overrides(recipe, ["model.rope_theta=from_weights"])
    start = f"checkpoint.load_weights_from={tmp_path / 'nothing'}"
    with pytest.raises(ConfigError, match="which are not here"):
        apply_overrides(recipe, ["model=from_weights", start])


def test_no_other_section_takes_values_from_weights() -> None:
    with pytest.raises(ConfigError, match=r"optim\.peak_lr=from_weights is not a finite number"):
        apply_overrides(load_recipe("eve_tiny_text"), ["optim.peak_lr=from_weights"])
