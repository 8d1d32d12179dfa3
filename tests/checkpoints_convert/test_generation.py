# SPDX-License-Identifier: Apache-2.0
"""Where a released model's answer ends, through an import, runs and the release again; and what of the source's
generation settings is kept or told."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, GenerationConfig
from transformers.utils import logging as hf_logging

from checkpoints_convert.automodel_layout import Release, write_release
from checkpoints_convert.generation import (
    answer_ends,
    generation_lines,
    not_applied,
    read_generation,
    source_generation,
)
from checkpoints_convert.model_text import model_text
from data_prep.tokenizer import PRE_TOKENIZER_PATTERN, train_bpe, write_tokenizer
from megatron_eve.data.read.tokenizer import load_tokenizer
from megatron_eve.errors import CheckpointError
from tests.checkpoints_convert.conftest import CORPUS, release_model
from tests.checkpoints_convert.test_command_line import run_main
from tests.support.reference_eve import ReferenceEve, build_reference
from tests.support.tiny import DENSE, tiny_model

FullRelease = tuple[Path, ReferenceEve]
QWEN_CHAT = {"bos_token_id": 317, "do_sample": True, "eos_token_id": [319, 317], "pad_token_id": 317,
             "repetition_penalty": 1.05, "temperature": 0.7, "top_k": 20, "top_p": 0.8,
             "transformers_version": "4.37.0"}  # fmt: skip


def written(folder: Path, name: str = "generation_config.json") -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / name).read_text())
    return content


def another_tokenizer(folder: Path, *, eos: str, special: tuple[str, ...]) -> Path:
    """The small BPE with other added tokens, as Llama's: another end, and <|im_end|> if it is among `special`."""
    train_bpe(CORPUS * 3, folder / "base", 320)
    content = json.loads((folder / "base/tokenizer.json").read_text()) | {"added_tokens": []}
    backend = Backend.from_str(json.dumps(content))
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    (folder / "llama").mkdir()
    write_tokenizer(
        backend, folder / "llama", tokenizer_class="PreTrainedTokenizerFast", max_length=99
    )
    path = folder / "llama/tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": eos, "pad_token": eos}))
    return folder / "llama"


def test_both_ends_by_the_tokenizers_own_ids(full_release: FullRelease) -> None:
    folder = full_release[0]
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert written(folder)["eos_token_id"] == ends == [319, 317]
    assert written(folder, "config.json")["eos_token_id"] == ends
    assert written(folder)["pad_token_id"] == written(folder, "config.json")["pad_token_id"] == 317
    (folder / "generation_config.json").rename(folder / "away.json")
    try:  # a copy without it
        assert GenerationConfig.from_model_config(_config(folder)).eos_token_id == ends
    finally:
        (folder / "away.json").rename(folder / "generation_config.json")


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, trust_remote_code=True)


def test_another_base_ends_with_what_training_ends_with_first(tmp_path: Path) -> None:
    """Llama's end is not the one of the conversation; and the source names one that no file of ours knows."""
    special = ("</s>", "<|eot_id|>", "<|im_end|>")
    folder = another_tokenizer(tmp_path, eos="</s>", special=special)
    tokenizer = load_tokenizer(folder)
    eos, turn, stop = (tokenizer.token_id(name) for name in special)
    assert answer_ends(tokenizer, {}) == (stop, eos)
    assert answer_ends(tokenizer, {"eos_token_id": [eos, turn]}) == (stop, eos, turn)
    # A number that is a word of this tokenizer is another tokenizer's end.
    other = {"eos_token_id": [70, turn, 10**6], "repetition_penalty": 1.0}
    assert answer_ends(tokenizer, other) == (stop, eos, turn)
    told = not_applied(other, tokenizer)
    assert [line.split(" (")[0] for line in told] == ["end 70", "end 1000000"]


def test_a_tokenizer_without_the_conversations_end_is_refused(tmp_path: Path) -> None:
    folder = another_tokenizer(tmp_path, eos="</s>", special=("</s>",))
    eve = build_reference(release_model(DENSE, folder))
    release = Release(
        model=eve.config, dtype="float32", tokenizer=folder, image_edge=16, run=None, origin="tests"
    )
    with pytest.raises(CheckpointError, match=r"has no special token <\|im_end\|>, with which a"):
        write_release(tmp_path / "eve", release, eve.state_dict().items())


