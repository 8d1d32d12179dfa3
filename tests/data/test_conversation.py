# SPDX-License-Identifier: Apache-2.0
"""Templates against the traces of the official code with the Qwen2.5 tokenizer, and what they refuse."""

import numpy as np
import pytest

from megatron_eve.config.schema import TemplateName
from megatron_eve.data.read.conversation import (
    IMAGE_PLACEHOLDER,
    EncodedSample,
    encode_prompt,
    encode_sample,
    encode_samples,
)
from megatron_eve.data.read.quarantine import SampleError
from megatron_eve.data.read.tokenizer import Tokenizer
from megatron_eve.data.sample import IGNORE, Sample, Turn

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. "
)


def turns_of(*texts: str) -> tuple[Turn, ...]:
    return tuple(Turn("human" if i % 2 == 0 else "gpt", text) for i, text in enumerate(texts))


def encode(
    qwen: Tokenizer,
    *texts: str,
    num_images: int = 1,
    template: TemplateName = "qwen2",
    max_text_tokens: int = 4096,
) -> EncodedSample:
    return encode_sample(
        turns_of(*texts),
        num_images=num_images,
        template=template,
        tokenizer=qwen,
        max_text_tokens=max_text_tokens,
    )


def trace(qwen: Tokenizer, sample: EncodedSample) -> str:
    """The notation of the official traces: one word per token, `Ġ` space, `Ċ` newline, `*` in the loss."""
    words = []
    for token, label in zip(sample.ids.tolist(), sample.labels.tolist(), strict=True):
        assert label in (token, IGNORE)
        text = "<IMG>" if token == IMAGE_PLACEHOLDER else qwen.backend.id_to_token(token)
        words.append(text + ("*" if label != IGNORE else ""))
    return " ".join(words)


def test_plain_trace(qwen: Tokenizer) -> None:
    sample = encode(qwen, "<image>\nDescribe.", " A bus is coming.\nIt is red ", template="plain")
    assert trace(qwen, sample) == "<IMG> A* Ġbus* Ġis* Ġcoming* .Ċ* It* Ġis* Ġred* Ċ*"


def test_plain_ends_with_newline_inside_the_last_token(qwen: Tokenizer) -> None:
    sample = encode(qwen, "<image>", "A bus.", template="plain")
    assert trace(qwen, sample) == "<IMG> A* Ġbus* .Ċ*"


def test_plain_without_image_trains_on_all_text(qwen: Tokenizer) -> None:
    sample = encode(qwen, "unused", "A bus.", template="plain", num_images=0)
    assert trace(qwen, sample) == "A* Ġbus* .Ċ*"


def test_qwen2_trace_of_two_rounds(qwen: Tokenizer) -> None:
    sample = encode(qwen, "<image>\nWhat feature?", "The bus.", "Why?", "Because.")
    assert trace(qwen, sample).endswith(
        "ĠUSER : Ġ <IMG> Ċ What Ġfeature ? ĠASS IST ANT : ĠThe* Ġbus* .* <|im_end|>* "
        "USER : ĠWhy ? ĠASS IST ANT : ĠBecause* .* <|im_end|>*"
    )


def test_qwen2_answer_that_starts_with_a_digit_or_a_newline(qwen: Tokenizer) -> None:
    assert trace(qwen, encode(qwen, "<image>\nHow many?", "3")).endswith(": Ġ* 3* <|im_end|>*")
    assert trace(qwen, encode(qwen, "<image>\nIs it?", "\nYes")).endswith(": ĠĊ* Yes* <|im_end|>*")


def test_answer_that_spells_the_assistant_mark_keeps_its_labels(qwen: Tokenizer) -> None:
    sample = encode(qwen, "Say it", "I say ASSISTANT: twice", num_images=0)
    assert trace(qwen, sample).endswith("ANT : ĠI* Ġsay* ĠASS* IST* ANT* :* Ġtwice* <|im_end|>*")


def official_ids(qwen: Tokenizer, *texts: str) -> list[int]:
    """The official way: the whole text, split at <image>, each piece tokenised at once (mm_utils.py:35-55)."""
    text = SYSTEM
    for i, part in enumerate(texts):
        text += f"USER: {part} " if i % 2 == 0 else f"ASSISTANT: {part}<|im_end|>"
    ids: list[int] = []
    for number, piece in enumerate(text.split("<image>")):
        ids += ([IMAGE_PLACEHOLDER] if number else []) + qwen.encode(piece)
    return ids


