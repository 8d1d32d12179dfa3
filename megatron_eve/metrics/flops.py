# SPDX-License-Identifier: Apache-2.0
"""Floating point operations of a step, from its actual packs: those that the loss and its gradients need (ideal), and
those that the processes execute. Both are sums over matrix products; no number of parameters, no 6ND.

Conventions, in full in docs/flops.md. A product [m, k] x [k, n] is 2 m k n. A linear with a weight has up to three:
forward, gradient of its input, gradient of its weight. Attention has two products over the (query, key) pairs that the
causal mask lets through, n (n + 1) / 2 for a sample of n tokens, and four in its backward. Everything else (norms,
RoPE, softmax, activations, biases, look-ups, cross entropy, optimizer) is not counted.

Host arithmetic on the pack's own integers; tests/metrics/test_flops.py compares it with the products a process runs."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_eve.config.decoder import (
    MODALITIES,
    Modality,
    Row,
    decoder_layer,
    patch_convolutions,
)
from megatron_eve.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainableGroup
from megatron_eve.config.sizes import padded_vocab_size
from megatron_eve.data.sample import VISION_PATCH, Pack
from megatron_eve.model.micro_batch import executed_rows

DECODER = ("qkv", "attention", "proj", "ffn")


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """The sizes that FLOPs follow from, of samples or of a whole pack."""

    patches: int
    vision: int  # vision rows of every layer
    text: int
    pairs: int  # (query, key) pairs under the causal masks
    last_vision: int  # vision rows of the last layer that go through o and FFN
    last_text: int
    query_vision: int  # vision rows of the last layer that go through q
    query_text: int
    last_pairs: int  # pairs of the last layer's queries
    labels: int  # rows of the output layer


@dataclass(kw_only=True, slots=True)
class Products:
    """FLOPs of the matrix products of one component."""

    forward: int = 0
    input_gradient: int = 0
    weight_gradient: int = 0

    @property
    def total(self) -> int:
        return self.forward + self.input_gradient + self.weight_gradient


class _Tally(dict[str, Products]):
    """Products by component: patch_embedding, qkv, attention, proj, ffn, output."""

    def linear(
        self, name: str, *, rows: int, size: int, input_gradient: bool, weight_gradient: bool
    ) -> None:
        """A weight of `size` elements applied to `rows` rows."""
        product, products = 2 * rows * size, self.setdefault(name, Products())
        products.forward += product
        products.input_gradient += product * input_gradient
        products.weight_gradient += product * weight_gradient

    def attention(self, *, product: int, gradient: bool) -> None:
        """Scores and their product with v; the gradients of q, k, v and of the probabilities."""
        products = self.setdefault("attention", Products())
        products.forward += 2 * product
        products.input_gradient += 4 * product * gradient


def matrix_products(
    model: ModelConfig,
    work: Work,
    *,
    trainable: tuple[TrainableGroup, ...],
    input_requires_grad: dict[Modality, bool] | None = None,
) -> dict[str, Products]:
    """FLOPs of one forward and backward by component.

    A frozen weight has no weight gradient; an input has a gradient where something that is trained lies before it, by
    layer and modality. `input_requires_grad`: of the decoder's input rows, by default exactly where the embedding of
    that modality is trained."""
    reached = input_requires_grad or {
        "vision": "patch_embedding" in trainable,
        "text": "text" in trainable,
    }
    tally = _Tally()
    _patch_embedding(tally, model, patches=work.patches, trained="patch_embedding" in trainable)
    for number in range(model.num_layers):
        layer = _Layer(model, work, trainable=trainable, last=number == model.num_layers - 1)
        reached = layer.add_to(tally, reached)
    text = "text" in trainable  # the final norm and the output layer
    tally.linear(
        "output",
        rows=work.labels,
        size=model.hidden_size * model.vocab_size,
        input_gradient=any(reached.values()) or text,
        weight_gradient=text,
    )
    return tally


def _patch_embedding(tally: _Tally, model: ModelConfig, *, patches: int, trained: bool) -> None:
    """Two convolutions on windows that do not overlap. Nobody needs the gradient of pixels."""
    for number, convolution in enumerate(patch_convolutions(model)):
        tally.linear(
            "patch_embedding",
            rows=patches * convolution.windows,
            size=convolution.weights,
            input_gradient=trained and number > 0,
            weight_gradient=trained,
        )


class _Layer:
    """One decoder layer. In the last one a row whose output is not needed has k and v only."""

    def __init__(
        self, model: ModelConfig, work: Work, *, trainable: tuple[TrainableGroup, ...], last: bool
    ) -> None:
        self._table, self._split, self._trainable = decoder_layer(model), model.split, trainable
        self._rows: dict[Modality, int] = {"vision": work.vision, "text": work.text}
        self._out_rows = self._query_rows = self._rows
        self._pairs = work.pairs
        if last:
            self._out_rows = {"vision": work.last_vision, "text": work.last_text}
            self._query_rows = {"vision": work.query_vision, "text": work.query_text}
            self._pairs = work.last_pairs

    def add_to(self, tally: _Tally, reached: dict[Modality, bool]) -> dict[Modality, bool]:
        """Count the layer. `reached`: whether the rows of a modality require gradients, before and after."""
        present = [modality for modality in MODALITIES if self._rows[modality]]
        attended = self._attention(tally, {modality: reached[modality] for modality in present})
        return dict.fromkeys(MODALITIES, False) | {
            modality: self._ffn(tally, modality, reached=reached[modality] or attended)
            for modality in present
        }

    def _attention(self, tally: _Tally, reached: dict[Modality, bool]) -> bool:
        """Returns whether its output requires gradients: of all rows, for attention joins the modalities."""
        table = self._table
        normed = {m: before or self._trains(table.input_norm, m) for m, before in reached.items()}
        for modality in reached:
            for part in table.qkv.parts:
                rows = self._query_rows if part.of_queries else self._rows
                tally.linear(
                    "qkv",
                    rows=rows[modality],
                    size=table.qkv.inputs * part.rows,
                    input_gradient=normed[modality],
                    weight_gradient=self._trains(table.qkv, modality),
                )
        attended = any(normed[m] or self._trains(table.qkv, m) for m in reached)
        tally.attention(product=2 * table.query_width * self._pairs, gradient=attended)
        for modality in reached:
            tally.linear(
                "proj",
                rows=self._out_rows[modality],
                size=table.proj.weights,
                input_gradient=attended,
                weight_gradient=self._trains(table.proj, modality),
            )
        return attended

    def _ffn(self, tally: _Tally, modality: Modality, *, reached: bool) -> bool:
        table = self._table
        reached = reached or self._trains(table.ffn_norm, modality)
        for linear in (table.fc1, table.fc2):
            trained = self._trains(linear, modality)
            tally.linear(
                "ffn",
                rows=self._out_rows[modality],
                size=linear.weights,
                input_gradient=reached,
                weight_gradient=trained,
            )
            reached = reached or trained
        return reached

    def _trains(self, row: Row, modality: Modality) -> bool:
        return row.group(modality, self._split) in self._trainable


def ideal_flops(pack: Pack, *, model: ModelConfig, trainable: tuple[TrainableGroup, ...]) -> int:
    """FLOPs that the loss of the pack's samples and its gradients need, however they are packed and computed."""
    return sum(
        products.total
        for work in needed_work(pack)
        for products in matrix_products(model, work, trainable=trainable).values()
    )


