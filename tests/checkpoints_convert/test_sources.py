# SPDX-License-Identifier: Apache-2.0
"""Decoders and folders that a conversion starts from: Qwen2.5, Llama-3, Vicuna, official EVEv2; and what it refuses."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from checkpoints_convert.hf_config import read_hf_config
from checkpoints_convert.hf_folder import write_safetensors
from checkpoints_convert.hf_to_megatron import new_patch_embedding, plan_import, planned_mapping
from checkpoints_convert.megatron_folder import read_megatron
from checkpoints_convert.megatron_to_hf import hf_stream
from checkpoints_convert.names import HF_ALIASES
from checkpoints_convert.verify import compare_constants, compare_tensors, logits_gap
from megatron_eve.errors import CheckpointError
from tests.checkpoints_convert.test_roundtrip import IMPORT, run_export, run_import, whole_hf_state
from tests.support.official import GOLDEN, initial_weights, write_official_folder
from tests.support.tiny import ALL
from tests.support.train_once import run_config

QWEN = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "initializer_range": 0.02,
    "use_sliding_window": False,
}
LLAMA = {
    "model_type": "llama",
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
}
# hidden, FFN, layers, heads, groups, vocabulary, tied; parameters as published
PUBLISHED = {
    "Qwen2.5-0.5B": (QWEN, 896, 4864, 24, 14, 2, 151936, True, 494_032_768),
    "Qwen2.5-1.5B": (QWEN, 1536, 8960, 28, 12, 2, 151936, True, 1_543_714_304),
    "Qwen2.5-3B": (QWEN, 2048, 11008, 36, 16, 2, 151936, True, 3_085_938_688),
    "Qwen2.5-7B": (QWEN, 3584, 18944, 28, 28, 4, 152064, False, 7_615_616_512),
    "Qwen2.5-14B": (QWEN, 5120, 13824, 48, 40, 8, 152064, False, 14_770_033_664),
    "Qwen2.5-32B": (QWEN, 5120, 27648, 64, 40, 8, 152064, False, 32_763_876_352),
    "Qwen2.5-72B": (QWEN, 8192, 29568, 80, 64, 8, 152064, False, 72_706_203_648),
    "Llama-3-8B": (LLAMA, 4096, 14336, 32, 32, 8, 128256, False, 8_030_261_248),
    "Llama-3-70B": (LLAMA, 8192, 28672, 80, 64, 8, 128256, False, 70_553_706_496),
    "Vicuna-7B": (LLAMA, 4096, 11008, 32, 32, 32, 32000, False, 6_738_415_616),
    "Vicuna-13B": (LLAMA, 5120, 13824, 40, 40, 40, 32000, False, 13_015_864_320),
}


def decoder_headers(
    hidden: int,
    ffn: int,
    layers: int,
    heads: int,
    groups: int,
    vocab: int,
    *,
    tied: bool,
    bias: bool,
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of transformers' Qwen2 (`bias`) or Llama, written down without our table."""
    key = hidden // heads * groups
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        for name, rows in (("q", hidden), ("k", key), ("v", key)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (rows, hidden)
            if bias:
                shapes[f"{layer}.self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[f"{layer}.mlp.gate_proj.weight"] = (ffn, hidden)
        shapes[f"{layer}.mlp.up_proj.weight"] = (ffn, hidden)
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, ffn)
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not tied:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def write_hollow(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file with a true header and a hole where the bf16 values would be."""
    entries, at = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + at)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_are_mapped_without_remainder(name: str, tmp_path: Path) -> None:
    """A dry run over a file as large as the real one, of which nothing but the header is on disk."""
    base, hidden, ffn, layers, heads, groups, vocab, tied, parameters = PUBLISHED[name]
    shapes = decoder_headers(
        hidden, ffn, layers, heads, groups, vocab, tied=tied, bias=base is QWEN
    )
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == parameters
    write_hollow(tmp_path / "model.safetensors", shapes)
    config = base | {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
    }
    if name.startswith("Vicuna"):  # as its config.json has it
        del config["num_key_value_heads"], config["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = dataclasses.replace(IMPORT, split=ALL, patch_embed_dim=1024)
    plan = plan_import(tmp_path, options)
    assert plan.dtype == "bf16"
    assert plan.model.rope_theta == (1e4 if base is LLAMA else 1e6)
    lines = planned_mapping(tmp_path, options)
    # Every stored tensor goes into the text branch, those of the layers into the vision branch too.
    for stored, shape in shapes.items():
        found = [line for line in lines if line.startswith(f"{stored} {list(shape)} bfloat16 -> ")]
        assert len(found) == (2 if ".layers." in stored else 1), stored
    made = [line for line in lines if line.startswith("(")]
    assert len(made) == 6 + (2 * 3 * layers if base is LLAMA else 0)


def write_llama(folder: Path, **changes: Any) -> LlamaForCausalLM:
    """A small Llama with weights large enough that every part of it matters."""
    settings: dict[str, Any] = dict(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, rope_theta=5e5, rms_norm_eps=1e-5,
        max_position_embeddings=256, initializer_range=0.3, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(3)
    llama = LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()
    llama.save_pretrained(folder)
    return llama


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_key_value_heads": 4, "rope_theta": 1e4}, {"tie_word_embeddings": True}],
    ids=["llama-3", "vicuna", "tied"],
)
def test_a_llama_keeps_its_function(
    changes: dict[str, Any], tokenizer_folder: Path, tmp_path: Path, gloo1: Any
) -> None:
    """Biases of q, k and v become zeros; the released EVE speaks as transformers' Llama does."""
    write_llama(tmp_path / "llama", **changes)
    assert gloo1.run(run_import, tmp_path / "llama", tmp_path / "megatron", split=ALL) == ["fp32"]
    (state,) = gloo1.run(whole_hf_state, tmp_path / "megatron")
    biases = [name for name in state if name.endswith("_proj.bias")]
    assert len(biases) == 2 * 2 * 3
    assert not any(state[name].any() for name in biases)
    eve = tmp_path / "eve"
    assert gloo1.run(run_export, tmp_path / "megatron", eve, tokenizer_folder, 64) == [""]
    assert logits_gap(tmp_path / "llama", eve) < 1e-4
    result = compare_tensors(tmp_path / "llama", eve, allow_extra=True)
    assert result.differences == ()
    assert result.num_tensors == len(load_file(tmp_path / "llama/model.safetensors"))


def test_logits_tell_another_decoder(tmp_path: Path) -> None:
    """The comparison above can fail: the same weights with another rope_theta."""
    write_llama(tmp_path / "one")
    write_llama(tmp_path / "other", rope_theta=1e4)
    assert compare_tensors(tmp_path / "one", tmp_path / "other").differences == ()
    (constant,) = compare_constants(tmp_path / "one", tmp_path / "other")
    assert (constant.name, constant.reason.split()[2]) == ("model.rope_theta", "10000.0")
    assert compare_constants(tmp_path / "one", tmp_path / "one") == ()
    assert logits_gap(tmp_path / "one", tmp_path / "other") > 1e-2


def test_stored_rotary_frequencies_must_be_the_configured_ones(tmp_path: Path) -> None:
    """Early Vicuna and Llama checkpoints hold them as buffers of every layer."""
    write_llama(tmp_path, rope_theta=1e4)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    key = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    right = 1e4 ** -(torch.arange(0, 8, 2) / 8)

    def store(frequencies: torch.Tensor) -> None:
        save_file(state | {key.format(i): frequencies.clone() for i in range(2)}, file)

    for dtype in (torch.float32, torch.float16):
        store(right.to(dtype))
        plan = plan_import(tmp_path, IMPORT)
        assert not any("inv_freq" in name for name in plan.headers)
        checked = [line for line in planned_mapping(tmp_path, IMPORT) if "inv_freq" in line]
        assert len(checked) == 2
        assert checked[0].endswith("-> (compared with what the configuration gives)")
    store(right * 0.5)
    plan = plan_import(tmp_path, IMPORT)
    with pytest.raises(
        CheckpointError, match="holds other frequencies than rope_theta=10000 gives"
    ):
        plan.tensors(new_patch_embedding={})
    save_file(state | {key.format(0): torch.zeros(3)}, file)
    with pytest.raises(CheckpointError, match=r"inv_freq' has shape \[3\].*\[4\]"):
        plan_import(tmp_path, IMPORT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling has RoPE of type 'linear'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "RoPE of type 'llama3'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "RoPE of type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters has RoPE of type 'yarn'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor is 0.25"),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e4}}, "rope_theta is 500000.0 and 10000.0 in rope_par"),
        ({"attention_bias": True}, "attention_bias is True .biases on the attention's proj"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"use_qk_norm": True}, "use_qk_norm is True .norms on queries"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"model_type": "eve-llama3"}, "'eve-llama3' .the official Llama-3 code"),
        ({"model_type": "eve"}, "'eve' .EVEv1, which has another patch embedding"),
        ({"intermediate_size": 47}, r"gate_proj.weight' has shape \[48, 32\].*\[47, 32\]"),
        ({"num_hidden_layers": 1}, r"has 9 tensors that the model does not: model.layers.1"),
        ({"num_hidden_layers": 3}, r"lacks 9 tensors: model.layers.2"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_this_decoder_does_not_compute_is_refused_by_name(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    plan_import(tmp_path, IMPORT)
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=message):
        plan_import(tmp_path, IMPORT)


def test_a_field_that_a_llama_leaves_out_means_what_transformers_says(tmp_path: Path) -> None:
    """Early config.json files lack some of them; the newest have rope_theta in rope_parameters."""
    write_llama(tmp_path, tie_word_embeddings=False)
    config = json.loads((tmp_path / "config.json").read_text())
    optional = (
        *("hidden_act", "rms_norm_eps", "rope_theta", "max_position_embeddings"),
        *("tie_word_embeddings", "initializer_range", "num_key_value_heads"),
    )
    bare = {name: value for name, value in config.items() if name not in optional}
    (tmp_path / "config.json").write_text(json.dumps(bare))
    meant, found = LlamaConfig(**bare), read_hf_config(tmp_path, patch_embed_dim=8).model
    assert found.rms_norm_eps == meant.rms_norm_eps
    assert found.rope_theta == meant.rope_theta
    assert found.max_position_embeddings == meant.max_position_embeddings
    assert found.tie_word_embeddings == meant.tie_word_embeddings
    assert found.init_std == meant.initializer_range
    assert found.num_kv_heads == meant.num_key_value_heads
    assert meant.hidden_act == "silu"
    (tmp_path / "config.json").write_text(
        json.dumps(bare | {"rope_parameters": {"rope_theta": 5e5}})
    )
    assert read_hf_config(tmp_path, patch_embed_dim=8).model.rope_theta == 5e5


def release_weights(megatron: Path, folder: Path) -> None:
    """In a worker: the weights of a release, without its other files."""
    folder.mkdir()
    write_safetensors(folder, hf_stream(read_megatron(megatron)))


@pytest.mark.parametrize("case", ["v2.0", "v2.0-tied", "v1.5", "dense"])
def test_official_checkpoints_come_back_to_the_byte(case: str, tmp_path: Path, gloo1: Any) -> None:
    """tests/golden/official: saved by the official classes."""
    write_official_folder(case, tmp_path / "official")
    gloo1.run(run_import, tmp_path / "official", tmp_path / "megatron")
    gloo1.run(release_weights, tmp_path / "megatron", tmp_path / "back")
    file = "model.safetensors"
    assert (tmp_path / "back" / file).read_bytes() == (tmp_path / "official" / file).read_bytes()


@pytest.mark.parametrize("rows", [61, 58, 64], ids=["as-configured", "cut", "padded"])
def test_official_vocabularies(rows: int, tmp_path: Path, gloo1: Any) -> None:
    """152064 rows in the release, 151665 after the official loader, padded by others: config.json says which, and
    where it does not, it is asked for."""
    write_official_folder("v2.0", tmp_path / "official")
    file = tmp_path / "official/model.safetensors"
    state, original = load_file(file), initial_weights("v2.0")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        padding = torch.zeros(max(rows - 61, 0), 32)
        state[name] = torch.cat((original[name], padding))[:rows].contiguous()
    save_file(state, file)
    if rows != 61:
        (message,) = gloo1.run(run_import, tmp_path / "official", tmp_path / "megatron")
        assert f"'model.embed_tokens.weight' has shape [{rows}, 32]" in message
        assert "--vocab-size" in message
    gloo1.run(run_import, tmp_path / "official", tmp_path / "megatron", vocab_size=61)
    (found,) = gloo1.run(whole_hf_state, tmp_path / "megatron")
    kept = min(rows, 61)
    for name, tensor in original.items():
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name][:kept], tensor[:kept]), name
    assert not found["lm_head.weight"][kept:].any()
    config = json.loads((tmp_path / "official/config.json").read_text())
    (tmp_path / "official/config.json").write_text(json.dumps(config | {"vocab_size": rows}))
    gloo1.run(run_import, tmp_path / "official", tmp_path / "as-stored")
    (found,) = gloo1.run(whole_hf_state, tmp_path / "as-stored")
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_official_folder_with_old_names(tmp_path: Path, gloo1: Any) -> None:
    write_official_folder("v2.0", tmp_path / "official")
    file = tmp_path / "official/model.safetensors"
    state = load_file(file)
    for old, now in HF_ALIASES.items():
        state[old] = state.pop(now)
    save_file(state, file)
    lines = planned_mapping(tmp_path / "official", IMPORT)
    old = "model.vision_tower.start_embedding [32] float32 -> patch_embedding.class_embedding"
    assert old in lines
    assert not any("compared" in line for line in lines)
    gloo1.run(run_import, tmp_path / "official", tmp_path / "megatron")
    gloo1.run(release_weights, tmp_path / "megatron", tmp_path / "back")
    back = load_file(tmp_path / "back/model.safetensors")
    assert all(torch.equal(back[n], t) for n, t in initial_weights("v2.0").items())


