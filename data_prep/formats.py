# SPDX-License-Identifier: Apache-2.0
"""Names the format of an input that the build does not read, by its bytes or its files, and says what to do with it.

In: the path of a file, of a folder, or an address. Out: the DataError to raise, which names the format: a Parquet file
is no text in another encoding. Only the first bytes of a file and the first names of a folder are read.
"""

import contextlib
import itertools
import json
import os
import re
import tarfile
import zipfile
import zlib
from collections import Counter
from pathlib import Path

from megatron_eve.data.read.media_names import PICTURE_SUFFIXES, suffix_kind
from megatron_eve.errors import DataError

GZIP_MAGIC = b"\x1f\x8b"
HEAD_BYTES = 1 << 16
MAX_NAMES = 2000
EXPECTED = (
    "expected a JSON list [{...}, ...] with one object or path per sample, or JSON lines with one object each, plain "
    "or packed by gzip"
)
_LIST_IT = (
    "unpack it, and list its samples in a JSON file whose image paths start in the unpacked folder"
)
_TABLE = (
    "write its rows as JSON lines (pictures as files) with `id`, `image` and `conversations`, for instance with "
    "pandas or pyarrow"
)
_UNPACK = "unpack it; gzip is read as it is"
_SAMPLES = "give the JSON file that lists the samples"

_SIGNATURES: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"PAR1", "a Parquet file", _TABLE),
    (0, b"ARROW1", "an Arrow file", _TABLE),
    (0, b"\xff\xff\xff\xff", "an Arrow stream", _TABLE),
    (0, b"FEA1", "a Feather file", _TABLE),
    (0, b"ORC", "an ORC file", _TABLE),
    (0, b"Obj\x01", "an Avro file", _TABLE),
    (0, b"\x89HDF", "an HDF5 file", _TABLE),
    (0, b"SQLite format 3", "an SQLite file", _TABLE),
    (0, b"\x93NUMPY", "a NumPy file", _TABLE),
    (0, b"\x80\x02", "a pickle", _TABLE),
    (0, b"\x80\x03", "a pickle", _TABLE),
    (0, b"\x80\x04", "a pickle", _TABLE),
    (0, b"\x80\x05", "a pickle", _TABLE),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", _LIST_IT),
    (0, b"Rar!", "a RAR archive", _LIST_IT),
    (0, b"\x28\xb5\x2f\xfd", "packed by zstd", _UNPACK),
    (0, b"BZh", "packed by bzip2", _UNPACK),
    (0, b"\xfd7zXZ\x00", "packed by xz", _UNPACK),
    (0, b"\x04\x22\x4d\x18", "packed by lz4", _UNPACK),
    (0, b"\xff\xd8\xff", "a JPEG picture", _SAMPLES),
    (0, b"\x89PNG", "a PNG picture", _SAMPLES),
    (0, b"GIF8", "a GIF picture", _SAMPLES),
    (0, b"BM", "a BMP picture", _SAMPLES),
    (0, b"II*\x00", "a TIFF picture", _SAMPLES),
    (0, b"MM\x00*", "a TIFF picture", _SAMPLES),
    (8, b"WEBP", "a WebP picture", _SAMPLES),
    (8, b"AVI ", "an AVI video", _SAMPLES),
    (8, b"WAVE", "a WAV sound", _SAMPLES),
    (4, b"ftyp", "a video of the MP4 family", _SAMPLES),
    (0, b"\x1a\x45\xdf\xa3", "a Matroska or WebM video", _SAMPLES),
    (0, b"\x00\x00\x01\xba", "an MPEG video", _SAMPLES),
    (0, b"ID3", "an MP3 sound", _SAMPLES),
    (0, b"OggS", "an Ogg sound", _SAMPLES),
    (0, b"fLaC", "a FLAC sound", _SAMPLES),
    (0, b"%PDF", "a PDF document", _SAMPLES),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the file itself", "fetch it by `git lfs pull`"),
    (0, b"\xff\xfe", "UTF-16 text", "convert it to UTF-8"),
    (0, b"\xfe\xff", "UTF-16 text", "convert it to UTF-8"),
)  # fmt: skip
"""(offset, bytes there, what the file is, what to do). Zip, tar and text are told apart by hand."""
_BINARY_SUFFIXES = {
    ".mds": "a shard of mosaicml-streaming (MDS)",
    ".tfrecord": "a TFRecord file",
    ".rec": "a RecordIO file",
    ".mdb": "an LMDB file",
    ".msgpack": "a MessagePack file",
}
"""Formats without a signature of their own."""
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/{1,2}(.*)", re.DOTALL)


