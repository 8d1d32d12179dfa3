# SPDX-License-Identifier: Apache-2.0
"""Bytes on the fullest rank: what the weights cost (config/sizes.py), and what a micro-batch's backward keeps.

The terms of activations are those tensors that autograd keeps of our modules, in the order of model/layer.py, with
n = rows of the residual stream on this rank (divided by TP under sequence parallelism), m = rows between column- and
row-parallel linears (never divided), h, a = heads x head dim / TP, k = KV heads x head dim / TP, f = FFN / TP:

    norm, twice      its input n h (in fp32), its output n h if the next linear is trained, `local`: once more before
                     the weight if the weight is trained
    attention        q and k behind RoPE, q, k, v before it (v is a view of them), the output; `local` under context
                     parallelism: q behind RoPE, k and v of all ranks, a mask for each chunk of a sample, the output
    projection       its input m a, if trained
    FFN              gate and up 2 m f, silu(gate) m f, their product m f if trained, a copy of up if not split
    output           labelled rows: norm, and softmax in fp32 (4 V / TP a row) with its gradient

A frozen branch keeps what its input's gradient needs. Recomputation keeps the input of each layer (full) or q, k and v
(selective), and the backward makes one layer's activations again. Under context parallelism a rank's rows are an even
share here, one data.align less than they may be. A pipeline's first stage holds as many micro-batches as there are
stages. Exact for `local` (tests/tools/test_plan_memory.py counts); for `te` from the sources of Transformer Engine,
never compared with a GPU. Workspace is a guess: CUDA context, NCCL's and cuBLAS' buffers, fragmentation."""

import math
from dataclasses import dataclass, fields

from megatron_eve.config.decoder import MODALITIES, Row, decoder_layer, patch_convolutions
from megatron_eve.config.schema import RunConfig
from megatron_eve.config.sizes import BYTES_PER_VALUE, memory_estimate, padded_vocab_size

from .cluster import WORKSPACE
from .mix import PackRows

_FP32 = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes on the fullest rank."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    workspace: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """Bytes that one micro-batch's forward keeps on one rank."""

    embedding: int  # patch embedding; text ids are not counted
    layer: int  # one layer but the last
    last_layer: int
    output: int  # final norm and output layer
    logits: int  # softmax of the labelled rows


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rows:
    """Rows of one rank in one layer, by modality: `whole` between the linears of a block, `sharded` outside."""

    whole: dict[str, int]
    sharded: dict[str, int]

    def trained(self, rows: dict[str, int], trains: dict[str, bool]) -> int:
        return sum(count for modality, count in rows.items() if trains[modality])