def test_the_official_layout(full_release: Any, tmp_path: Path, gloo1: Any) -> None:
    """Nothing of ours in it; the fields of the official classes are those that they wrote themselves."""
    folder, _ = full_release
    gloo1.run(run_import, folder, tmp_path / "megatron")
    out = tmp_path / "official"
    assert gloo1.run(run_export, tmp_path / "megatron", out, folder, 800, layout="official") == [""]
    assert (out / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    config = json.loads((out / "config.json").read_text())
    official = json.loads((GOLDEN / "configs.json").read_text())["v2.0"]
    assert official.keys() - config.keys() == {"transformers_version"}
    assert config.keys() <= official.keys() | {"vision_tower_lr", "tune_VE", "tune_LLM", "tune_MOE"}
    assert config["mm_vision_tower"] == "openai/eve-anyratio-res800-patch2"
    processor = json.loads(
        (out / config["mm_vision_tower"] / "preprocessor_config.json").read_text()
    )
    assert (processor["max_size"], processor["patch_stride"], processor["dense_stride"]) == (
        800,
        2,
        2,
    )
    assert "auto_map" not in processor
    assert not list(out.glob("*.py"))
    assert gloo1.run(run_import, out, tmp_path / "again") == ["fp32"]
    assert compare_tensors(folder, tmp_path / "again").differences == ()
    assert logits_gap(folder, out) == logits_gap(out, folder) == 0
    state = load_file(out / "model.safetensors")
    state["model.layers.1.moe_mlp.down_proj.weight"] *= 2  # of vision tokens alone
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    assert logits_gap(folder, out) > 1e-4
    del state["model.norm.weight"]
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"official lacks model\.norm\.weight"):
        logits_gap(folder, out)
    tower = out / config["mm_vision_tower"] / "preprocessor_config.json"
    tower.write_text("{}")
    with pytest.raises(CheckpointError, match="does not say patch_stride and dense_stride"):
        plan_import(out, IMPORT)


def test_a_new_patch_embedding_is_the_models_own(tmp_path: Path, gloo1: Any) -> None:
    """Drawn without the model, it is what EveModel draws with the same seed."""
    assert gloo1.run(_drawn_and_built, tmp_path) == [True]


def _drawn_and_built(folder: Path) -> bool:
    from megatron_eve.model.build import build_model
    from megatron_eve.parallel.groups import init_model_parallel
    from tests.support.tiny import layout, tiny_model

    model = tiny_model()
    state = init_model_parallel(layout(), seed=7)
    ((chunk,), _) = build_model(
        run_config(model, layout(), train=dict(dtype="bf16", seed=7)), state=state
    )
    drawn = new_patch_embedding(model, "bf16", dataclasses.replace(IMPORT, seed=7))
    built = chunk.state_dict()
    return len(drawn) == 6 and all(
        torch.equal(drawn[hf], built[eve])
        for hf, eve in (
            ("model.vision_tower.patch_embedding.0.weight", "patch_embedding.conv1.weight"),
            ("model.vision_tower.patch_embedding.2.bias", "patch_embedding.conv2.bias"),
            ("model.vision_tower.split_embedding", "patch_embedding.split_embedding"),
        )
    )
