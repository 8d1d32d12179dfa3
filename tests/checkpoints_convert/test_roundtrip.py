# SPDX-License-Identifier: Apache-2.0
"""Hugging Face -> distributed checkpoint -> Hugging Face on real checkpoints, re-saved by other layouts on the way,
and the logits of both models. Everything that needs megatron-core runs in worker processes."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from checkpoints_convert.hf_to_megatron import ImportOptions, import_hf, planned_mapping
from checkpoints_convert.megatron_folder import read_megatron
from checkpoints_convert.megatron_to_hf import ExportOptions, export_hf
from checkpoints_convert.tensors import eve_to_hf
from checkpoints_convert.verify import compare_tensors, logits_gap
from megatron_eve.checkpoint.weights import load_weights, read_config_text
from megatron_eve.config.recipes import load_recipe
from megatron_eve.config.schema import ParallelConfig
from megatron_eve.config.text_form import config_text
from megatron_eve.errors import CheckpointError, EveError
from megatron_eve.model.build import build_model
from megatron_eve.model.micro_batch import RankPlace, micro_batch
from megatron_eve.parallel.groups import init_model_parallel
from tests.checkpoints_convert.conftest import release_model, write_reference_release
from tests.checkpoints_convert.test_modeling import hf_batch
from tests.support.reference_eve import ReferenceEve, build_reference
from tests.support.save_weights import save_weights
from tests.support.tiny import ALL, layout, naive_pack, random_samples
from tests.support.train_once import run_config

FullRelease = tuple[Path, ReferenceEve]
IMPORT = ImportOptions(
    dtype=None,
    split=None,
    vocab_size=None,
    patch_embed_dim=12,
    special_token_std=1.0,
    seed=1,
    overwrite=False,
)


def run_import(source: Path, dest: Path, **options: Any) -> str:
    """In a worker. The checkpoint's dtype, or the error."""
    try:
        return import_hf(source, dest, dataclasses.replace(IMPORT, **options)).dtype
    except EveError as error:
        return f"{type(error).__name__}: {error}"


def run_export(
    source: Path, dest: Path, tokenizer: Path | None, image_edge: int | None, **options: Any
) -> str:
    """In a worker. Empty, or the error."""
    export = ExportOptions(
        tokenizer=tokenizer,
        image_edge=image_edge,
        max_shard_bytes=10**9,
        overwrite=False,
        **options,
    )
    try:
        export_hf(source, dest, export)
    except EveError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def resave(source: Path, dest: Path, parallel: ParallelConfig, text: str | None) -> None:
    """In workers: load a checkpoint in another layout and save it from there, as a run would."""
    dtype, model = read_facts(source)
    state = init_model_parallel(parallel, seed=0)
    chunks, _ = build_model(run_config(model, parallel, train=dict(dtype=dtype)), state=state)
    load_weights(chunks, source, copy_text_to_vision=False)
    save_weights(chunks, dest, config_text=text or read_config_text(source))


def read_facts(folder: Path) -> tuple[str, Any]:
    weights = read_megatron(folder)
    return weights.dtype, weights.model


def whole_hf_state(folder: Path) -> dict[str, Tensor]:
    """In a worker: a checkpoint's tensors under their Hugging Face names."""
    weights = read_megatron(folder)
    return eve_to_hf(weights.tensors, weights.model)


def megatron_logits(folder: Path, seed: int) -> tuple[Tensor, Tensor]:
    """In a worker: logits at the labelled tokens of a pack, and where these are in the sequence."""
    _, model = read_facts(folder)
    parallel = layout()
    state = init_model_parallel(parallel, seed=0)
    chunks, _ = build_model(run_config(model, parallel), state=state)
    load_weights(chunks, folder, copy_text_to_vision=False)
    pack = naive_pack(labelled_samples(seed), model=model, tokens=192, align=8)
    batch = micro_batch(
        pack,
        place=RankPlace(),
        split_attention=model.split.attention,
        align=1,
        device=torch.device("cpu"),
    )
    with torch.no_grad():
        return chunks[0].logits(batch), pack.modality_order[pack.label_rows]


