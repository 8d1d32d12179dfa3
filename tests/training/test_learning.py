# SPDX-License-Identifier: Apache-2.0
"""A run that cannot learn says so: no gradient, no learning rate, no label; and one that learns says nothing."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import pytest

from megatron_eve.config.schema import StageConfig, TrainableGroup
from megatron_eve.training.learning import GROUPS, LearningWatch
from tests.support.tiny import layout, tiny_model
from tests.support.train_once import build_all, global_batch, packs_of_rank, run_config

ALL = StageConfig(name="3", trainable=GROUPS)
FIRST = StageConfig(name="1", trainable=("patch_embedding",))
LEARNS = {
    "lr": 1e-4,
    "patch_embedding_lr": 1e-5,
    "label_tokens": 9.0,
    "vision_tokens": 20.0,
    "skipped": 0.0,
}


def told(
    caplog: pytest.LogCaptureFixture,
    *steps: dict[str, float],
    reached: Sequence[TrainableGroup] = GROUPS,
    stage: StageConfig = ALL,
) -> list[str]:
    """What is logged of a run whose steps differ like this from one that learns."""
    watch = LearningWatch(stage)
    with caplog.at_level(logging.WARNING):
        for step in steps:
            watch.count(LEARNS | step, reached=reached)
        watch.finish()
    return caplog.messages


def test_a_run_that_learns_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    warm_up = [{"lr": 0.0, "patch_embedding_lr": 0.0}]  # the first step of every schedule
    assert told(caplog, *warm_up, *[{}] * 50) == []


def test_stage_1_on_text_says_that_there_is_no_picture(caplog: pytest.LogCaptureFixture) -> None:
    (line,) = told(caplog, *[{"vision_tokens": 0.0}] * 5, reached=(), stage=FIRST)
    assert line.startswith("warning: patch_embedding is trained but got no gradient in 3 steps in")
    assert "hold no picture; look at data.sources" in line


def test_it_is_said_again_but_rarely(caplog: pytest.LogCaptureFixture) -> None:
    lines = told(caplog, *[{}] * 299, reached=("patch_embedding", "text"))
    assert [line.split(" in ")[1] for line in lines] == ["3 steps", "30 steps"]
    assert all("vision is trained but got no gradient" in line for line in lines)


def test_a_batch_without_a_picture_now_and_then_is_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    watch = LearningWatch(ALL)
    for number in range(30):
        watch.count(LEARNS | {"vision_tokens": 0.0}, reached=GROUPS if number % 3 else ("text",))
    assert caplog.messages == []


def test_a_run_of_two_steps_says_it_at_its_end(caplog: pytest.LogCaptureFixture) -> None:
    (line,) = told(caplog, {}, {}, reached=("patch_embedding", "vision"))
    assert "text is trained but got no gradient in 2 steps in a row: the loss does not" in line


def test_labels_that_are_all_masked_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """No group has a gradient then, and that is no news."""
    (line,) = told(caplog, *[{"label_tokens": 0.0}] * 4, reached=())
    assert line.startswith("warning: no token had a label in 3 steps in a row: nothing is learned")


@pytest.mark.parametrize("rate", [0.0, 1e-30])
def test_a_learning_rate_that_moves_nothing(caplog: pytest.LogCaptureFixture, rate: float) -> None:
    lines = told(caplog, *[{"lr": rate}] * 3)
    assert len(lines) == 2, "vision and text share it"
    assert f"text had a learning rate of {rate:g} in 3 steps in a row" in lines[1]
    assert "optim.peak_lr" in lines[1]
    caplog.clear()
    (line,) = told(caplog, *[{"patch_embedding_lr": rate}] * 3)
    assert "optim.patch_embedding_lr" in line


def test_steps_that_were_skipped_do_not_count(caplog: pytest.LogCaptureFixture) -> None:
    assert told(caplog, *[{"skipped": 1.0}] * 5, reached=()) == []


def reached_by_steps(config: Any) -> list[tuple[str, ...]]:
    """Groups that the gradient reaches with pictures, without, and without labels; in a gloo worker."""
    from megatron_eve.training.step import train_step

    training, state = build_all(config, weights=None)
    wrapped, optimizer = training.wrapped, training.optimizer
    schedule = training.schedule
    packs = [sample for pack in global_batch(4) for sample in pack]
    text = [s for s in packs if not s.images and (s.labels >= 0).any()]
    masked = [dataclasses.replace(s, labels=s.labels.clone().fill_(-100)) for s in packs]
    found = []
    for samples in (packs, text, masked):
        batch = [samples[:2], samples[2:4]] if len(samples) > 3 else [samples[:1], samples[1:]]
        result = train_step(
            wrapped,
            packs_of_rank(batch, config=config, state=state),
            optimizer=optimizer,
            schedule=schedule,
            config=config,
            state=state,
            stop_requested=False,
        )
        found.append(result.reached)
    return found


@pytest.mark.parametrize("spread", [dict(pipeline=2), dict(data=2, distributed_optimizer=True)])
def test_every_rank_knows_which_groups_a_gradient_reaches(gloo2, spread):  # type: ignore[no-untyped-def]
    config = run_config(tiny_model(), layout(**spread))
    for found in gloo2.run(reached_by_steps, config):
        assert found == [GROUPS, ("text",), ()]
