# SPDX-License-Identifier: Apache-2.0
"""Ideal FLOPs term by term, worked out by hand, and the work that a pack's samples need."""

import dataclasses

import pytest
import torch

from megatron_eve.config.recipes.shapes import qwen2_5_7b
from megatron_eve.config.schema import SplitConfig, TrainableGroup
from megatron_eve.config.variants import VARIANTS
from megatron_eve.data.sample import Pack
from megatron_eve.metrics.flops import Products, Work, ideal_flops, matrix_products, needed_work
from tests.metrics.batches import ALIGN, sample
from tests.support.tiny import ALL, DENSE, naive_pack, tiny_model

EVERYTHING: tuple[TrainableGroup, ...] = ("patch_embedding", "vision", "text")
# Weights: q 8 x 8, k and v 8 x 8 together, o 8 x 8, gate and up 8 x 10, down 5 x 8, output 8 x 11; the convolutions
# 12 x 6 and 24 x 8.
MODEL = dataclasses.replace(
    tiny_model(ALL, layers=2),
    hidden_size=8,
    ffn_hidden_size=5,
    num_attention_heads=2,
    num_kv_heads=1,
    head_dim=4,
    vocab_size=11,
    patch_embed_dim=6,
)
# One sample: an image of 4 patches, CLS and 2 SPL, then 3 text tokens. Labels on the last SPL (place 7 of 10) and on
# the first two text tokens (8 and 9).
WORK = Work(
    patches=4,
    vision=7,
    text=3,
    pairs=55,
    last_vision=1,
    last_text=2,
    query_vision=1,
    query_text=2,
    last_pairs=7 + 8 + 9,
    labels=3,
)


def counted(trainable, split: SplitConfig = ALL, work: Work = WORK) -> dict[str, Products]:  # type: ignore[no-untyped-def]
    model = dataclasses.replace(MODEL, split=split)
    return matrix_products(model, work, trainable=trainable)


def products(forward: int, input_gradient: int, weight_gradient: int) -> Products:
    return Products(forward=forward, input_gradient=input_gradient, weight_gradient=weight_gradient)


CONV1, CONV2 = 2 * (4 * 4) * (12 * 6), 2 * 4 * (24 * 8)  # 16 windows of 12 pixels, 4 of 24 features
QKV = 2 * 10 * 64 + 2 * 10 * 64 + 2 * 3 * 64 + 2 * 10 * 64  # q, kv; of the last layer: 3 q, 10 kv
PAIRS = 2 * (2 * 8 * 55) + 2 * (2 * 8 * 24)  # scores and values, of both layers
PROJ = 2 * 10 * 64 + 2 * 3 * 64
FFN = 2 * 10 * (80 + 40) + 2 * 3 * (80 + 40)
OUTPUT = 2 * 3 * 88


def test_everything_trained() -> None:
    """Every product has both gradients, but pixels need none; attention's backward is four products."""
    assert counted(EVERYTHING) == {
        "patch_embedding": products(CONV1 + CONV2, CONV2, CONV1 + CONV2),
        "qkv": products(QKV, QKV, QKV),
        "attention": products(PAIRS, 2 * PAIRS, 0),
        "proj": products(PROJ, PROJ, PROJ),
        "ffn": products(FFN, FFN, FFN),
        "output": products(OUTPUT, OUTPUT, OUTPUT),
    }


def test_stage_1_sends_gradients_through_a_frozen_decoder() -> None:
    """No weight gradient but the patch embedding's. The first layer's text rows have nothing trained before them."""
    text_rows_of_first_layer = 2 * 3 * (64 + 64)
    assert counted(("patch_embedding",), DENSE) == {
        "patch_embedding": products(CONV1 + CONV2, CONV2, CONV1 + CONV2),
        "qkv": products(QKV, QKV - text_rows_of_first_layer, 0),
        "attention": products(PAIRS, 2 * PAIRS, 0),
        "proj": products(PROJ, PROJ, 0),
        "ffn": products(FFN, FFN, 0),
        "output": products(OUTPUT, OUTPUT, 0),
    }


def test_stage_2_1_has_weight_gradients_on_vision_rows_only() -> None:
    """7 vision rows; in the last layer 1 through q, o and FFN, 7 through k and v."""
    stage_1 = counted(("patch_embedding",), DENSE)
    weight_gradients = {
        "qkv": 2 * 7 * 128 + 2 * 1 * 64 + 2 * 7 * 64,
        "proj": 2 * 7 * 64 + 2 * 1 * 64,
        "ffn": 2 * 7 * 120 + 2 * 1 * 120,
    }
    for name, flops in counted(("patch_embedding", "vision")).items():
        want = stage_1[name]
        assert (flops.forward, flops.input_gradient) == (want.forward, want.input_gradient)
        assert flops.weight_gradient == weight_gradients.get(name, want.weight_gradient)


def test_text_stage_trains_no_patch_embedding() -> None:
    """Were there an image, it would go forward only; its rows' first input gradient stops at the frozen features."""
    flops = counted(("text",), DENSE)
    assert flops["patch_embedding"] == products(CONV1 + CONV2, 0, 0)
    # The shared norm before q, k and v is trained, so gradients reach its output on vision rows too.
    assert flops["qkv"] == products(QKV, QKV, QKV)
    assert flops["output"] == products(OUTPUT, OUTPUT, OUTPUT)