def labelled_samples(seed: int) -> list[Any]:
    """Samples in which every text token but a sample's first is a target."""
    samples = random_samples(5, seed=seed)
    return [dataclasses.replace(s, labels=s.ids.where(s.ids >= 0, -100)) for s in samples]


def assert_same_bytes(first: Path, second: Path) -> None:
    result = compare_tensors(first, second)
    assert result.num_tensors > 0
    assert result.differences == ()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_there_and_back_is_byte_identical(
    tied: bool, dtype: torch.dtype, tokenizer_folder: Path, tmp_path: Path, gloo1: Any
) -> None:
    eve = build_reference(release_model(ALL, tokenizer_folder, tied=tied), dtype=dtype)
    hf = write_reference_release(tmp_path / "hf", eve, tokenizer_folder)
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    name = "bf16" if dtype == torch.bfloat16 else "fp32"
    assert gloo1.run(run_import, hf, megatron) == [name]
    assert gloo1.run(run_export, megatron, back, tokenizer_folder, 16) == [""]
    assert_same_bytes(hf, back)
    found = json.loads((back / "config.json").read_text())
    expected = json.loads((hf / "config.json").read_text())
    assert found | {"torch_dtype": None} == expected | {"torch_dtype": None}
    assert found["torch_dtype"] == ("bfloat16" if dtype == torch.bfloat16 else "float32")


