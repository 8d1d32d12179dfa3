# SPDX-License-Identifier: Apache-2.0
"""Overrides: every type of field, the two shorthands, and every refusal."""

import re
from dataclasses import replace

import pytest

from megatron_eve.config.overrides import apply_overrides
from megatron_eve.config.recipes import load_recipe
from megatron_eve.config.schema import RunConfig, ShardSource
from megatron_eve.errors import ConfigError

CONFIG = load_recipe("eve7b_stage2_1_ld")


def read(config: RunConfig, key: str) -> object:
    value: object = config
    for name in key.split("."):
        value = value[int(name)] if isinstance(value, tuple) else getattr(value, name)
    return value


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("run_dir=/tmp/a=b", "/tmp/a=b"),
        ("optim.peak_lr=5e-5", 5e-5),
        ("optim.clip_grad=1", 1.0),
        ("optim.clip_grad=none", None),
        ("train.steps=12", 12),
        ("train.epochs=none", None),
        ("train.recompute=none", "none"),
        ("model.split.ffn=false", False),
        ("parallel.sequence_parallel=true", True),
        ("stage.trainable=vision", ("vision",)),
        ("stage.trainable=patch_embedding,vision,text", ("patch_embedding", "vision", "text")),
        ("data.sources.0.path=x", "x"),
        ("checkpoint.load_weights_from=none", None),
        ('checkpoint.load_weights_from="none"', "none"),
    ],
)
def test_value_takes_the_type_of_its_field(override: str, value: object) -> None:
    found = read(apply_overrides(CONFIG, [override]), override.split("=")[0])
    assert found == value
    assert type(found) is type(value)


def test_nothing_else_changes() -> None:
    changed = apply_overrides(CONFIG, ["optim.peak_lr=5e-5"])
    assert changed == replace(CONFIG, optim=replace(CONFIG.optim, peak_lr=5e-5))
    assert apply_overrides(CONFIG, []) == CONFIG


def test_later_override_of_one_key_counts() -> None:
    assert apply_overrides(CONFIG, ["train.seed=1", "train.seed=2"]).train.seed == 2


def test_sources_can_be_added_and_started_anew() -> None:
    more = apply_overrides(CONFIG, ["data.sources.1.path=b", "data.sources.1.proportion=2"])
    assert more.data.sources == (*CONFIG.data.sources, ShardSource(path="b", proportion=2.0))
    fresh = ["data.sources=()", "data.sources.0.path=c", "data.sources.0.proportion=1"]
    assert apply_overrides(more, fresh).data.sources == (ShardSource(path="c", proportion=1.0),)
    assert apply_overrides(CONFIG, ["data.sources=()"]).data.sources == ()


def test_variant_by_name_sets_the_whole_split() -> None:
    split = apply_overrides(CONFIG, ["model.split=eve-v1.5"]).model.split
    assert (split.norm, split.attention, split.ffn) == (False, False, True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.peak_lr", "'optim.peak_lr' is not of the form section.key=value"),
        ("=3", "'=3' is not of the form"),
        (
            "optim.peek_lr=1",
            "optim.peek_lr is not a field of the configuration; did you mean optim.peak_lr",
        ),
        ("peak_lr=1", "did you mean optim.peak_lr?"),
        ("zzzzz=1", "the top level holds recipe, run_dir, model, stage, data"),
        (
            "model=1",
            "model is a section of the configuration; set one of its fields: model.num_layers",
        ),
        (
            "data.sources=x",
            "data.sources is a section of the configuration; set one of its fields: "
            "data.sources.0.path",
        ),
        (
            "data.sources.2.path=x",
            "data.sources.2 does not continue the numbering; use data.sources.0 to data.sources.1",
        ),
        ("data.sources.1.path=x", "data.sources.1.proportion is missing from the configuration"),
        ("recipe=mine", "recipe=mine cannot be overridden"),
        (
            "model.split=v3",
            "model.split=v3 is not a variant; use one of eve-v1.0, eve-v1.5, norm-only, eve-v2.0",
        ),
        ("train.steps=1.5", "train.steps=1.5 is not an integer, or none."),
        ("train.seed=none", "train.seed=none is not an integer."),
        ("optim.peak_lr=fast", "optim.peak_lr=fast is not a finite number."),
        ("optim.peak_lr=inf", "optim.peak_lr=inf is not a finite number."),
        ("optim.peak_lr=nan", "optim.peak_lr=nan is not a finite number."),
        ("logging.wandb=yes", "logging.wandb=yes is not true or false."),
        ("train.dtype=fp16", "train.dtype=fp16 is not one of bf16, fp32."),
        (
            "stage.trainable=vision,eyes",
            "stage.trainable=vision,eyes is not a list joined by commas, each one of patch_embedding",
        ),
        ('run_dir="a', 'run_dir="a is not text.'),
        ('run_dir="a"b', 'run_dir="a"b is not text.'),
    ],
)
def test_refusal_says_what_and_why(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        apply_overrides(CONFIG, [override])


def test_refused_override_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_recipe("eve7b_stage2_1_ld")
    with pytest.raises(ConfigError):
        apply_overrides(CONFIG, ["train.seed=7", "nope=1"])
    assert before == CONFIG


def test_a_source_is_removed_and_those_behind_it_move_up() -> None:
    three = [f"data.sources.{i}.{key}" for i in (1, 2) for key in (f"path=p{i}", f"proportion={i}")]
    config = apply_overrides(CONFIG, [*three, "data.sources.0=none"])
    assert [(s.path, s.proportion) for s in config.data.sources] == [("p1", 1.0), ("p2", 2.0)]
    again = [*three, "data.sources.1=none", "data.sources.2.path=q", "data.sources.2.proportion=4"]
    assert [s.path for s in apply_overrides(CONFIG, again).data.sources][1:] == ["p2", "q"]
    assert apply_overrides(CONFIG, ["data.sources.0=none"]).data.sources == ()


def test_a_source_that_is_not_there_is_not_removed() -> None:
    with pytest.raises(ConfigError, match=r"data\.sources\.3=none removes .* there are 1"):
        apply_overrides(CONFIG, ["data.sources.3=none"])
