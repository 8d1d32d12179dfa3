# SPDX-License-Identifier: Apache-2.0
"""The build of shards and the training accept and refuse the same conversations, for the same reason."""

import pytest

from data_prep.images import ImageLimits
from data_prep.quarantine import REASONS, QuarantineRecord
from data_prep.readers import RawEntry
from data_prep.samples import SampleContext, check_entry
from megatron_eve.data.read.conversation import encode_sample
from megatron_eve.data.read.quarantine import SampleError
from megatron_eve.data.read.text_rules import templates_that_train
from megatron_eve.data.read.tokenizer import Tokenizer
from megatron_eve.data.sample import Turn
from tests.data_prep.pictures import encode, noise

# (roles by their first letters, texts, images)
CONVERSATIONS: list[tuple[str, tuple[str, ...], int]] = [
    ("hg", ("<image>\nWhat?", "A bus."), 1),
    ("hg", ("<image>", "A bus."), 1),
    ("hg", ("", "A bus."), 1),
    ("hg", ("Say it.", "A bus."), 1),
    ("hg", ("What?", "A bus."), 2),
    ("hg", ("", "A bus."), 0),
    ("hg", (" ", "A bus."), 0),
    ("hg", ("<image>\nWhat?", " \n"), 1),
    ("hghg", ("<image>\nWhat?", "A bus.", "And?", " "), 1),
    ("hghg", ("<image>\nWhat?", "A bus.", "And?", ""), 1),
    ("hghg", ("<image>\nWhat?", "A bus.", "", "No."), 1),
    ("hghg", ("What?", "A bus.", "And?", "No."), 1),
    ("hg", ("Where is <|quad_start|>?", "<|box_start|>(1,2)<|box_end|><|object_ref_end|>"), 0),
    ("hg", ("What is <|im_start|> or <tool_call>?", "<|fim_prefix|>"), 0),
    ("hg", ("What is <|im_end|>?", "An end."), 0),
    ("hg", ("What?", "It ends.<|endoftext|>"), 0),
    ("hg", ("<|vision_start|><|image_pad|><|vision_end|>What?", "A bus."), 0),
    ("hg", ("<video>\nWhat?", "A bus."), 0),
    ("hg", ("What?", "See <image_2>."), 0),
    ("hg", ("What?", "See <image>."), 1),
    ("hg", ("<image><image>\nWhat?", "Two."), 1),
    ("hg", ("<image>\nWhat?", "Two."), 2),
    ("hg", ("<image>\nWhat?", "None."), 0),
    ("ghg", ("Hello <image>", "What?", "A bus."), 1),
    ("ghg", ("", "What?", "A bus."), 0),
    ("shg", ("Be brief.", "<image>\nWhat?", "A bus."), 1),
    ("shg", ("See <image>.", "What?", "A bus."), 1),
    ("shg", ("Be brief.", "", "A bus."), 0),
    ("sghg", ("Be brief.", "Hello.", "What?", "A bus."), 0),
    ("hsg", ("What?", "Be brief.", "A bus."), 0),
    ("hhg", ("What?", "What?", "A bus."), 0),
    ("hgh", ("What?", "A bus.", "And?"), 0),
    ("gh", ("A bus.", "What?"), 0),
    ("g", ("A bus.",), 0),
    ("s", ("Be brief.",), 0),
    ("ug", ("What?", "A bus."), 0),
]
ROLES = {"h": "human", "g": "gpt", "s": "system", "u": "user"}


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> SampleContext:
    folder = tmp_path_factory.mktemp("agree")
    (folder / "a.png").write_bytes(encode(noise(), "PNG"))
    limits = ImageLimits(validate="header", max_pixels=10**6, max_aspect_ratio=9)
    return SampleContext(image_folder=folder, json_folder=folder, source="test", limits=limits)


@pytest.mark.parametrize(("roles", "texts", "num_images"), CONVERSATIONS)
def test_build_and_training_agree(
    qwen: Tokenizer,
    context: SampleContext,
    roles: str,
    texts: tuple[str, ...],
    num_images: int,
) -> None:
    turns = [Turn(ROLES[role], text) for role, text in zip(roles, texts, strict=True)]
    refused: dict[str, str] = {}
    templates = ("qwen2", "plain")
    for template in templates:
        try:
            encode_sample(
                turns,
                num_images=num_images,
                template=template,  # type: ignore[arg-type]
                tokenizer=qwen,
                max_text_tokens=4096,
            )
        except SampleError as error:
            refused[template] = error.reason
    conversation = [{"from": turn.role, "value": turn.text} for turn in turns]
    raw = {"id": "x", "image": ["a.png"] * num_images, "conversations": conversation}
    checked = check_entry(RawEntry(0, raw), context=context)
    if len(refused) == 2:
        assert isinstance(checked, QuarantineRecord)
        assert checked.reason == refused["qwen2"]
        assert checked.reason in REASONS
    else:
        assert not isinstance(checked, QuarantineRecord), checked
        assert checked.templates == tuple(t for t in templates if t not in refused)
        assert checked.templates == templates_that_train(turns, num_images=num_images)


def test_the_table_holds_both_kinds(qwen: Tokenizer) -> None:
    """Else the test above would compare nothing with nothing."""
    trained, refused = 0, set()
    for roles, texts, num_images in CONVERSATIONS:
        turns = [Turn(ROLES[role], text) for role, text in zip(roles, texts, strict=True)]
        try:
            templates_that_train(turns, num_images=num_images)
            trained += 1
        except SampleError as error:
            refused.add(error.reason)
    assert trained >= 12
    assert len(refused) >= 12