@pytest.mark.parametrize(
    "parallel",
    [layout(tensor=2), layout(pipeline=2), layout(tensor=2, sequence_parallel=True)],
    ids=["tp2", "pp2", "tp2+sp"],
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_byte_identical_after_another_layout(
    parallel: ParallelConfig,
    tied: bool,
    tokenizer_folder: Path,
    tmp_path: Path,
    gloo1: Any,
    gloo2: Any,
) -> None:
    """The vocabulary is odd, so that tensor parallelism pads it; the padding does not come out."""
    model = release_model(ALL, tokenizer_folder, tied=tied)
    assert model.vocab_size % 2 == 1
    hf = write_reference_release(tmp_path / "hf", build_reference(model), tokenizer_folder)
    gloo1.run(run_import, hf, tmp_path / "first")
    gloo2.run(resave, tmp_path / "first", tmp_path / "second", parallel, None)
    back = tmp_path / "back"
    assert gloo1.run(run_export, tmp_path / "second", back, tokenizer_folder, 16) == [""]
    assert_same_bytes(hf, back)


def test_logits_of_release_equal_the_trained_model(
    full_release: FullRelease, tmp_path: Path, gloo1: Any
) -> None:
    """The same tokens and pixels through the packed megatron-core model and through the released folder."""
    folder, eve = full_release
    gloo1.run(run_import, folder, tmp_path / "megatron")
    ((logits, places),) = gloo1.run(megatron_logits, tmp_path / "megatron", 11)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    rows = []
    with torch.no_grad():
        for sample in labelled_samples(11):
            rows.append(model(**hf_batch([sample.reference()], eve.config)).logits[0])
    expected = torch.cat(rows)[places]
    assert len(expected) > 20
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_plain_qwen_gets_a_patch_embedding_and_copies(tmp_path: Path, gloo1: Any) -> None:
    """A language model as transformers saves it: dense by default, split on request, seeded."""
    config = Qwen2Config(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, rope_theta=1e6, tie_word_embeddings=True,
        max_position_embeddings=256, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    language_model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in language_model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    language_model.save_pretrained(tmp_path / "qwen")
    stored = load_file(tmp_path / "qwen/model.safetensors")

    gloo1.run(run_import, tmp_path / "qwen", tmp_path / "dense")
    (dense,) = gloo1.run(whole_hf_state, tmp_path / "dense")
    assert all(torch.equal(dense[name], tensor) for name, tensor in stored.items())
    assert {name for name in dense if name not in stored} == {
        name for name in dense if "vision_tower" in name
    }

    options = {"split": ALL, "special_token_std": 0.02, "seed": 2}
    gloo1.run(run_import, tmp_path / "qwen", tmp_path / "split", **options)
    (split,) = gloo1.run(whole_hf_state, tmp_path / "split")
    copies = [name for name in split if "moe_" in name]
    assert len(copies) == 2 * 12
    assert all(torch.equal(split[name], stored[name.replace("moe_", "")]) for name in copies)
    tower = "model.vision_tower"
    assert 0.01 < split[f"{tower}.class_embedding"].std() < 0.03
    assert 0.5 < dense[f"{tower}.class_embedding"].std() < 1.5
    conv = f"{tower}.patch_embedding.0.weight"
    assert split[conv].shape == (12, 3, 16, 16)
    assert not torch.equal(split[conv], dense[conv])
    gloo1.run(run_import, tmp_path / "qwen", tmp_path / "again")
    (again,) = gloo1.run(whole_hf_state, tmp_path / "again")
    assert all(torch.equal(dense[name], tensor) for name, tensor in again.items())


def test_release_of_a_language_model_still_speaks(
    tokenizer_folder: Path, tmp_path: Path, gloo1: Any
) -> None:
    """Qwen2 -> split checkpoint -> release: text logits are those of transformers' own Qwen2."""
    config = Qwen2Config(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, rope_theta=1e6, tie_word_embeddings=False,
        max_position_embeddings=256, bos_token_id=None, eos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(1)
    language_model = Qwen2ForCausalLM(config).eval()
    language_model.save_pretrained(tmp_path / "qwen")
    gloo1.run(run_import, tmp_path / "qwen", tmp_path / "megatron", split=ALL)
    assert gloo1.run(run_export, tmp_path / "megatron", tmp_path / "eve", tokenizer_folder, 64) == [
        ""
    ]
    eve = AutoModelForCausalLM.from_pretrained(tmp_path / "eve", trust_remote_code=True)
    ids = torch.randint(0, 320, (2, 17))
    with torch.no_grad():
        found, expected = eve(ids).logits, language_model(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_dtype_and_vocabulary_on_request(
    full_release: FullRelease, tmp_path: Path, gloo1: Any
) -> None:
    folder, eve = full_release
    options = {"dtype": "bf16", "vocab_size": 384}
    assert gloo1.run(run_import, folder, tmp_path / "megatron", **options) == ["bf16"]
    (state,) = gloo1.run(whole_hf_state, tmp_path / "megatron")
    for name, tensor in eve.state_dict().items():
        assert torch.equal(state[name][: len(tensor)], tensor.bfloat16()), name
    assert state["lm_head.weight"].shape == (384, 32)
    assert not state["lm_head.weight"][len(eve.state_dict()["lm_head.weight"]) :].any()


def test_release_tells_the_run(
    full_release: FullRelease, tokenizer_folder: Path, tmp_path: Path, gloo1: Any
) -> None:
    """From a run's checkpoint, tokenizer and image area need not be given, and the card names the recipe."""
    folder, eve = full_release
    gloo1.run(run_import, folder, tmp_path / "import")
    recipe = load_recipe("eve_tiny_stage3")
    run = dataclasses.replace(
        recipe,
        model=eve.config,
        data=dataclasses.replace(
            recipe.data, tokenizer=str(tokenizer_folder), image_edge=48, exif_rotation=False
        ),
    )
    trained = tmp_path / "step-7"
    gloo1.run(resave, tmp_path / "import", trained, layout(), config_text(run))
    assert gloo1.run(run_export, trained, tmp_path / "hf", None, None) == [""]
    processor = json.loads((tmp_path / "hf/preprocessor_config.json").read_text())
    assert (processor["max_size"], processor["exif_rotation"]) == (48, False)
    other = gloo1.run(run_export, trained, tmp_path / "other", None, None, exif_rotation=True)
    assert "The run was trained with data.exif_rotation=false" in other[0]
    (message,) = gloo1.run(run_export, trained, tmp_path / "other", None, 16)
    assert "trained with data.image_edge=48, --image-edge is 16" in message
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert (config["tune_VE"], config["tune_LLM"], config["tune_MOE"]) == (True, True, True)
    assert config["vision_tower_lr"] == run.optim.patch_embedding_lr
    card = (tmp_path / "hf/README.md").read_text()
    assert "(`eve_tiny_stage3`)" in card
    assert "| separate weights for vision tokens | layernorm-self_attn-mlp |" in card
    assert logits_gap(folder, tmp_path / "hf") > 0  # the other image area: other pixels
    (tmp_path / "hf/preprocessor_config.json").write_text(
        (folder / "preprocessor_config.json").read_text()
    )
    assert logits_gap(folder, tmp_path / "hf") == 0


def test_import_refuses(full_release: FullRelease, tmp_path: Path, gloo1: Any) -> None:
    folder, _ = full_release

    def attempt(source: Path, **options: Any) -> str:
        return gloo1.run(run_import, source, tmp_path / "out", **options)[0]

    (tmp_path / "out").mkdir()
    assert "out exists; choose another name or pass --overwrite" in attempt(folder)
    (tmp_path / "out").rmdir()
    assert "config.json not found" in attempt(tmp_path)

    state = load_file(folder / "model.safetensors")
    broken = tmp_path / "broken"
    broken.mkdir()
    config = json.loads((folder / "config.json").read_text())
    write = (broken / "config.json").write_text
    write(json.dumps(config))
    assert "has neither model.safetensors nor" in attempt(broken)
    gone = "model.layers.1.self_attn.moe_q_proj.weight"
    save_file({k: v for k, v in state.items() if k != gone}, broken / "model.safetensors")
    assert f"lacks 1 tensors: {gone}" in attempt(broken)
    save_file(state, broken / "model.safetensors")
    dense = dataclasses.replace(ALL, ffn=False)
    assert "--split leaves out ffn" in attempt(broken, split=dense)
    save_file({k: v.half() for k, v in state.items()}, broken / "model.safetensors")
    assert "The checkpoint is torch.float16; choose --dtype" in attempt(broken)
    save_file(state | {gone: state[gone].half()}, broken / "model.safetensors")
    assert "mixes dtypes" in attempt(broken)
    for change, message in (
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window is true"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "RoPE of type 'yarn'"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn', expected an object"),
        ({"num_attention_heads": 0, "head_dim": None}, "not a multiple of num_attention_heads=0"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers is 'two', expected a int"),
        ({"moe_part": "experts"}, "moe_part is 'experts'"),
    ):
        write(json.dumps(config | change))
        assert message in attempt(broken)
    del config["rms_norm_eps"]
    write(json.dumps(config))
    assert "field 'rms_norm_eps' is missing" in attempt(broken)
    write("[]")
    assert "config.json holds no JSON object" in attempt(broken)
    (broken / "config.json").write_bytes(b'{"a": "\xe9"}')
    assert "config.json is not JSON" in attempt(broken)
    assert not (tmp_path / "out").exists()


def test_export_refuses(full_release: FullRelease, tmp_path: Path, gloo1: Any) -> None:
    folder, _ = full_release
    gloo1.run(run_import, folder, tmp_path / "megatron")

    def attempt(source: Path, tokenizer: Path | None, edge: int | None) -> str:
        return gloo1.run(run_export, source, tmp_path / "out", tokenizer, edge)[0]

    assert "names no tokenizer; give its folder" in attempt(tmp_path / "megatron", None, 16)
    assert "give it with --image-edge" in attempt(tmp_path / "megatron", folder, None)
    assert "no checkpoint folder" in attempt(tmp_path / "nothing", folder, 16)
    config = tmp_path / "megatron/config.txt"
    lines = config.read_text().splitlines(keepends=True)
    text = "".join(line for line in lines if not line.startswith("model.split.ffn"))
    config.write_text(text + "#" * (len("".join(lines)) - len(text)))
    assert "has no line 'model.split.ffn: ...'" in attempt(tmp_path / "megatron", folder, 16)


def test_dry_run_lists_and_writes_nothing(full_release: FullRelease) -> None:
    lines = planned_mapping(full_release[0], IMPORT)
    assert lines[0] == (
        "model.embed_tokens.weight [323, 32] float32 -> embedding.word_embeddings.weight"
    )
    key = "model.layers.1.self_attn.moe_k_proj.bias [16] float32"
    assert f"{key} -> decoder.layers.1.self_attention.linear_qkv.vision.bias" in lines
    assert len(lines) == 7 + 2 * 2 * 12 + 2
    with pytest.raises(CheckpointError, match="--split leaves out norm"):
        planned_mapping(
            full_release[0],
            dataclasses.replace(IMPORT, split=dataclasses.replace(ALL, norm=False)),
        )