def address_of(path: Path) -> str | None:
    """`scheme://rest` if a path was meant as an address (Path makes one slash of two)."""
    match = _ADDRESS.match(str(path))
    return f"{match[1]}://{match[2]}" if match else None


def refusal_of_path(path: Path) -> DataError:
    """Why a path that is no file cannot be read: it is a folder of some kind, an address, or nothing at all."""
    address = address_of(path)
    if address is not None and not path.exists():
        return DataError(
            f"{address} is not a file but an address, and nothing is fetched; copy it to a disk and give its path."
        )
    if path.exists() and not path.is_dir():  # a pipe cannot be read twice
        return DataError(f"{path} is not a file but a pipe or a device; write it to a file first.")
    if not path.is_dir():
        return DataError(f"{path} is not a file: there is nothing of that name; {_SAMPLES}.")
    what, advice = _describe_folder(path)
    return DataError(f"{path} is not a file but {what}; {advice}.")


def refusal_of_file(path: Path, *, problem: str) -> DataError:
    """Why a file cannot be read. `problem`: what is wrong with it if it is text after all."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    what, advice = describe_bytes(head, path=path)
    if what is None:
        return DataError(f"{path} {problem}; {advice}.")
    unread = "" if what == "empty" else ", which is not read"
    return DataError(f"{path} is {what}{unread}; {advice}.")


def describe_image_folder(path: Path) -> str:
    """What stands in place of a folder of images, and what to do."""
    address = address_of(path)
    if address is not None and not path.exists():
        return f"{address} is not a folder but an address; copy the images to a disk and give the folder there"
    if not path.is_file():
        return f"{path} is not a folder; give the folder that image paths start in"
    with path.open("rb") as file:
        what, _ = describe_bytes(file.read(HEAD_BYTES), path=path)
    return f"{path} is not a folder but {what or 'a file'}; unpack it and give the folder that image paths start in"


def describe_bytes(head: bytes, *, path: Path) -> tuple[str | None, str]:
    """(what a file is, None for text that may be JSON; what to do), by its first bytes."""
    if not head.strip():
        return "empty", EXPECTED
    if head.startswith(GZIP_MAGIC):
        what, advice = describe_bytes(_unpacked(head) or b"\x00", path=Path(path.stem))
        return (
            (None, advice) if what is None else (f"{what}, packed by gzip", f"unpack it; {advice}")
        )
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return f"a zip archive{_zip_members(path)}", _LIST_IT
    if head[257:262] == b"ustar" or (path.suffix == ".tar" and _tar_members(path)):
        return f"a tar archive{_tar_members(path)}", _LIST_IT
    for offset, magic, what, advice in _SIGNATURES:
        if head[offset : offset + len(magic)] == magic:
            return what, advice
    if path.suffix in _BINARY_SUFFIXES:
        return _BINARY_SUFFIXES[path.suffix], _TABLE
    if (
        b"\x00" in head
        or sum(byte < 32 and byte not in b"\t\n\r\f" for byte in head) > len(head) // 50
    ):
        return "binary data of no known format", EXPECTED
    return _describe_text(head, path=path)


def _unpacked(head: bytes) -> bytes:
    with contextlib.suppress(EOFError, zlib.error, OSError):
        return zlib.decompressobj(wbits=31).decompress(head, HEAD_BYTES)
    return b""


def _describe_text(head: bytes, *, path: Path) -> tuple[str | None, str]:
    try:
        text = head.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if len(head) < HEAD_BYTES or error.start < HEAD_BYTES - 4:  # not merely cut in mid letter
            return None, "convert it to UTF-8"
        text = head.decode("utf-8-sig", errors="ignore")
    lines = [line.strip() for line in text.splitlines() if line.strip()][:20]
    if lines[0].startswith("{"):
        keys = _keys_of_object(text)
        inside = f" with the keys {', '.join(keys)}" if keys else ""
        return (
            f"one JSON object{inside}",
            f"{EXPECTED}; write the list of samples alone into a file",
        )
    if lines[0].startswith("["):
        return None, EXPECTED
    if lines[0].startswith("<"):
        return "HTML or XML", f"is it a web page instead of the file? {_SAMPLES}"
    for suffix, delimiter, name in ((".tsv", "\t", "a TSV table"), (".csv", ",", "a CSV table")):
        columns = {line.count(delimiter) for line in lines}
        if path.suffix == suffix or (0 not in columns and len(columns) == 1 and len(lines) > 1):
            return name, _TABLE
    if all(suffix_kind(line) or line.endswith((".json", ".tar", ".txt")) for line in lines):
        return "a plain list of paths", f"{EXPECTED}; write the paths as a JSON list"
    if re.match(r"[-\w\"']+:( |$)", lines[0]) or lines[0] == "---":
        return "YAML", EXPECTED
    return None, EXPECTED


def _keys_of_object(text: str) -> list[str]:
    """Names of the first keys of an object that may be cut."""
    try:
        value, _ = json.JSONDecoder().raw_decode(text.lstrip())
        return [f"`{key}`" for key in list(value)[:5]]
    except (ValueError, RecursionError):
        return [f"`{key}`" for key in re.findall(r'^\s*\{?\s*"([^"\n]{1,60})"\s*:', text)[:1]]


def _tar_members(path: Path) -> str:
    with contextlib.suppress(tarfile.TarError, OSError, EOFError), tarfile.open(path) as archive:
        return _members([member.name for member in itertools.islice(archive, 60)])
    return ""


def _zip_members(path: Path) -> str:
    with contextlib.suppress(zipfile.BadZipFile, OSError), zipfile.ZipFile(path) as archive:
        names = archive.namelist()[:60]
        if "[Content_Types].xml" in names:
            return " of Office (a sheet or a text)"
        return _members(names)
    return ""


def _members(names: list[str]) -> str:
    """What an archive or a folder holds, in words; pictures beside texts of the same name are WebDataset's way."""
    suffixes = Counter(Path(name).suffix.lower() for name in names)
    listed = ", ".join(suffix for suffix, _ in suffixes.most_common(4) if suffix)
    if not listed:
        return ""
    groups: dict[str, set[str]] = {}
    for name in names:
        groups.setdefault(name.split(".")[0], set()).add(Path(name).suffix.lower())
    has_pairs = any(
        group & set(PICTURE_SUFFIXES) and group & {".txt", ".json", ".cls", ".caption"}
        for group in groups.values()
    )
    return f" of {listed} files" + (
        ", as WebDataset and img2dataset write them" if has_pairs else ""
    )