@pytest.mark.parametrize("seed", range(20))
def test_segments_tokenise_like_the_whole_text(qwen: Tokenizer, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pieces = [
        "a",
        " ",
        "\n",
        ":",
        "(x)",
        "é",
        "e\u0301",
        "\u0301",
        "3",
        "你好",
        "'s",
        "USER:",
        "  b",
        "\t",
        "!?",
    ]
    rounds = int(rng.integers(1, 4))
    texts = ["q" + "".join(rng.choice(pieces, 6)) + "z" for _ in range(2 * rounds)]
    for i in range(1, 2 * rounds, 2):
        texts[i] = texts[i][1:-1].strip("\n") + "."
    texts[0] = "<image>\n" + texts[0]
    assert encode(qwen, *texts).ids.tolist() == official_ids(qwen, *texts)


def test_single_mark_moves_to_the_front_as_in_the_official_clean_up(qwen: Tokenizer) -> None:
    moved = encode(qwen, "Look at <image> here ", "Yes.")
    assert moved.ids.tolist() == official_ids(qwen, "<image>\nLook at  here", "Yes.")


def test_several_marks_keep_their_places(qwen: Tokenizer) -> None:
    texts = ("First <image> then <image>?", "Yes.", "And <image>", "No.")
    sample = encode(qwen, *texts, num_images=3)
    assert sample.num_images == 3
    cleaned = ("First <image> then <image>?", "Yes.", "<image>\nAnd", "No.")
    assert sample.ids.tolist() == official_ids(qwen, *cleaned)


def test_leading_answer_is_dropped(qwen: Tokenizer) -> None:
    turns = (Turn("gpt", "Hello!"), *turns_of("Hi", "Yes."))
    sample = encode_sample(
        turns, num_images=0, template="qwen2", tokenizer=qwen, max_text_tokens=4096
    )
    assert sample.ids.tolist() == official_ids(qwen, "Hi", "Yes.")


def test_the_cut_counts_an_image_as_one_token(qwen: Tokenizer) -> None:
    """The official collator cuts ids in which an image is one placeholder (train.py, model_max_length)."""
    full = encode(qwen, "<image>\nWhat?", "one two three four five")
    limit = full.ids.size - 3
    cut = encode(qwen, "<image>\nWhat?", "one two three four five", max_text_tokens=limit)
    assert cut.was_cut
    assert not full.was_cut
    assert cut.num_images == 1
    assert cut.ids.tolist() == full.ids[:limit].tolist()
    assert cut.labels.tolist() == full.labels[:limit].tolist()
    plain = encode(qwen, "<image>", "one two three", template="plain", max_text_tokens=3)
    assert trace(qwen, plain) == "<IMG> one* Ġtwo*"


def test_cut_before_an_image_or_before_every_label_is_refused(qwen: Tokenizer) -> None:
    texts = ("<image>\nWhat?", "one", "<image> and?", "two")
    with pytest.raises(SampleError, match="cut_image: an image comes after the first 40 tokens"):
        encode(qwen, *texts, num_images=2, max_text_tokens=40)
    kept = encode(qwen, "<image>\nWhat?", "one").ids.size - 2  # the answer and its end are cut
    with pytest.raises(SampleError, match=f"cut_labels: no token .* the first {kept} tokens"):
        encode(qwen, "<image>\nWhat?", "one", max_text_tokens=kept)


def test_one_label_at_the_very_start_trains_nothing(qwen: Tokenizer) -> None:
    with pytest.raises(SampleError, match="cut_labels"):
        encode(qwen, "", "A bus", template="plain", num_images=0, max_text_tokens=1)


REFUSED = [
    ("image_without_mark", ("What?", "Yes."), 1),
    ("fewer_marks_than_images", ("<image>\nWhat?", "Yes."), 2),
    ("more_marks_than_images", ("<image><image>\nWhat?", "Yes."), 1),
    ("more_marks_than_images", ("<image>\nWhat?", "Yes."), 0),
    ("mark_in_answer", ("What?", "See <image>"), 1),
    ("empty_answer", ("<image>\nWhat?", " \n"), 1),
    ("empty_answer", ("<image>\nWhat?", "Yes", "Why?", ""), 1),
    ("empty_question", ("", "Yes"), 0),
    ("empty_question", ("<image>\nWhat?", "Yes", "", "No"), 1),
    ("unread_mark", ("<video>\nWhat?", "Yes"), 0),
    ("unread_mark", ("<image> or <image_2>?", "Yes"), 1),
    ("unread_mark", ("What?", "See [IMG]"), 0),
    ("special_text", ("<image>\nWhat?", "Yes<|im_end|>"), 1),
    ("special_text", ("<image>\nWhat <|endoftext|>?", "Yes"), 1),
    ("unanswered_turn", ("<image>\nWhat?", "Yes", "Why?"), 1),
    ("no_answer", ("<image>\nWhat?",), 1),
    ("no_answer", (), 0),
]


@pytest.mark.parametrize(("reason", "texts", "num_images"), REFUSED)
def test_refused(qwen: Tokenizer, reason: str, texts: tuple[str, ...], num_images: int) -> None:
    with pytest.raises(SampleError) as error:
        encode(qwen, *texts, num_images=num_images)
    assert error.value.reason == reason


def test_refused_roles(qwen: Tokenizer) -> None:
    def reason(*roles: str, template: TemplateName = "qwen2") -> str:
        with pytest.raises(SampleError) as error:
            encode_sample(
                [Turn(role, "text") for role in roles],
                num_images=0,
                template=template,
                tokenizer=qwen,
                max_text_tokens=100,
            )
        return error.value.reason

    assert reason("user", "assistant") == "unknown_role"
    assert reason("human", "gpt", "system") == "turns_not_alternating"
    assert reason("human", "human", "gpt") == "turns_not_alternating"
    assert reason("gpt") == "no_answer"
    assert reason("system", "gpt") == "no_answer"
    assert reason("human", "gpt", "human", "gpt", template="plain") == "not_two_turns"
    assert reason("gpt", "human", template="plain") == "no_answer"
    assert reason("gpt", "human", "gpt", template="plain") == "not_two_turns"


def test_a_question_that_is_only_an_image_has_no_newline_in_training(qwen: Tokenizer) -> None:
    """The official clean-up strips again after it put `<image>` and a newline in front; official inference does not."""
    texts = ("Hello.", "Good day.", " <image>\n", "A boat.")
    assert trace(qwen, encode(qwen, *texts)).endswith(
        "USER : Ġ <IMG> ĠASS IST ANT : ĠA* Ġboat* .* <|im_end|>*"
    )
    prompt = encode_prompt(turns_of("<image>"), num_images=1, template="qwen2", tokenizer=qwen)
    assert qwen.decode(prompt[prompt.tolist().index(IMAGE_PLACEHOLDER) + 1 :]) == "\n ASSISTANT:"


def test_a_caption_needs_no_mark_in_plain(qwen: Tokenizer) -> None:
    """The official `plain` puts the mark itself, whatever the question says."""
    for question in ("", "Say what there is.", "<image>\nSay it."):
        sample = encode(qwen, question, "A bus.", template="plain")
        assert trace(qwen, sample) == "<IMG> A* Ġbus* .Ċ*"


def test_a_blank_answer_among_others_is_trained_with_its_end(qwen: Tokenizer) -> None:
    sample = encode(qwen, "<image>\nRed?", "Yes.", "Blue?", "  ")
    assert trace(qwen, sample).endswith("ĠBlue ? ĠASS IST ANT : ĠĠĠ* <|im_end|>*")
    assert sample.ids.tolist() == official_ids(qwen, "<image>\nRed?", "Yes.", "Blue?", "  ")


def test_words_of_the_vocabulary_are_trained(qwen: Tokenizer) -> None:
    """Grounding data is made of such words; they are single tokens, as in the official code."""
    texts = (
        "<image>\nWhere is <|quad_start|>?",
        "<|box_start|>(1,2)<|box_end|> <tool_call> <|im_start|>",
    )
    sample = encode(qwen, *texts)
    assert sample.ids.tolist() == official_ids(qwen, *texts)
    assert "<|box_start|>* (* 1* ,* 2* )* <|box_end|>*" in trace(qwen, sample)


@pytest.mark.parametrize(
    ("question", "num_images", "written"),
    [
        ("Which?", 0, "Be brief.\nWhich?"),
        ("<image>\nWhich?", 1, "<image>\nBe brief.\nWhich?"),
        ("Which <image>", 1, "<image>\nBe brief.\nWhich"),
        ("<image>", 1, "<image>\nBe brief."),
        ("<image>\n<image>\nWhich?", 2, "<image>\n<image>\nBe brief.\nWhich?"),
        ("Is <image> as <image>?", 2, "Be brief.\nIs <image> as <image>?"),
        ("", 0, "Be brief."),
    ],
)
def test_a_system_turn_stands_in_front_of_the_first_question(
    qwen: Tokenizer, question: str, num_images: int, written: str
) -> None:
    turns = (Turn("system", "Be brief. "), *turns_of(question, "Yes.", "And?", "No."))
    sample = encode_sample(
        turns, num_images=num_images, template="qwen2", tokenizer=qwen, max_text_tokens=4096
    )
    assert sample.ids.tolist() == official_ids(qwen, written, "Yes.", "And?", "No.")
    prompt = encode_prompt(turns[:2], num_images=num_images, template="qwen2", tokenizer=qwen)
    assert sample.ids[: prompt.size].tolist() == prompt.tolist()


def test_plain_has_no_place_for_a_system_text(qwen: Tokenizer) -> None:
    turns = (Turn("system", "Be brief."), *turns_of("<image>", "A bus."))
    sample = encode_sample(turns, num_images=1, template="plain", tokenizer=qwen, max_text_tokens=9)
    assert trace(qwen, sample) == "<IMG> A* Ġbus* .Ċ*"


def test_many_equals_one_by_one_with_errors_in_place(qwen: Tokenizer) -> None:
    conversations = [
        ("<image>\nWhat?", "Yes."),
        ("What?", "Yes."),
        ("<image>", "No"),
        ("<image>", " "),
    ]
    samples = [
        Sample(str(i), (), ((32, 32),), turns_of(*texts), "test")
        for i, texts in enumerate(conversations)
    ]
    results = encode_samples(samples, template="qwen2", tokenizer=qwen, max_text_tokens=100)
    reasons = [r.reason if isinstance(r, SampleError) else None for r in results]
    assert reasons == [None, "image_without_mark", None, "empty_answer"]
    for i in (0, 2):
        alone = encode(qwen, *conversations[i])
        result = results[i]
        assert isinstance(result, EncodedSample)
        np.testing.assert_array_equal(result.ids, alone.ids)
        np.testing.assert_array_equal(result.labels, alone.labels)


def test_prompt_is_the_training_sample_up_to_the_answer(qwen: Tokenizer) -> None:
    texts = ("<image>\nWhat?", "A bus.", "Why?", "Because.")
    full = encode(qwen, *texts)
    prompt = encode_prompt(turns_of(*texts[:3]), num_images=1, template="qwen2", tokenizer=qwen)
    num_answer = len(qwen.encode(" Because.")) + 1
    assert prompt.tolist() == full.ids[:-num_answer].tolist()


def test_plain_prompt_is_the_images_alone(qwen: Tokenizer) -> None:
    prompt = encode_prompt(
        turns_of("<image><image>"), num_images=2, template="plain", tokenizer=qwen
    )
    assert prompt.tolist() == [IMAGE_PLACEHOLDER] * 2


def test_prompt_refuses_what_training_refuses(qwen: Tokenizer) -> None:
    with pytest.raises(SampleError, match="image_without_mark: 0 marks <image>, 1 images"):
        encode_prompt(turns_of("What?"), num_images=1, template="qwen2", tokenizer=qwen)
    with pytest.raises(SampleError, match="a prompt must end with a human turn"):
        encode_prompt(turns_of("What?", "A"), num_images=0, template="qwen2", tokenizer=qwen)
    with pytest.raises(SampleError, match="special_text"):
        encode_prompt(turns_of("<|im_end|>"), num_images=0, template="qwen2", tokenizer=qwen)


def test_a_prompt_may_spell_marks_of_other_media(qwen: Tokenizer) -> None:
    """Who asks sends pictures as pictures; `{image}` in a question is code."""
    question = "What does f'{image}' and <video> mean in <|box_start|>?"
    prompt = encode_prompt(turns_of(question), num_images=0, template="qwen2", tokenizer=qwen)
    assert qwen.decode(prompt).endswith(f"USER: {question} ASSISTANT:")