def test_ends_of_an_imported_folder_are_kept_and_the_rest_is_told(
    gloo1: Any, full_release: FullRelease, tokenizer_folder: Path, tmp_path: Path
) -> None:
    source = tmp_path / "official"
    source.mkdir()
    for name in ("config.json", "model.safetensors"):
        (source / name).symlink_to(full_release[0] / name)
    content = QWEN_CHAT | {"eos_token_id": [319, 317, 318]}  # 318 is <|im_start|>
    (source / "generation_config.json").write_text(json.dumps(content))
    imported, out = tmp_path / "imported", tmp_path / "out"
    code, lines, errors = gloo1.run(run_main, "hf-to-megatron", source, imported)[0]
    assert code == 0, errors
    settings = "do_sample true, repetition_penalty 1.05, temperature 0.7, top_k 20, top_p 0.8"
    assert lines[-1] == f"not followed by a release (greedy, no penalty): {settings}"
    options = ("--tokenizer", tokenizer_folder, "--image-edge", "16")
    for layout in ("automodel", "official"):
        folder = out / layout
        code, _, errors = gloo1.run(
            run_main, "megatron-to-hf", imported, folder, *options, "--layout", layout
        )[0]
        assert code == 0, errors
        assert written(folder) == {
            "bos_token_id": 317, "do_sample": False, "eos_token_id": [319, 317, 318],
            "max_new_tokens": 128, "pad_token_id": 317, "repetition_penalty": 1.0,
        }  # fmt: skip
    card = (out / "automodel" / "README.md").read_text()
    assert f"decodes otherwise by default ({settings})" in card


def test_settings_are_found_through_the_runs_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that started from a run that started from the conversion; and a chain that is not here any more."""
    first, second, last = (tmp_path / name for name in ("converted", "stage2", "stage3"))
    texts = {
        first: model_text(tiny_model(), origin="x", generation=QWEN_CHAT),
        second: f"checkpoint.load_weights_from: {first}\nrecipe: a\n",
        last: f"checkpoint.load_weights_from: {second}\nrecipe: b\n",
    }
    monkeypatch.setattr("checkpoints_convert.generation.weights_folder", Path)

    def config_text(folder: Path) -> str:
        if folder not in texts:
            raise CheckpointError("gone")
        return texts[folder]

    monkeypatch.setattr("checkpoints_convert.generation.read_config_text", config_text)
    assert source_generation(last) == source_generation(first) == QWEN_CHAT
    texts[second] = texts[second].replace(str(first), str(last))  # a circle
    assert source_generation(last) == {}
    del texts[second]
    assert source_generation(last) == {}


def test_what_a_folder_says(tmp_path: Path) -> None:
    assert read_generation(tmp_path) == {}
    (tmp_path / "config.json").write_text('{"eos_token_id": 5, "bos_token_id": 1}')
    assert read_generation(tmp_path) == {"eos_token_id": [5], "bos_token_id": 1}
    file = tmp_path / "generation_config.json"
    file.write_text('{"eos_token_id": [6, 5], "top_p": 1.0, "transformers_version": "4"}')
    found = read_generation(tmp_path)
    assert found == {"eos_token_id": [6, 5], "bos_token_id": 1, "top_p": 1.0}
    assert generation_lines(found)["generation.eos_token_id"] == "[6, 5]"
    for text, problem in (
        ("{", "is not JSON"),
        ("[]", "holds no JSON object"),
        ('{"eos_token_id": "</s>"}', "eos_token_id is '</s>', expected a token id or a list"),
        ('{"eos_token_id": [true]}', "eos_token_id is .True., expected"),
    ):
        file.write_text(text)
        with pytest.raises(CheckpointError, match=problem):
            read_generation(tmp_path)


def test_a_large_vocabulary_loads_without_a_warning(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], full_release: FullRelease
) -> None:
    """transformers 4.57 takes a tokenizer of more than 100,000 words for a Mistral one with an incorrect regex, unless
    config.json names an older version and another model. The ids are the tokenizer's."""
    content = json.loads((full_release[0] / "tokenizer.json").read_text())
    assert content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] == PRE_TOKENIZER_PATTERN
    vocab = content["model"]["vocab"]
    vocab |= {f"word{n}": n for n in range(len(vocab) + 3, 100_100)}
    config = json.loads((full_release[0] / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    released = written(full_release[0], "config.json")
    texts = ["SomeCamel HTTPServer's 12345\n\n x", "ÄÖ e\u0301 9<|im_end|>"]
    expected = [load_tokenizer(tmp_path).encode(text) for text in texts]
    hf_logging.set_verbosity_warning()
    hf_logging.enable_propagation()
    try:
        for version in (released["transformers_version"], None):
            (tmp_path / "config.json").write_text(
                json.dumps(released | {"transformers_version": version})
            )
            tokenizer = AutoTokenizer.from_pretrained(tmp_path)
            assert [tokenizer(text)["input_ids"] for text in texts] == expected
            if version is not None:
                assert "regex" not in "".join(capfd.readouterr())
    finally:
        hf_logging.disable_propagation()