def _describe_folder(path: Path) -> tuple[str, str]:
    names: list[str] = []
    for parent, _, files in os.walk(path):
        names += [os.path.relpath(os.path.join(parent, name), path) for name in files]
        if len(names) > MAX_NAMES:
            break
    names.sort()
    suffixes = Counter(Path(name).suffix.lower() for name in names)
    if not names:
        return "an empty folder", _SAMPLES
    if "index.json" in names and (suffixes[".mds"] or any(".mds." in name for name in names)):
        if "dataset.json" in names:
            return (
                "a folder of shards",
                "it is built already: give it to the training as data.sources.0.path",
            )
        return (
            "a folder of mosaicml-streaming (MDS) shards",
            "give its samples as JSON, with their pictures as files",
        )
    for suffix, what, advice in (
        (".tar", "a folder of tar archives (WebDataset)", _LIST_IT),
        (".parquet", "a folder of Parquet files", _TABLE),
        (".arrow", "a folder of Arrow files (a data set of Hugging Face)", _TABLE),
        (".tfrecord", "a folder of TFRecord files", _TABLE),
    ):
        if suffixes[suffix]:
            return what, advice
    pictures = sum(suffixes[suffix] for suffix in PICTURE_SUFFIXES)
    if pictures and pictures < len(names):
        return f"a folder{_members(names)}", f"{_SAMPLES}, and the folder as IMAGE_FOLDER"
    if pictures:
        return "a folder of pictures", f"{_SAMPLES}, and the folder as IMAGE_FOLDER"
    if any(suffix_kind(name) == "video" for name in names):
        return (
            "a folder of videos",
            "videos are not read; give the JSON file that lists samples with pictures",
        )
    if suffixes[".json"] == len(names):
        return (
            f"a folder of {len(names):,} JSON files",
            "give a JSON list of their paths, which start beside that list",
        )
    return f"a folder{_members(names)}", _SAMPLES