def memory(config: RunConfig, rows: PackRows, *, workspace: float = WORKSPACE) -> Memory:
    """Memory of the fullest rank: the first pipeline stage, which holds most micro-batches, with the last one's logits
    where they are the same rank."""
    held = memory_estimate(config)
    one = kept(config, rows)
    parallel, model = config.parallel, config.model
    layers = model.num_layers // parallel.pipeline
    in_flight = _micro_batches_in_flight(config)
    if config.train.recompute == "full":
        inputs = _layer_input(config, rows) * layers * in_flight
        activations = one.embedding * in_flight + inputs + one.layer
    else:
        last = parallel.pipeline == 1
        per_micro_batch = one.embedding + (layers - last) * one.layer + last * one.last_layer
        activations = per_micro_batch * in_flight
    alone = parallel.pipeline == 1
    return Memory(
        weights=held.weights,
        gradients=held.gradients,
        optimizer=held.optimizer,
        activations=activations + alone * one.output,
        # The softmax, and its gradient in the activations' type while the backward starts.
        logits=alone * (one.logits + one.logits * BYTES_PER_VALUE[config.train.dtype] // _FP32),
        workspace=workspace,
    )


def _micro_batches_in_flight(config: RunConfig) -> float:
    """On the first stage of 1F1B; interleaving holds a little more (Narayanan et al. 2021, section 2.2)."""
    parallel = config.parallel
    if parallel.pipeline == 1:
        return 1.0
    if parallel.virtual_pipeline == 1:
        return float(parallel.pipeline)
    return parallel.pipeline * (
        1 + (parallel.pipeline - 1) / (parallel.pipeline * parallel.virtual_pipeline)
    )


def kept(config: RunConfig, rows: PackRows) -> Kept:
    """Tensors that autograd keeps of one micro-batch on one rank, in bytes, without recomputation of layers."""
    shards = config.parallel.tensor if config.parallel.sequence_parallel else 1
    cp = config.parallel.context
    vision, text = rows.vision // cp, rows.text // cp
    labels = rows.labels // cp
    every = _Rows(
        whole={"vision": vision, "text": text},
        sharded={"vision": vision // shards, "text": text // shards},
    )
    # The last layer goes on with the labelled rows (model/micro_batch.py).
    few = {"vision": rows.kept_vision // cp, "text": rows.kept_text // cp}
    last = _Rows(whole=few, sharded={name: count // shards for name, count in few.items()})
    return Kept(
        embedding=_embedding(config, patches=rows.patches // cp // shards),
        layer=_before_ffn(config, every, every, rows.samples) + _ffn(config, every),
        last_layer=_before_ffn(config, every, last, rows.samples) + _ffn(config, last),
        output=_output(config, labels),
        logits=labels
        * padded_vocab_size(config.model, tensor=config.parallel.tensor)
        // config.parallel.tensor
        * _FP32,
    )


def _layer_input(config: RunConfig, rows: PackRows) -> int:
    shards = config.parallel.tensor if config.parallel.sequence_parallel else 1
    per_rank = rows.all // config.parallel.context // shards
    return per_rank * config.model.hidden_size * BYTES_PER_VALUE[config.train.dtype]


def _trains(config: RunConfig, row: Row) -> dict[str, bool]:
    groups = {modality: row.group(modality, config.model.split) for modality in MODALITIES}
    return {modality: group in config.stage.trainable for modality, group in groups.items()}


def _norm(config: RunConfig, rows: _Rows, *, next_is_trained: bool) -> int:
    """Input, output and, in between, what our own norm multiplies with its weight."""
    value, hidden = BYTES_PER_VALUE[config.train.dtype], config.model.hidden_size
    count = sum(rows.sharded.values())
    local = config.train.backend == "local"
    norm = decoder_layer(config.model).input_norm  # the other one is like it
    before_weight = rows.trained(rows.sharded, _trains(config, norm))
    kept_input = count * hidden * (_FP32 if local else value)
    scale = count * _FP32
    return (
        kept_input
        + scale
        + next_is_trained * count * hidden * value
        + local * before_weight * hidden * value
    )


def _before_ffn(config: RunConfig, rows: _Rows, kept_rows: _Rows, samples: float) -> int:
    """The first norm, attention, and its projection on the rows that go on."""
    layer = decoder_layer(config.model)
    trained = any(_trains(config, layer.proj).values())
    inputs, _ = layer.proj.on_rank(config.parallel.tensor)
    projected = trained * sum(kept_rows.whole.values()) * inputs
    projected *= BYTES_PER_VALUE[config.train.dtype]
    core = _core_attention(config, samples)
    return _norm(config, rows, next_is_trained=trained) + core + projected


def _core_attention(config: RunConfig, samples: float) -> int:
    """Of this rank's tokens, which rows without a token are not among."""
    model, tensor, cp = config.model, config.parallel.tensor, config.parallel.context
    value, tokens = BYTES_PER_VALUE[config.train.dtype], config.data.pack_tokens // cp
    layer = decoder_layer(model)
    attention, key = layer.query_width // tensor, layer.key_width // tensor
    # RoPE makes new tensors of q and k; v is a view, which keeps all of q, k, v in sequence order.
    inputs = tokens * (2 * attention + 3 * key) * value
    if config.train.recompute == "selective":
        return inputs
    output = tokens * attention * value + tokens * model.num_attention_heads // tensor * _FP32
    if config.train.backend == "local" and cp > 1:
        inputs = tokens * (attention + 2 * key * cp) * value
        inputs += _chunk_masks(config, samples) * value
    return inputs + output


def _chunk_masks(config: RunConfig, samples: float) -> int:
    """Values in the masks of VarlenSdpa on the ranks that have most: a chunk's queries times the keys up to its end. Of
    a sample's 2 cp chunks rank r > 0 has those that end with the (r + 1)-th and the (2 cp - r)-th."""
    if samples <= 0:
        return 0
    chunks = 2 * config.parallel.context
    chunk = config.data.pack_tokens / samples / chunks
    return round(samples * chunk * chunk * (chunks + 1))


def _ffn(config: RunConfig, rows: _Rows) -> int:
    """The second norm and the FFN."""
    fc2 = decoder_layer(config.model).fc2
    width, _ = fc2.on_rank(config.parallel.tensor)
    value, trains = BYTES_PER_VALUE[config.train.dtype], _trains(config, fc2)
    # megatron-core's own MLP, which an FFN without a split is, adds an offset of 0 to `up`: a copy.
    middle = (3 if fc2.is_split(config.model.split) else 4) * sum(rows.whole.values())
    middle += rows.trained(rows.whole, trains)
    return _norm(config, rows, next_is_trained=any(trains.values())) + middle * width * value


def _embedding(config: RunConfig, *, patches: int) -> int:
    """The patch embedding: pixels, what goes into GELU, and what comes out of it; nothing where it is frozen."""
    if "patch_embedding" not in config.stage.trainable:
        return 0
    first, _ = patch_convolutions(config.model)
    widths = math.prod(first.inputs) + 2 * first.outputs
    return patches * first.windows * widths * BYTES_PER_VALUE[config.train.dtype]


def _output(config: RunConfig, labels: int) -> int:
    """The final norm, which is ours in both backends and sees gathered rows."""
    value, hidden = BYTES_PER_VALUE[config.train.dtype], config.model.hidden_size
    trained = "text" in config.stage.trainable
    return labels * (hidden * _FP32 + _FP32 + trained * 2 * hidden * value)
