# SPDX-License-Identifier: Apache-2.0
"""Pieces of text: whole characters, nothing of a stop text, and together the decoded answer."""

import random
from pathlib import Path

import pytest

from megatron_eve.data.read.tokenizer import Tokenizer, load_tokenizer
from megatron_eve.inference.text_stream import TextStream

TEXT = "  Ein Kreis ○, 三つの円, café, 👩‍👩‍👧 — red  \n blue.\n"


@pytest.fixture(scope="module")
def tokenizer(released_folder: Path) -> Tokenizer:
    """A byte-level BPE that knows few words: most characters beyond ASCII take several tokens."""
    return load_tokenizer(released_folder)


def pieces(tokenizer: Tokenizer, ids: list[int], *, stop: tuple[str, ...] = ()) -> list[str]:
    stream = TextStream(tokenizer, stop=stop)
    found = []
    for token in ids:
        found.append(stream.push(token))
        if stream.stopped:
            break
    return [*found, stream.finish()]


def test_no_piece_ends_inside_a_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    assert len(ids) > len(TEXT)  # characters are split
    found = pieces(tokenizer, ids)
    assert "".join(found) == TEXT.strip()
    assert not any("\ufffd" in piece for piece in found)
    assert len([piece for piece in found if piece]) > 15  # it comes in pieces, not at the end


def test_pieces_together_are_the_decoded_text(tokenizer: Tokenizer) -> None:
    """Any ids, also bytes that are no characters; long enough for the window to move many times."""
    choice = random.Random(0)
    for length in (1, 2, 5, 40, 700):
        for _ in range(5):
            ids = [choice.randrange(tokenizer.vocab_size) for _ in range(length)]
            text = tokenizer.decode(ids, skip_special=True)
            assert "".join(pieces(tokenizer, ids)) == text.strip()


def test_an_endless_broken_character_comes_at_the_end(tokenizer: Tokenizer) -> None:
    first_byte = tokenizer.encode("三")[0]
    found = pieces(tokenizer, [first_byte] * 300)
    assert "".join(found) == tokenizer.decode([first_byte] * 300)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("red\nblue", ("\n",), "red"),
        ("one two three", ("two thr",), "one"),
        ("one two thin", ("two thr",), "one two thin"),
        ("a###b", ("####", "##"), "a"),
        ("a#", ("##",), "a#"),
        ("xxabcabd", ("abd",), "xxabc"),
        ("\nfirst", ("\n",), ""),
        ("円と三角", ("と",), "円"),
    ],
)
def test_stop_texts_end_the_answer_and_are_not_shown(
    text: str, stop: tuple[str, ...], expected: str, tokenizer: Tokenizer
) -> None:
    found = pieces(tokenizer, tokenizer.encode(text), stop=stop)
    assert "".join(found) == expected


def test_special_tokens_have_no_text(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("red"), tokenizer.pad_id, *tokenizer.encode(" blue")]
    assert "".join(pieces(tokenizer, ids)) == "red blue"
