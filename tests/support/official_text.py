# SPDX-License-Identifier: Apache-2.0
"""The official preprocessing of text, written down again in plain Python, to compare ours with.

In: (role, text) turns, whether there is an image, a template. Out: ids (an image is -200) and labels (-100 where
nothing is learnt), or None where the official code masks every label or stops. Faithful to its oddities: an empty text
gets no space behind its role, an image's marks in one turn become one, labels are found by counting tokens of rounds.

Source: train.py of baaivision/EVE at cc63ec7, preprocess_multimodal, preprocess_plain, preprocess_eve and the cut of
the collator; conversation.py, Conversation.get_prompt.
"""

from collections.abc import Callable, Sequence

Encode = Callable[[str], list[int]]
IMAGE, IGNORE = -200, -100
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
STOP, ANSWER_MARK = "<|im_end|>", " ASSISTANT:"


def official_sample(
    turns: Sequence[tuple[str, str]],
    *,
    has_image: bool,
    template: str,
    encode: Encode,
    pad_id: int,
    max_length: int,
) -> tuple[list[int], list[int]] | None:
    texts = [(role, _cleaned(text) if has_image else text) for role, text in turns]
    if template == "plain":
        if len(texts) != 2:
            return None
        ids, labels = _plain(texts[1][1], has_image=has_image, encode=encode)
    else:
        made = _conversation(
            texts, has_image=has_image, encode=encode, pad_id=pad_id, limit=max_length
        )
        if made is None:
            return None
        ids, labels = made
    ids, labels = ids[:max_length], labels[:max_length]
    return (ids, labels) if any(label != IGNORE for label in labels[1:]) else None


def _cleaned(text: str) -> str:
    if "<image>" not in text:
        return text
    return ("<image>\n" + text.replace("<image>", "").strip()).strip()


def _ids(text: str, *, has_image: bool, encode: Encode) -> list[int]:
    if not has_image:
        return encode(text)
    ids: list[int] = []
    for number, piece in enumerate(text.split("<image>")):
        ids += ([IMAGE] if number else []) + encode(piece)
    return ids


def _plain(caption: str, *, has_image: bool, encode: Encode) -> tuple[list[int], list[int]]:
    text = ("<image>" if has_image else "") + caption.strip() + "\n"
    ids = _ids(text, has_image=has_image, encode=encode)
    return ids, [IGNORE, *ids[1:]] if has_image else list(ids)


def _conversation(
    turns: Sequence[tuple[str, str]], *, has_image: bool, encode: Encode, pad_id: int, limit: int
) -> tuple[list[int], list[int]] | None:
    spoken = turns[1:] if turns[0][0] == "gpt" else turns
    if [role for role, _ in spoken] != [("human", "gpt")[i % 2] for i in range(len(spoken))]:
        return None
    text = SYSTEM + " "
    for number, (_, said) in enumerate(spoken):
        role, end = (("USER", " "), ("ASSISTANT", STOP))[number % 2]
        text += f"{role}: {said}{end}" if said else f"{role}:"
    ids = _ids(text, has_image=has_image, encode=encode)
    ids = ids if has_image else ids[:limit]  # the tokenizer truncates text alone
    labels, done = list(ids), 0
    for part in text.split(STOP):
        pieces = part.split(ANSWER_MARK)
        if part == "" or len(pieces) != 2:
            break
        asked = len(_ids(pieces[0] + ANSWER_MARK, has_image=has_image, encode=encode))
        labels[done : done + asked] = [IGNORE] * len(labels[done : done + asked])
        done += len(_ids(part, has_image=has_image, encode=encode)) + 1
    if done < limit and done != sum(token != pad_id for token in ids):
        return None
    return ids, labels
