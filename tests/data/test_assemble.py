# SPDX-License-Identifier: Apache-2.0
"""Every tensor of a pack against a naive construction, token by token, on random samples."""

import numpy as np
import pytest
import torch

from megatron_eve.data.assemble import (
    PackMember,
    assemble_pack,
    expand,
    image_layout,
    pad_sample,
)
from megatron_eve.data.plan.packing import PackShape
from megatron_eve.data.read.conversation import IMAGE_PLACEHOLDER, EncodedSample
from megatron_eve.data.sample import (
    IGNORE,
    VISION_CLS,
    VISION_PAD,
    VISION_PATCH,
    VISION_SPL,
    Pack,
    image_token_count,
)
from megatron_eve.errors import DataError

PAD_ID, PATCH_SHAPE = 7, (4, 768)


def random_member(rng: np.random.Generator, number: int) -> tuple[PackMember, list[list[object]]]:
    """A sample, and its tokens written out naively as [kind or "text", id, label]."""
    grids = [(int(r), int(c)) for r, c in rng.integers(1, 4, (rng.integers(0, 3), 2))]
    texts = rng.integers(10, 1000, rng.integers(2, 20)).tolist()
    tokens: list[int] = [int(t) for t in texts]
    for _ in grids:
        tokens.insert(int(rng.integers(0, len(tokens) + 1)), IMAGE_PLACEHOLDER)
    ids = np.array(tokens, np.int64)
    labels = np.where((ids != IMAGE_PLACEHOLDER) & (rng.random(ids.size) < 0.5), ids, IGNORE)
    naive: list[list[object]] = []
    remaining = iter(grids)
    for token, label in zip(ids.tolist(), labels.tolist(), strict=True):
        if token != IMAGE_PLACEHOLDER:
            naive.append(["text", token, label])
            continue
        rows, cols = next(remaining)
        naive.append([VISION_CLS, None, IGNORE])
        for _ in range(rows):
            naive += [[VISION_PATCH, None, IGNORE]] * cols + [[VISION_SPL, None, IGNORE]]
    member = PackMember(
        id=f"s{number}",
        tokens=expand(EncodedSample(ids, labels, False), grids=grids),
        quarantined="undecodable" if rng.random() < 0.2 else None,
        place=2 * number + 1,
    )
    return member, naive


def assemble(members: list[PackMember], shape: PackShape) -> Pack:
    """The pack with patches whose first byte is their number, modulo 251."""
    count = sum(int((member.tokens.kinds == VISION_PATCH).sum()) for member in members)
    patches = np.zeros((count, *PATCH_SHAPE), np.uint8)
    patches[:, 0, 0] = np.arange(count) % 251
    return assemble_pack(members, patches=patches, shape=shape, pad_id=PAD_ID, step_places=40)


def check_against_naive(
    pack: Pack, members: list[PackMember], naive: list[list[list[object]]], shape: PackShape
) -> None:
    """Rebuild the pack with loops over tokens and compare every field."""
    total = shape.pack_tokens
    real = sum(map(len, naive))
    assert pack.num_tokens == total
    assert sorted(pack.modality_order.tolist()) == list(range(total))
    cu = pack.cu_seqlens.tolist()
    assert cu[: len(naive) + 1] == np.cumsum([0, *map(len, naive)]).tolist()
    assert cu[-1] == total
    sizes = np.diff(cu)
    assert all(0 < size <= shape.align for size in sizes[len(naive) :])
    assert pack.max_seqlen == sizes.max()
    assert pack.position_ids.tolist() == [i for size in sizes for i in range(size)]

    row_of = {place: row for row, place in enumerate(pack.modality_order.tolist())}
    assert pack.num_vision % shape.align == 0
    assert shape.align <= pack.num_vision <= total - shape.align
    kinds, ids = pack.vision_kind.tolist(), pack.text_ids.tolist()
    assert (len(kinds), len(ids)) == (pack.num_vision, total - pack.num_vision)
    expected_labels = {}
    for begin, tokens, member in zip(cu, naive, members, strict=False):
        for offset, (kind, token, _) in enumerate(tokens):
            row = row_of[begin + offset]
            if kind == "text":
                assert ids[row - pack.num_vision] == token
            else:
                assert kinds[row] == kind
            follows = tokens[offset + 1][2] if offset + 1 < len(tokens) else IGNORE
            if follows != IGNORE and member.quarantined is None:
                expected_labels[row] = follows
    for place in range(real, total):
        row = row_of[place]
        assert (
            (kinds[row] == VISION_PAD)
            if row < pack.num_vision
            else (ids[row - pack.num_vision] == PAD_ID)
        )
    assert pack.sample_places == tuple(2 * number + 1 for number in range(len(naive)))
    assert pack.step_places == 40
    assert pack.label_rows.tolist() == sorted(expected_labels)
    assert (
        dict(zip(pack.label_rows.tolist(), pack.label_targets.tolist(), strict=True))
        == expected_labels
    )
    for begin, end in ((0, pack.num_vision), (pack.num_vision, total)):
        places = pack.modality_order[begin:end].tolist()
        assert places == sorted(places)