def test_an_untrained_norm_stops_the_first_input_gradient() -> None:
    """Text trained beside a vision branch of its own: the first layer's vision rows need no gradient of q, k and v."""
    vision_rows_of_first_layer = 2 * 7 * 128
    assert counted(("text",))["qkv"].input_gradient == QKV - vision_rows_of_first_layer
    ffn_only = counted(("vision",), SplitConfig(norm=False, attention=False, ffn=True))
    # Nothing trained lies before the first FFN; of its vision rows only `down` sends a gradient back.
    assert ffn_only["ffn"].input_gradient == 2 * 7 * 40 + 2 * 3 * 120
    # The second layer's attention is the first to get a gradient, and only vision rows ask for one before it.
    assert ffn_only["attention"].input_gradient == 2 * (2 * (2 * 8 * 24))
    assert ffn_only["qkv"].input_gradient == 2 * 1 * 64 + 2 * 7 * 64


def test_text_alone_needs_no_backward_while_only_vision_is_trained() -> None:
    work = dataclasses.replace(WORK, patches=0, vision=0, last_vision=0, query_vision=0)
    for split, trainable in ((DENSE, ("patch_embedding",)), (ALL, ("patch_embedding", "vision"))):
        flops = counted(trainable, split, work).values()
        assert sum(one.forward for one in flops) > 0
        assert sum(one.input_gradient + one.weight_gradient for one in flops) == 0


@pytest.mark.parametrize("name", VARIANTS)
def test_split_changes_no_product_when_everything_is_trained(name: str) -> None:
    """A token passes through one branch, whatever is split."""
    assert counted(EVERYTHING, VARIANTS[name]) == counted(EVERYTHING)


def test_7b_layer_has_its_published_size() -> None:
    """One text token through 28 layers: 2 FLOPs for each of 233,046,016 weights, and for the output layer's."""
    work = Work(
        patches=0,
        vision=0,
        text=1,
        pairs=1,
        last_vision=0,
        last_text=1,
        query_vision=0,
        query_text=1,
        last_pairs=1,
        labels=1,
    )
    flops = matrix_products(qwen2_5_7b(split=ALL), work, trainable=EVERYTHING)
    linears = sum(flops[name].forward for name in ("qkv", "proj", "ffn"))
    assert linears == 28 * 2 * 233_046_016
    assert flops["output"].forward == 2 * 3584 * 152_064
    assert flops["attention"].forward == 28 * 4 * 3584


def pack_of(*samples, tokens: int = 64, sample_align: int = 1) -> Pack:  # type: ignore[no-untyped-def]
    return naive_pack(
        list(samples), model=MODEL, tokens=tokens, align=ALIGN, sample_align=sample_align
    )


PICTURE = sample(
    grids=[(2, 2)], text=3, prompt=0
)  # 7 + 3 tokens, labels on SPL and two text tokens
QUESTION = sample(grids=[(1, 3), (2, 2)], text=5, prompt=2)  # 5 + 7 + 5 tokens, 3 labels
TEXT = sample(grids=[], text=6, prompt=0)  # 5 labels
UNLABELLED = sample(grids=[(2, 2)], text=4, prompt=4)


def test_work_of_a_pack_without_its_padding() -> None:
    assert list(needed_work(pack_of(PICTURE))) == [WORK]
    both, text = needed_work(pack_of(PICTURE, TEXT, QUESTION))
    assert both == Work(
        patches=4 + 7,
        vision=7 + 12,
        text=3 + 5,
        pairs=55 + 17 * 18 // 2,
        last_vision=1,
        last_text=2 + 3,
        query_vision=1,
        query_text=2 + 3,
        # Labels at 7, 8, 9 of 10, and of 17 at 14, 15, 16: the second prompt token predicts the first answer token.
        last_pairs=(7 + 8 + 9) + (14 + 15 + 16),
        labels=3 + 3,
    )
    assert text == Work(
        patches=0,
        vision=0,
        text=6,
        pairs=21,
        last_vision=0,
        last_text=5,
        query_vision=0,
        query_text=5,
        last_pairs=1 + 2 + 3 + 4 + 5,
        labels=5,
    )


def test_a_sample_without_labels_needs_nothing() -> None:
    assert list(needed_work(pack_of(UNLABELLED))) == []
    assert list(needed_work(pack_of(UNLABELLED, PICTURE))) == [WORK]
    assert list(needed_work(pack_of())) == []


@pytest.mark.parametrize(
    ("split", "trainable"),
    [(DENSE, ("text",)), (DENSE, ("patch_embedding",)), (ALL, ("patch_embedding", "vision"))],
)
def test_ideal_does_not_depend_on_packing(split, trainable) -> None:  # type: ignore[no-untyped-def]
    model = dataclasses.replace(MODEL, split=split)

    def ideal(*packs: Pack) -> int:
        return sum(ideal_flops(pack, model=model, trainable=trainable) for pack in packs)

    together = ideal(pack_of(PICTURE, QUESTION, TEXT))
    assert together == ideal(pack_of(TEXT, PICTURE, tokens=48), pack_of(QUESTION, tokens=128))
    assert together == ideal(pack_of(PICTURE), pack_of(TEXT), pack_of(QUESTION))
    assert together == ideal(pack_of(PICTURE, QUESTION, TEXT, tokens=96, sample_align=16))
    assert together > ideal(pack_of(PICTURE, TEXT)) > 0


def test_only_numbers_of_the_host_are_read() -> None:
    """No pixels: the first pipeline stage's data leader counts, and may do so before they are there."""
    pack = pack_of(PICTURE, TEXT)
    want = ideal_flops(pack, model=MODEL, trainable=EVERYTHING)
    assert pack.patches is not None and isinstance(want, int)
    bare = dataclasses.replace(pack, patches=None, text_ids=torch.empty(0, dtype=torch.int64))
    assert ideal_flops(bare, model=MODEL, trainable=EVERYTHING) == want