def needed_work(pack: Pack) -> Iterator[Work]:
    """The work of the pack's samples, padding left out, one sum for samples of each kind (both modalities, one alone).

    Of a sample without labels nothing is needed. In the last layer the rows with a label are: they alone go on."""
    samples = _Samples(pack)
    for has_vision in (True, False):
        for has_text in (True, False):
            chosen = (samples.labels > 0) & ((samples.vision > 0) == has_vision)
            chosen &= (samples.text > 0) == has_text
            if chosen.any():
                yield samples.work(chosen)


class _Samples:
    """Per-sample counts of a pack: [num_samples] int64 each, in sequence order."""

    def __init__(self, pack: Pack) -> None:
        vision_places = pack.modality_order[: pack.num_vision]
        label_places = pack.modality_order[pack.label_rows]
        self._bounds = pack.cu_seqlens[: len(pack.sample_ids) + 1].long()
        self._num_tokens = pack.num_tokens
        self.length = self._bounds.diff() - torch.tensor(pack.sample_padding, dtype=torch.int64)
        self.vision = self._per_sample(vision_places)
        self.text = self.length - self.vision
        self.patches = self._per_sample(vision_places[pack.vision_kind == VISION_PATCH])
        self.labels = self._per_sample(label_places)
        is_vision = pack.label_rows < pack.num_vision
        self.vision_labels = self._per_sample(label_places[is_vision])
        # A label's query sees the tokens up to its own.
        self.label_pairs = self._per_sample(label_places, pack.position_ids[label_places] + 1)

    def _per_sample(self, places: Tensor, values: Tensor | None = None) -> Tensor:
        """Sum of `values` (1 each by default) over those of `places` in each sample."""
        tokens = torch.zeros(self._num_tokens, dtype=torch.int64)
        tokens[places] = 1 if values is None else values
        sums = torch.cat([torch.zeros(1, dtype=torch.int64), tokens.cumsum(0)])
        return sums[self._bounds].diff()

    def work(self, chosen: Tensor) -> Work:
        def total(counts: Tensor) -> int:
            return int(counts[chosen].sum())

        return Work(
            patches=total(self.patches),
            vision=total(self.vision),
            text=total(self.text),
            pairs=total(self.length * (self.length + 1) // 2),
            last_vision=total(self.vision_labels),
            last_text=total(self.labels - self.vision_labels),
            query_vision=total(self.vision_labels),
            query_text=total(self.labels - self.vision_labels),
            last_pairs=total(self.label_pairs),
            labels=total(self.labels),
        )


def executed_flops(pack: Pack, *, config: RunConfig) -> int:
    """FLOPs that the processes of one replica of the model execute together for a pack: its padding, recomputation, and
    what tensor parallelism computes more than once included."""
    model, parallel = config.model, config.parallel
    products = matrix_products(
        replace(model, vocab_size=padded_vocab_size(model, tensor=parallel.tensor)),
        executed_work(pack, parallel=parallel, align=config.data.align),
        trainable=config.stage.trainable,
        # Both segments are one tensor, which requires a gradient in every stage.
        input_requires_grad={"vision": True, "text": True},
    )
    flops = sum(one.total for one in products.values())
    # Tiled attention kernels keep no scores; their backward computes them again.
    flops += products["attention"].forward // 2
    if config.train.recompute == "full":
        flops += sum(products[name].forward for name in DECODER)
    elif config.train.recompute == "selective":
        flops += products["attention"].forward
    if not parallel.sequence_parallel:
        flops += (parallel.tensor - 1) * products["patch_embedding"].total
    return flops


def executed_work(pack: Pack, *, parallel: ParallelConfig, align: int) -> Work:
    """The work of a whole pack as the model does it on all context-parallel ranks, rows that hold no token included.

    The last layer's query projection and attention run on all rows, because q, k and v are one product."""
    shards = parallel.tensor if parallel.sequence_parallel else 1
    ranks = executed_rows(pack, cp_size=parallel.context, shards=shards, align=align)
    lengths = pack.cu_seqlens.long().diff()
    pairs = int((lengths * (lengths + 1) // 2).sum())
    vision, text = sum(rank.vision for rank in ranks), sum(rank.text for rank in ranks)
    return Work(
        patches=int((pack.vision_kind == VISION_PATCH).sum()),
        vision=vision,
        text=text,
        pairs=pairs,
        last_vision=sum(rank.kept_vision for rank in ranks),
        last_text=sum(rank.kept_text for rank in ranks),
        query_vision=vision,
        query_text=text,
        last_pairs=pairs,
        labels=sum(rank.labels for rank in ranks),
    )
