# SPDX-License-Identifier: Apache-2.0
"""Reading annotation files piece by piece gives what json.loads gives, and broken files are refused."""

import gzip
import json
from pathlib import Path

import pytest

from data_prep import readers
from data_prep.readers import iterate_entries, scan_input
from megatron_eve.errors import DataError


@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 20])
@pytest.mark.parametrize(
    "values",
    [
        [],
        [{"id": 1, "text": 'quote " bracket ] comma , \\ end'}, {"é": "汉字 🙂"}, {}],
        ["a.json", "b/c.json"],
        [12, 3.5, None, True, [1, [2]], {"a": {"b": [1, 2]}}],
    ],
)
def test_a_list_of_any_chunking_is_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, values: list[object]
) -> None:
    monkeypatch.setattr(readers, "CHUNK_CHARACTERS", chunk)
    for indent, ascii_only in ((None, True), (2, False)):
        path = tmp_path / "data.json"
        path.write_text("\n " + json.dumps(values, indent=indent, ensure_ascii=ascii_only) + "\n")
        assert [entry.value for entry in iterate_entries(path)] == values
        assert [entry.index for entry in iterate_entries(path)] == list(range(len(values)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"data": []}', "is one JSON object with the keys `data`, which is not read"),
        ('{\n "samples": [\n', "is one JSON object with the keys `samples`"),
        ("", "is empty; expected a JSON list"),
        ("12", "does not hold a JSON list"),
        ('[{"a": 1}', "value is not complete"),
        ('[{"a": 1} ', "expected ',' or ']'"),
        ('[{"a": 1} {"b": 2}]', "expected ',' or ']'"),
        ('[{"a": 1}, {"b": ]', "not valid JSON near character"),
        ('[{"a": 1}] x', "text after the end"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_broken_lists_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        list(iterate_entries(path))


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_bytes('["é"]'.encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        list(iterate_entries(path))


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "data.ndjson", "data.txt", "data"])
@pytest.mark.parametrize("is_packed", [False, True])
def test_what_the_file_holds_decides_how_it_is_read(
    tmp_path: Path, name: str, is_packed: bool
) -> None:
    values = [{"id": 1}, {"id": "é"}]
    path = tmp_path / (f"{name}.gz" if is_packed else name)
    for text in (json.dumps(values), "\n" + "".join(json.dumps(value) + "\n" for value in values)):
        content = text.encode()
        path.write_bytes(gzip.compress(content) if is_packed else content)
        assert [entry.value for entry in iterate_entries(path)] == values
        assert scan_input(path).num_entries == 2


def test_a_damaged_gzip_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data.json.gz"
    path.write_bytes(gzip.compress(json.dumps([{"id": "a" * 99}] * 99).encode())[:-9])
    with pytest.raises(DataError, match="is a damaged gzip file"):
        list(iterate_entries(path))


@pytest.mark.parametrize("chunk", [3, 1 << 20])
@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_a_key_that_stands_twice_makes_one_bad_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, name: str
) -> None:
    """json takes the last one, so that a picture or an answer would be lost."""
    monkeypatch.setattr(readers, "CHUNK_CHARACTERS", chunk)
    entries = ['{"id": 1}', '{"a": {"image": "a.png", "image": "b.png"}}', '{"id": 3}']
    text = f"[{', '.join(entries)}]" if name == "data.json" else "\n".join(entries)
    (tmp_path / name).write_text(text)
    found = list(iterate_entries(tmp_path / name))
    assert [entry.value for entry in found] == [{"id": 1}, None, {"id": 3}]
    assert [entry.is_duplicate for entry in found] == [False, True, False]
    assert found[1].error is not None
    assert "key `image` twice" in found[1].error


def test_a_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text("[1]", encoding="utf-8-sig")
    assert [entry.value for entry in iterate_entries(path)] == [1]


def test_a_bad_line_is_one_bad_entry(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"id": 1}\n\n{"id": \n{"id": 3}')
    entries = list(iterate_entries(path))
    assert [(entry.index, entry.value) for entry in entries] == [
        (0, {"id": 1}),
        (1, None),
        (2, {"id": 3}),
    ]
    assert entries[1].error is not None


def test_the_scan_hashes_and_counts(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text("[1, 2, 3]")
    first = scan_input(path)
    assert first.num_entries == 3
    path.write_text("[1, 2, 4]")
    assert scan_input(path).sha256 != first.sha256
    with pytest.raises(DataError, match="is not a file"):
        scan_input(tmp_path / "absent.json")