@pytest.mark.parametrize("seed", range(40))
def test_pack_equals_naive_construction(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = PackShape(pack_tokens=256, align=int(rng.choice([1, 8, 32])))
    members: list[PackMember] = []
    naive: list[list[list[object]]] = []
    for number in range(int(rng.integers(0, 9))):
        member, tokens = random_member(rng, number)
        every = [token for one in [*naive, tokens] for token in one]
        num_text = sum(token[0] == "text" for token in every)
        if not shape.fits(len(every) - num_text, num_text):
            break
        members.append(member)
        naive.append(tokens)
    pack = assemble(members, shape)
    check_against_naive(pack, members, naive, shape)
    every = [token for one in naive for token in one]
    assert pack.num_real_text == sum(token[0] == "text" for token in every)
    assert pack.num_real_vision == len(every) - pack.num_real_text
    assert pack.sample_ids == tuple(member.id for member in members)
    assert pack.quarantined == tuple((m.id, m.quarantined) for m in members if m.quarantined)
    assert pack.patches is not None
    count = int((pack.vision_kind == VISION_PATCH).sum())
    assert pack.patches[:, 0, 0].tolist() == [number % 251 for number in range(count)]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("sample_align", [4, 16])
def test_padded_samples_are_the_same_samples_with_silent_text_behind(
    seed: int, sample_align: int
) -> None:
    """Also against the naive construction, in which the padding is text that has no label."""
    rng = np.random.default_rng(seed)
    shape = PackShape(pack_tokens=256, align=16)
    members, naive = [], []
    for number in range(3):
        member, tokens = random_member(rng, number)
        count = -len(tokens) % sample_align
        padded = pad_sample(member.tokens, count, pad_id=PAD_ID)
        members.append(PackMember(member.id, padded, member.quarantined, member.place))
        naive.append([*tokens, *[["text", PAD_ID, IGNORE]] * count])
    pack = assemble(members, shape)
    check_against_naive(pack, members, naive, shape)
    assert all(length % sample_align == 0 for length in pack.cu_seqlens.diff().tolist()[:3])
    real = [token for one in naive for token in one]
    num_padding = sum(member.tokens.num_padding for member in members)
    assert pack.num_real_vision + pack.num_real_text == len(real) - num_padding


def test_a_sample_that_needs_no_padding_stays_as_it_is() -> None:
    member, _ = random_member(np.random.default_rng(1), 0)
    assert pad_sample(member.tokens, 0, pad_id=PAD_ID) is member.tokens


def test_dtypes() -> None:
    member, _ = random_member(np.random.default_rng(0), 0)
    shape = PackShape(pack_tokens=256, align=32)
    pack = assemble([member], shape)
    assert pack.patches is not None
    assert pack.cu_seqlens.dtype == torch.int32
    assert pack.vision_kind.dtype == pack.patches.dtype == torch.uint8
    for tensor in (
        pack.position_ids,
        pack.modality_order,
        pack.text_ids,
        pack.label_rows,
        pack.label_targets,
    ):
        assert tensor.dtype == torch.int64


def test_padding_pack_has_one_vision_block_and_no_label() -> None:
    shape = PackShape(pack_tokens=64, align=16)
    pack = assemble([], shape)
    assert pack.num_vision == 16
    assert pack.vision_kind.tolist() == [VISION_PAD] * 16
    assert pack.text_ids.tolist() == [PAD_ID] * 48
    assert pack.cu_seqlens.tolist() == [0, 16, 32, 48, 64]
    assert pack.label_rows.numel() == pack.label_targets.numel() == 0
    assert pack.patches is not None
    assert pack.patches.shape == (0, *PATCH_SHAPE)
    assert pack.sample_ids == ()


def test_last_image_token_predicts_the_first_caption_token() -> None:
    ids = np.array([IMAGE_PLACEHOLDER, 11, 12], np.int64)
    labels = np.array([IGNORE, 11, 12], np.int64)
    tokens = expand(EncodedSample(ids, labels, False), grids=[(2, 1)])
    member = PackMember("a", tokens, None, 0)
    shape = PackShape(pack_tokens=16, align=8)
    pack = assemble([member], shape)
    assert pack.vision_kind.tolist()[:5] == [
        VISION_CLS,
        VISION_PATCH,
        VISION_SPL,
        VISION_PATCH,
        VISION_SPL,
    ]
    assert pack.label_rows.tolist() == [4, 8]  # the second SPL; the first text token
    assert pack.label_targets.tolist() == [11, 12]


def test_image_layout_counts() -> None:
    for rows, cols in ((1, 1), (25, 25), (3, 7)):
        assert image_layout(rows=rows, cols=cols).size == image_token_count(rows * 32, cols * 32)


def test_what_does_not_fit_is_refused() -> None:
    ids = np.arange(10, dtype=np.int64)
    tokens = expand(EncodedSample(ids, ids, False), grids=[])
    member = PackMember("a", tokens, None, 0)
    with pytest.raises(DataError, match="1 samples with 0 vision and 10 text tokens do not fit"):
        assemble([member], PackShape(pack_tokens=16, align=8))


def test_patches_must_be_as_many_as_the_tokens() -> None:
    patches = np.zeros((3, *PATCH_SHAPE), np.uint8)
    shape = PackShape(pack_tokens=16, align=8)
    with pytest.raises(DataError, match="3 patches given, the samples' images have 0"):
        assemble_pack([], patches=patches, shape=shape, pad_id=PAD_ID, step_places=40)


def test_grids_and_placeholders_must_match() -> None:
    ids = np.array([IMAGE_PLACEHOLDER, 1], np.int64)
    with pytest.raises(DataError, match="1 image placeholders but 2 images"):
        expand(EncodedSample(ids, ids, False), grids=[(1, 1), (1, 1)])
