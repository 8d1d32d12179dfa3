# SPDX-License-Identifier: Apache-2.0
"""Each input that is not read is refused by the name of its format, and says what to do."""

import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest

from data_prep.build_options import BuildOptions
from data_prep.images import ImageLimits
from data_prep.readers import scan_input
from megatron_eve.errors import ConfigError, DataError
from tests.data_prep.pictures import encode, noise

JPEG = encode(noise(), "JPEG")


def gzipped(content: bytes) -> bytes:
    """By gzip, without the time of day: these bytes are part of a test's name."""
    return gzip.compress(content, mtime=0)


def archive(*names: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name))
    return buffer.getvalue()


def packed(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in names:
            file.writestr(name, b"x")
    return buffer.getvalue()


# fmt: off
FILES: list[tuple[str, bytes, str]] = [
    ("a.parquet", b"PAR1\x15\x04\x15", "is a Parquet file, which is not read; write its rows as JSON lines"),
    ("a.arrow", b"ARROW1\x00\x00\xff", "is an Arrow file"),
    ("a.arrow", b"\xff\xff\xff\xff\x10\x00", "is an Arrow stream"),
    ("a.h5", b"\x89HDF\r\n\x1a\n\x00", "is an HDF5 file"),
    ("a.json", b"SQLite format 3\x00\x10", "is an SQLite file"),
    ("a.npy", b"\x93NUMPY\x01\x00", "is a NumPy file"),
    ("a.tar", archive("1.jpg", "1.txt", "1.json"), "is a tar archive of .* as WebDataset and img2dataset write them"),
    ("a.tar", archive("1.csv"), "is a tar archive of .csv files, which is not read; unpack it"),
    ("a.tar.gz", gzipped(archive("1.csv")), "is a tar archive.*, packed by gzip, which is not read; unpack it"),
    ("a.zip", packed("1.jpg", "2.jpg"), "is a zip archive of .jpg files, which is not read; unpack it"),
    ("a.json.zst", b"\x28\xb5\x2f\xfd\x04", "is packed by zstd, which is not read; unpack it; gzip is read"),
    ("a.json.bz2", b"BZh91AY", "is packed by bzip2"),
    ("a.json.xz", b"\xfd7zXZ\x00\x00", "is packed by xz"),
    ("a.jpg", JPEG, "is a JPEG picture, which is not read; give the JSON file"),
    ("a.mp4", b"\x00\x00\x00\x20ftypisom\x00", "is a video of the MP4 family"),
    ("a.wav", b"RIFF\x00\x01\x00\x00WAVEfmt ", "is a WAV sound"),
    ("a.pdf", b"%PDF-1.7\n\xff", "is a PDF document"),
    ("a.json", b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer, .* `git lfs pull`"),
    ("a.json", '[{"id": "é"}]'.encode("utf-16"), "is UTF-16 text, which is not read; convert it to UTF-8"),
    ("a.json", '["é"]'.encode("latin-1"), "is not UTF-8 text .*; convert it to UTF-8"),
    ("a.json", b"<!doctype html>\n<html>", "is HTML or XML, which is not read; is it a web page"),
    ("a.csv", b"path,title\na.jpg,A leaf", "is a CSV table"),
    ("a.txt", b"path\ttitle\na.jpg\tA leaf", "is a TSV table"),
    ("a.txt", b"a.jpg\nb/c.png\n", "is a plain list of paths"),
    ("a.yaml", b"samples:\n - a.jpg", "is YAML"),
    ("a.json", b'{"data": [{"id": 1}]}', "is one JSON object with the keys `data`, .*write the list of samples alone"),
    ("a.tfrecord", b"\x10\x00\x00\x00\x00\x00\x00\x00abc", "is a TFRecord file"),
    ("a.mds", b"\x01\x00\x00\x00\x0c", r"is a shard of mosaicml-streaming \(MDS\)"),
    ("a.xlsx", packed("[Content_Types].xml", "xl/a.xml"), "is a zip archive of Office"),
    ("a.csv.gz", gzipped(b"path,title\na.jpg,A leaf"), "is a CSV table, packed by gzip, .*; unpack it"),
    ("a.bin", bytes(range(1, 32)) * 40, "is binary data of no known format"),
    ("a.json", b" \n", "is empty; expected a JSON list"),
]
FOLDERS: list[tuple[tuple[str, ...], str]] = [
    (("1.jpg", "deep/2.png"), "but a folder of pictures; give the JSON file"),
    (("1.jpg", "1.txt", "1.json"), "as WebDataset and img2dataset write them"),
    (("1.tar", "2.tar"), r"a folder of tar archives \(WebDataset\); unpack it"),
    (("train/1.parquet",), "a folder of Parquet files"),
    (("1.arrow", "dataset_info.json"), "a folder of Arrow files"),
    (("1.mp4", "2.mp4"), "a folder of videos; videos are not read"),
    (("1.json", "2.json"), "a folder of 2 JSON files; give a JSON list of their paths"),
    (("index.json", "shard.00000.mds"), r"mosaicml-streaming \(MDS\) shards"),
    (("index.json", "dataset.json", "part-00000/shard.00000.mds"), "built already: .* data.sources.0.path"),
    ((), "an empty folder"),
]
# fmt: on


@pytest.mark.parametrize(("name", "content", "message"), FILES)
def test_a_file_is_refused_by_the_name_of_its_format(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        scan_input(tmp_path / name)


@pytest.mark.parametrize(("names", "message"), FOLDERS)
def test_a_folder_is_refused_by_what_it_holds(
    tmp_path: Path, names: tuple[str, ...], message: str
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=message):
        scan_input(tmp_path)


def test_nothing_is_told_from_something(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a file: there is nothing of that name"):
        scan_input(tmp_path / "absent")


@pytest.mark.parametrize("address", ["s3://bucket/a.json", "https://example.org/a", "hf://a/b"])
def test_an_address_is_no_path(tmp_path: Path, address: str) -> None:
    with pytest.raises(DataError, match=f"{address} is not a file but an address"):
        scan_input(Path(address))
    for field in ("image_folder", "out"):
        with pytest.raises(ConfigError, match=f"{address} is .*an address"):
            _options(tmp_path, **{field: Path(address)})


def test_an_archive_is_no_image_folder(tmp_path: Path) -> None:
    (tmp_path / "pictures.zip").write_bytes(packed("1.jpg"))
    with pytest.raises(ConfigError, match=r"not a folder but a zip archive of \.jpg files; unpack"):
        _options(tmp_path, image_folder=tmp_path / "pictures.zip")
    with pytest.raises(ConfigError, match="is not a folder; give the folder"):
        _options(tmp_path, image_folder=tmp_path / "absent")


def _options(tmp_path: Path, **fields: Path) -> BuildOptions:
    paths = {"data": tmp_path / "data.json", "image_folder": tmp_path, "out": tmp_path / "out"}
    return BuildOptions(
        **{**paths, **fields},
        source="s",
        samples_per_part=1,
        shard_bytes=1,
        limits=ImageLimits(validate="full", max_pixels=100, max_aspect_ratio=9),
        workers=1,
    )


def test_a_head_that_is_cut_in_mid_letter_is_text(tmp_path: Path) -> None:
    text = json.dumps({"data": "é" * 70_000}, ensure_ascii=False)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match="is one JSON object"):
        scan_input(tmp_path / "a.json")
