# SPDX-License-Identifier: Apache-2.0
"""Which names and marks stand for media: pictures, video, sound, documents.

`<image>` is the one mark that is read. Everything else that looks like a mark (`<video>`, `<image_1>`, `<|image_pad|>`,
`[IMG]`, `{image}` in a question) is found by `unread_mark`, so that a sample with unread media never becomes a sample
of text alone. In: a text, or the name of a key. Out: the mark or the kind of medium, None if there is none.

Code and mark-up are text: a tag with attributes (`<img src="a.png">`), a closing tag (`</video>`), a name of
something (`<image_name>`), a type (`List<Image>`, `list[Image]`), a component (`<VideoPlayer>`), a tag spoken of
(between backticks, or "the <video> tag") or a value that code fills in (`${image}`) is no mark. A bare `<video>` is.
"""

import functools
import re

IMAGE_MARK = "<image>"
PICTURE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
    *(".jp2", ".j2k", ".jxl", ".heic", ".heif", ".avif", ".svg", ".ico", ".tga", ".ppm", ".pgm", ".exr", ".dcm"),
)  # fmt: skip
VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".flv", ".wmv", ".mpg", ".mpeg", ".3gp", ".ogv"),
)  # fmt: skip
AUDIO_SUFFIXES = (
    *(".wav", ".mp3", ".flac", ".ogg", ".oga", ".opus", ".m4a", ".aac", ".wma", ".aiff", ".mid"),
)  # fmt: skip
OTHER_SUFFIXES = (".pdf", ".djvu", ".ply", ".obj", ".glb", ".gltf", ".stl", ".pcd", ".las")
ARCHIVE_SUFFIXES = (".tar", ".zip", ".parquet", ".mds")
"""Suffixes of files that hold whole samples: a key that names one says where a sample came from."""
DATA_SUFFIXES = (
    *(".npy", ".npz", ".h5", ".hdf5", ".pt", ".pth", ".pkl", *ARCHIVE_SUFFIXES),
)  # fmt: skip
SUFFIX_KINDS = {
    suffix: kind
    for kind, suffixes in (
        ("picture", PICTURE_SUFFIXES),
        ("video", VIDEO_SUFFIXES),
        ("sound", AUDIO_SUFFIXES),
        ("document", OTHER_SUFFIXES),
        ("file of data", DATA_SUFFIXES),
    )
    for suffix in suffixes
}
_WORDS = {
    "picture": "image img picture pic photo photograph screenshot thumbnail jpg jpeg png webp pixel vision visual "
    "thermal infrared radar",
    "video": "video vid clip frame gif mp4",
    "sound": "audio sound speech voice music wav mp3 waveform spectrogram",
    "document": "pdf pointcloud lidar media multimedia multimodal attachment",
}
WORD_KINDS = {word: kind for kind, words in _WORDS.items() for word in words.split()}
"""A word of a name, in the singular and in lower case -> the kind of medium."""
_WEAK = {
    **dict.fromkeys(("figure", "fig", "depth"), "picture"),
    **dict.fromkeys(("movie", "film"), "video"),
    **dict.fromkeys(("song",), "sound"),
    **dict.fromkeys(("mesh", "scan", "document", "doc", "page", "file"), "document"),
}
"""Words that mark-up and metadata use for other things (`<figure>`, `"movie": "Titanic"`): they stand for a medium only
in a mark with a number, a bar or a word such as `pad`, or apart from the words of a question and not closed again."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


DESCRIPTIVE = _words(
    "id name path file filename url uri link src source dir folder root type format size width height ratio resolution "
    "shape channel count num number total index idx hash md5 sha sha1 sha256 phash caption description desc title "
    "label tag category class score similarity quality aspect duration length fps rate time timestamp start end author "
    "license licence lang language split set dataset has is alt text token per date year key status info "
    "meta metadata detail attribute your my"
)
"""With one of these, a name says something about a medium (`image_width`) rather than holding it."""
HOLDS = _words("path file filename url uri link src")
"""Those of them that may hold a medium itself (`video_path`)."""
_COMPANIONS = _words(
    "here pad placeholder place holder token start end begin bos eos of the patch context content feature embed "
    "embedding soft newline row sep mark input slot fake around history query global local latent"
)
"""Words beside a medium in marks in camel case, such as `<ImageHere>`."""
_SPELLED = frozenset(("im_patch", "boi", "eoi", "bov", "eov"))
"""Marks whose words say nothing: begin and end of an image, of a video."""
_GLUED = re.compile("image|video|audio|vision|speech", re.IGNORECASE)
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_ANGLE = re.compile(r"<\s*([|#@$%]?)\s*([A-Za-z][A-Za-z0-9_\-:#. ]{0,40}?)\s*[|#@$%]?\s*/?>")
_SQUARE = re.compile(
    r"\[\s*/?(?:images?|img|pictures?|pic|photos?|videos?|vid|audios?)(?:[ _#-]*\d*\s*|\s*:[^\]\n]{0,200})\](?!\()",
    re.I,
)
_CURLY = re.compile(r"\{\s*(?:images?|img|pictures?|photos?|videos?|audios?)[ _-]?\d*\s*\}", re.I)
_CHINESE = re.compile(r"[<\[【《](?:图片|图像|照片|圖片|视频|音频|语音)[ _-]?\d*[>\]】》]")
_ESCAPED = re.compile(
    r"(?:&lt;|＜)\s*/?(?:image|img|picture|video|audio)[ _-]?\d*\s*(?:&gt;|＞)", re.I
)
_PRINTED = re.compile(r"<PIL\.\w+")
_APART = re.compile(
    r"\A\s*<([A-Za-z]+)>|^[ \t]*<([A-Za-z]+)>[ \t]*$|<([A-Za-z]+)>\s*\Z", re.MULTILINE
)
"""A tag at the very start or end of a text, or on a line of its own."""
_DATA_URL = re.compile(r"data:(?:image|video|audio)/[\w.+-]+;base64,[A-Za-z0-9+/]{4}")
"""Followed by bytes: code writes `base64,{encoded}`."""
_MARKDOWN = re.compile(r"!\[[^\]\n]{0,200}\]\(\s*[^)\s]{1,400}")
_CONTAINERS = re.compile(
    r"\b(?:vector|list|array|set|map|deque|span|optional|unique_ptr|shared_ptr|dict|tuple|type)\Z"
)
_TYPE = re.compile(r"\b[A-Z]\w*\Z")
"""`Vec<Frame>`: both names are capitalised. `Watch<video>` is no type."""
_SUBSCRIPTED = re.compile(r"(?:[A-Za-z0-9_)\](=]|= )\Z")
_FILLED_IN = re.compile(r"\$\Z|\b[rR]?[fF][rR]?[\"'][^\n]*\Z")
"""What stands before a curly bracket that code fills in: `${image}`, `f"{image}"`."""
_TAG_WORD = re.compile(r" (?:HTML5? )?(?:tag|element)s?\b")


def words_of(name: str) -> list[str]:
    """The words of a name in lower case, plurals as singulars: `imagePaths_2` -> image, path, 2."""
    words = [word.lower() for word in _WORD.findall(name)]
    return [
        word[:-1]
        if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is"))
        else word
        for word in words
    ]


def media_kind(name: str) -> str | None:
    """The kind of medium that a name (of a key, of a mark) stands for."""
    words = words_of(name)
    if "point" in words and "cloud" in words:
        return "document"
    if "depth" in words and "map" in words:
        return "picture"
    return next((WORD_KINDS[word] for word in words if word in WORD_KINDS), None)


def suffix_kind(path: str) -> str | None:
    """The kind of medium that a path or an address ends in: a text of one line whose suffix is that of a media file."""
    if len(path) > 4096 or "\n" in path:
        return None
    bare = path.split("?", 1)[0].split("#", 1)[0].rstrip().lower()
    stem, dot, suffix = bare.rpartition(".")
    return SUFFIX_KINDS.get(dot + suffix) if stem else None


def unread_mark(text: str, *, in_question: bool) -> str | None:
    """The first thing in `text` that stands for a medium and is not `<image>`.

    Curly brackets and Markdown pictures count in questions only: answers that write code are full of them."""
    if text.count("<") > text.count(IMAGE_MARK):
        for match in _ANGLE.finditer(text):
            if match.group() == IMAGE_MARK or not _is_mark(*match.groups()):
                continue
            if match.group(2).isalpha() and _is_code(text, match):
                continue
            return match.group()
        for match in _APART.finditer(text) if in_question else ():
            name = match[match.lastindex or 0]
            if words_of(name)[-1] in _WEAK and f"</{name}" not in text:
                return match.group().strip()
    for match in _SQUARE.finditer(text) if "[" in text else ():
        if not _is_subscript(text, match, in_question=in_question):
            return match.group()[:60]
    for match in _CURLY.finditer(text) if in_question and "{" in text else ():
        if not _FILLED_IN.search(text[: match.start()][-200:]):
            return match.group()
    patterns = [] if text.isascii() else [_CHINESE]
    patterns += [_ESCAPED] if "&lt;" in text or "＜" in text else []
    patterns += [_PRINTED] if "<PIL" in text else []
    patterns += [_DATA_URL] if "data:" in text else []
    patterns += [_MARKDOWN] if in_question and "![" in text else []
    found = (pattern.search(text) for pattern in patterns)
    return next((match.group()[:60] for match in found if match is not None), None)


def _is_code(text: str, match: re.Match[str]) -> bool:
    """A type (`List<Image>`), or a tag that the text speaks of: between backticks, or `the <video> tag`."""
    before, after = text[: match.start()][-80:], text[match.end() :][:20]
    if before.endswith("`") and after.startswith("`"):
        return True
    is_named = before.strip(" ") and not before.endswith("\n") and _TAG_WORD.match(after)
    return bool(is_named or _is_type(match.group(2), before=before))


def _is_type(name: str, *, before: str) -> bool:
    return bool(_CONTAINERS.search(before) or (name[0].isupper() and _TYPE.search(before)))


def _is_subscript(text: str, match: re.Match[str], *, in_question: bool) -> bool:
    """`list[Image]`, and in answers `data[image]` and `f([image])`: a word in brackets after a name or sign."""
    word, before = match.group()[1:-1], text[: match.start()][-80:]
    if not word.isalpha() or word.isupper():
        return False
    if in_question:
        return _is_type(word, before=before)
    return _SUBSCRIPTED.search(before) is not None


@functools.lru_cache(maxsize=4096)
def _is_mark(bar: str, name: str) -> bool:
    """Whether the words between angle brackets (and bars) are a mark of media."""
    if suffix_kind(name) is not None:  # <leaf.png>, <image:leaf.png>
        return True
    words = words_of(name)
    weak = [word for word in words if word in _WEAK]
    if name.lower() in _SPELLED or (bar and _GLUED.search(name)):
        return True
    if media_kind(name) is None and not weak:
        return False
    others = [w for w in words if w not in WORD_KINDS and w not in weak and not w.isdigit()]
    if bar:
        return True
    if " " in name:  # an attribute (<video controls>), unless the word belongs to a mark
        return all(word in _COMPANIONS for word in others)
    if any(word in DESCRIPTIVE and word not in _COMPANIONS for word in others):
        return False
    if not others:
        return not weak or len(words) > 1
    is_camel = "_" not in name and "-" not in name
    return not (is_camel or weak) or all(word in _COMPANIONS for word in others)
