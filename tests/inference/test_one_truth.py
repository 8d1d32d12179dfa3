# SPDX-License-Identifier: Apache-2.0
"""Files of a released folder that say the same twice are compared, and no tool takes an option that it ignores."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints_convert.automodel_layout import Release, write_release
from megatron_eve import generate
from megatron_eve.data.read.tokenizer import load_tokenizer
from megatron_eve.errors import CheckpointError, ConfigError, DataError
from megatron_eve.evaluation.checkpoint import main as evaluate_checkpoint
from megatron_eve.evaluation.lmms_eval.asking import AskSettings, ReleasedFolder
from megatron_eve.inference import serve
from megatron_eve.inference.answers import (
    AnswerOptions,
    Question,
    answer_questions,
    load_released,
)
from megatron_eve.inference.chat_request import ApiError, parse_chat_request
from megatron_eve.inference.engine import Engine
from megatron_eve.inference.image_source import ImageSource
from megatron_eve.inference.prompts import ChatTurn
from megatron_eve.inference.release import read_release
from megatron_eve.inference.service import Limits, Service
from tests.checkpoints_convert.conftest import release_model
from tests.checkpoints_convert.test_chat_template import run_with
from tests.inference.test_released_folder import edit
from tests.support.reference_eve import build_reference
from tests.support.tiny import DENSE

CPU = torch.device("cpu")
ASK = [{"role": "user", "content": "What?"}]


@pytest.fixture
def copy(released_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(released_folder, tmp_path / "eve"))


@pytest.fixture(scope="module")
def captions(released_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release of a run of template plain."""
    tokenizer = released_folder.parent / "bpe"
    eve = build_reference(release_model(DENSE, tokenizer), seed=4)
    release = Release(
        model=eve.config, dtype="float32", tokenizer=tokenizer, image_edge=16, run=run_with("plain"),
        origin="tests",
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("captions") / "eve"
    write_release(folder, release, eve.state_dict().items())
    return folder


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("config.json", {"eos_token_id": [319, 318]}, r"eos_token_id is \[319, 317\], in config"),
        ("generation_config.json", {"eos_token_id": 317}, r"eos_token_id is \[317\], in config"),
        ("generation_config.json", {"eos_token_id": True}, "eos_token_id is True"),
        ("generation_config.json", {"pad_token_id": 3}, "pad_token_id is 3, in config.json 317"),
        ("generation_config.json", {"do_sample": True}, "do_sample is True; by default the engine"),
        ("generation_config.json", {"num_beams": 4}, "num_beams is 4; by default the engine"),
        ("generation_config.json", {"no_repeat_ngram_size": 3}, "no_repeat_ngram_size is 3"),
        ("generation_config.json", {"suppress_tokens": [7]}, r"suppress_tokens is \[7\]"),
        ("tokenizer_config.json", {"eos_token": "<|im_start|>"}, "eos_token of .* is 318, but an"),
        ("tokenizer_config.json", {"pad_token": "<|im_end|>"}, "pad_token_id is 317, pad_token of"),
        ("config.json", {"vocab_size": 319}, "the tokenizer has ids up to 319, the model 319 rows"),
    ],
)
def test_files_that_contradict_each_other_are_refused(
    copy: Path, file: str, fields: dict[str, Any], message: str
) -> None:
    """By the engine and by those who load the folder through transformers to score it."""
    edit(copy / file, **fields)
    for load in (
        lambda: Engine.load(copy, device=CPU),
        lambda: load_released(copy),
        lambda: ReleasedFolder(copy, AskSettings(), device="cpu"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load()


def test_the_conversations_end_must_be_one(copy: Path) -> None:
    for file in ("config.json", "generation_config.json"):
        edit(copy / file, eos_token_id=[317])
    edit(copy / "tokenizer_config.json", eos_token="<|endoftext|>")
    with pytest.raises(
        CheckpointError, match=r"<\|im_end\|>, which the chat template writes, is 3"
    ):
        Engine.load(copy, device=CPU)


def test_all_end_an_answer_at_the_same_tokens(copy: Path) -> None:
    tokenizer = load_tokenizer(copy)
    ends = (tokenizer.token_id("<|im_end|>"), tokenizer.token_id("<|endoftext|>"))
    assert Engine.load(copy, device=CPU).info.stop_ids == ends
    assert tuple(load_released(copy).model.generation_config.eos_token_id) == ends
    asked = ReleasedFolder(copy, AskSettings(), device="cpu")
    assert tuple(asked.model.generation_config.eos_token_id) == ends
    (copy / "generation_config.json").unlink()  # config.json alone says the same
    assert read_release(copy).stop_ids == ends


def test_a_model_of_captions_is_not_asked_questions(
    captions: Path, pictures: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    engine = Engine.load(captions, device=CPU)
    assert engine.info.template == "plain"
    image = engine.image(pictures[0].read_bytes())
    turn = ChatTurn("user", "", (image,))
    assert len(engine.prompt([turn])) == image.num_tokens
    with pytest.raises(DataError, match="trained on captions alone"):
        engine.prompt([turn], template="qwen2")
    options = AnswerOptions(template="qwen2", resize_rule="train", max_new_tokens=2, batch_size=1)
    question = [Question(text="What?", images=(pictures[0],))]
    with pytest.raises(ConfigError, match="trained on captions alone"):
        answer_questions(load_released(captions), question, options=options)
    with pytest.raises(ConfigError, match="trained on captions alone"):
        ReleasedFolder(captions, AskSettings(), device="cpu")
    assert serve.main([str(captions), "--port", "0"]) == 2
    assert "holds no conversation" in capsys.readouterr().err
    arguments = [str(captions), "--image", str(pictures[0]), "--max-new-tokens", "3"]
    assert generate.main([*arguments, "--template", "plain"]) == 0
    named = capsys.readouterr().out
    assert generate.main(arguments) == 0
    assert capsys.readouterr().out == named
    assert generate.main([*arguments, "--prompt", "What?"]) == 1
    assert "template plain writes a caption" in capsys.readouterr().err


def test_the_command_follows_the_folders_penalty(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the server and transformers do."""
    arguments = [str(copy), "--prompt", "How many shapes?", "--max-new-tokens", "12"]
    assert generate.main([*arguments, "--repetition-penalty", "1.8"]) == 0
    penalised = capsys.readouterr().out
    assert generate.main(arguments) == 0
    assert capsys.readouterr().out != penalised
    edit(copy / "generation_config.json", repetition_penalty=1.8)
    assert generate.main(arguments) == 0
    assert capsys.readouterr().out == penalised


def test_options_that_would_do_nothing_are_refused(
    released_folder: Path, engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(released_folder)
    assert generate.main([folder, "--prompt", "a", "--top-p", "0.5"]) == 2
    assert "--top-p 0.5 does nothing without --temperature" in capsys.readouterr().err
    for wrong, problem in (
        (["--tasks", "pope", "--images", "3"], "--images N is of --easy-vqa"),
        (["--easy-vqa", "data", "--resize-rule", "eval"], "--resize-rule is of --tasks"),
    ):
        with pytest.raises(SystemExit):
            evaluate_checkpoint(["run", "out", *wrong])
        assert problem in capsys.readouterr().err
    service = Service(
        name="eve",
        engine=engine,
        worker=_Worker(),  # type: ignore[arg-type]
        images=ImageSource(max_bytes=1),
        limits=Limits(body_bytes=1, image_pixels=1, images=1, new_tokens=4),
    )
    with pytest.raises(ApiError, match=r"top_p is 0\.5 without a temperature"):
        service.request(parse_chat_request({"messages": ASK, "top_p": 0.5}))
    greedy = service.request(parse_chat_request({"messages": ASK, "top_p": 0.5, "temperature": 0}))
    assert greedy.options.temperature == 0
    part = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}
    for body, problem in (
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "include_obfuscation"),
        ({"messages": [{"role": "user", "content": [part]}]}, "unknown field 'cache_control'"),
    ):
        with pytest.raises(ApiError, match=problem):
            parse_chat_request({"messages": ASK} | body)


class _Worker:
    tokens = 128


def test_settings_that_change_nothing_are_understood(copy: Path) -> None:
    """As other tools write them."""
    edit(copy / "generation_config.json", temperature=1.0, top_p=1.0, top_k=50, num_beams=1)
    assert read_release(copy).repetition_penalty == 1.0
    content = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "chat_template.jinja").write_text(content.pop("chat_template"))
    (copy / "tokenizer_config.json").write_text(json.dumps(content))
    assert read_release(copy).template == "qwen2"
