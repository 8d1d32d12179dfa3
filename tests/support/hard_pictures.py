# SPDX-License-Identifier: Apache-2.0
"""Pictures that tell decoders apart: pages of text, line art, screenshots; orientation in every place where writers put
it; rare files. Bytes and images, a few kB each. EXIF, XMP, BMP, TIFF and PNG are put together by hand here, because
Pillow does not write what the world writes."""

import functools
import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def encode(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def page(width: int = 500, height: int = 640, *, letters: int = 11, seed: int = 1) -> Image.Image:
    """Black words on white."""
    image, random = Image.new("L", (width, height), 255), np.random.default_rng(seed)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=letters)
    for top in range(6, height - letters, int(letters * 1.3)):
        lengths = random.integers(2, 9, width // letters)
        words = ("".join(chr(97 + c) for c in random.integers(0, 26, n)) for n in lengths)
        draw.text((8, top), " ".join(words), fill=0, font=font)
    return image


def line_art(edge: int = 520) -> Image.Image:
    image = Image.new("L", (edge, edge), 255)
    draw = ImageDraw.Draw(image)
    for step in range(0, edge, 13):
        draw.line((step, 0, edge - step, edge), fill=0, width=2)
    return image


def screenshot(width: int = 640, height: int = 400) -> Image.Image:
    """Flat colours, sharp edges, coloured text on dark and on light."""
    image = Image.new("RGB", (width, height), (30, 30, 30))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=10)
    for row, top in enumerate(range(8, height - 12, 13)):
        colour = ((86, 156, 214), (206, 145, 120), (255, 255, 255))[row % 3]
        draw.text((8 + 9 * (row % 4), top), "def f(x): return x[0] * 17", fill=colour, font=font)
    draw.rectangle(
        (width // 2, 20, width - 20, height - 20), fill=(255, 255, 255), outline=(255, 0, 0)
    )
    draw.text((width // 2 + 10, 40), "OK  Cancel  Apply", fill=(0, 0, 255), font=font)
    return image


def photo(width: int = 610, height: int = 430, *, seed: int = 3) -> Image.Image:
    """Low frequencies and grain."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (height // 12, width // 12, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    grain = smooth + random.normal(0, 6, smooth.shape)
    return Image.fromarray(np.clip(grain, 0, 255).astype(np.uint8))


@functools.cache
def documents() -> dict[str, Image.Image]:
    """What a document model reads, and photographs."""
    return {
        "page": page().convert("RGB"),
        "page, black and white": page(seed=2).convert("1").convert("RGB"),
        "line art": line_art().convert("RGB"),
        "screenshot": screenshot(),
        "photo": photo(),
    }


def two_colours(width: int = 96, height: int = 64) -> Image.Image:
    """Red left, blue right, a white square at its top left: each turn is another picture."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2], pixels[:, width // 2 :] = (200, 30, 30), (30, 30, 200)
    pixels[:16, :16] = 255
    return Image.fromarray(pixels)


def exif_body(turn: int, *, order: str = "<", kind: int = 3) -> bytes:
    """A TIFF header with the orientation tag alone; kind 1 BYTE, 3 SHORT, 4 LONG, 5 RATIONAL, 9 SLONG, 12 DOUBLE."""
    short = {1: "B3x", 3: "H2x", 4: "I", 9: "i"}
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, 1)
    entry = struct.pack(f"{order}HHI", 0x112, kind, 1)
    if kind in short:
        return head + entry + struct.pack(order + short[kind], turn) + bytes(4)
    far = struct.pack(f"{order}II", turn, 1) if kind == 5 else struct.pack(f"{order}d", turn)
    return head + entry + struct.pack(f"{order}II", 26, 0) + far


def xmp(turn: int, *, as_element: bool = False) -> bytes:
    space = 'xmlns:tiff="http://ns.adobe.com/tiff/1.0/"'
    inner = (
        f"<rdf:Description {space}><tiff:Orientation>{turn}</tiff:Orientation></rdf:Description>"
        if as_element
        else f'<rdf:Description {space} tiff:Orientation="{turn}"/>'
    )
    rdf = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
    text = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="{rdf}">{inner}</rdf:RDF></x:xmpmeta>'
    return text.encode()


EXIF, XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"


def jpeg_with(*segments: bytes, image: Image.Image | None = None) -> bytes:
    """A JPEG with these APP1 segments."""
    data = encode(image or two_colours(), "JPEG", quality=95)
    app1 = b"".join(b"\xff\xe1" + struct.pack(">H", len(s) + 2) + s for s in segments)
    return data[:2] + app1 + data[2:]


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_with(name: bytes, body: bytes, *, at_end: bool = False) -> bytes:
    """A PNG with a chunk behind its header, or behind its pixels."""
    data = encode(two_colours(), "PNG")
    place = len(data) - 12 if at_end else 33
    return data[:place] + chunk(name, body) + data[place:]


def webp_with(exif: bytes) -> bytes:
    """A lossy WebP with an EXIF chunk as it is: `save` would change its bytes."""
    body = encode(two_colours(), "WEBP", quality=80)[12:]
    size = struct.pack("<I", 95)[:3] + struct.pack("<I", 63)[:3]
    tail = b"EXIF" + struct.pack("<I", len(exif)) + exif + b"\0" * (len(exif) % 2)
    chunks = b"VP8X" + struct.pack("<IB3x", 10, 8) + size + body + tail
    return b"RIFF" + struct.pack("<I", len(chunks) + 4) + b"WEBP" + chunks


@functools.cache
def turned() -> dict[str, bytes]:
    """Orientation wherever writers put it, right and wrong."""
    raw = EXIF + exif_body(6)
    profile = b"\nexif\n%8d\n" % len(raw) + raw.hex().encode() + b"\n"
    exif = {f"exif {turn}": jpeg_with(EXIF + exif_body(turn)) for turn in (*range(10), 300)}
    kinds = {
        f"exif 6 of type {kind}, order {order}": jpeg_with(
            EXIF + exif_body(6, order=order, kind=kind)
        )
        for kind in (1, 3, 4, 5, 9, 12)
        for order in "<>"
    }
    tiffs = {f"tiff {t}": encode(two_colours(), "TIFF", tiffinfo={0x112: t}) for t in range(1, 9)}
    return exif | kinds | tiffs | {
        "exif 1, then 6": jpeg_with(EXIF + exif_body(1), EXIF + exif_body(6)),
        "exif 6, then 1": jpeg_with(EXIF + exif_body(6), EXIF + exif_body(1)),
        "exif that is damaged": jpeg_with(EXIF + b"II*\0\xff\xff\xff\xff"),
        "exif that is no TIFF": jpeg_with(EXIF + b"nonsense"),
        "exif cut in the entry": jpeg_with(EXIF + exif_body(6)[:14]),
        "xmp 6": jpeg_with(XMP + xmp(6)),
        "xmp 5 as an element": jpeg_with(XMP + xmp(5, as_element=True)),
        "xmp 6, exif 1": jpeg_with(EXIF + exif_body(1), XMP + xmp(6)),
        "xmp 1, exif 8": jpeg_with(XMP + xmp(1), EXIF + exif_body(8)),
        "png exif 6": png_with(b"eXIf", exif_body(6)),
        "png exif 7 behind the pixels": png_with(b"eXIf", exif_body(7), at_end=True),
        "png xmp 8": png_with(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(8)),
        "png xmp 6 behind the pixels": png_with(
            b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(6), at_end=True
        ),
        "png raw profile 6": png_with(
            b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile)
        ),
        "webp exif 6": webp_with(exif_body(6)),
        "webp exif 6 with JPEG's prefix": webp_with(EXIF + exif_body(6)),
        "webp xmp 6": encode(two_colours(), "WEBP", xmp=xmp(6), lossless=True),
        "tiff xmp 6": encode(two_colours(), "TIFF", tiffinfo={700: xmp(6)}),
        "avif exif 6": encode(two_colours(), "AVIF", exif=exif_body(6)),
        "mpo exif 6": encode(
            two_colours(), "MPO", save_all=True, append_images=[photo(96, 64)], exif=exif_body(6)
        ),
    }  # fmt: skip


def grey_tiff(bits: int, *, photometric: int = 1, white: int | None = None) -> bytes:
    """64 x 64, left half 0, right half `white` (the most that the bits hold), uncompressed."""
    white = 2**bits - 1 if white is None else white
    row = "".join(format(value, f"0{bits}b") for value in [0] * 32 + [white] * 32)
    packed = int(row, 2).to_bytes(len(row) // 8, "big") * 64
    if bits == 16:
        packed = np.array(([0] * 32 + [white] * 32) * 64, "<u2").tobytes()
    offset = 8 + 2 + 9 * 12 + 4
    tags = ((256, 3, 64), (257, 3, 64), (258, 3, bits), (259, 3, 1), (262, 3, photometric),
            (273, 4, offset), (277, 3, 1), (278, 4, 64), (279, 4, len(packed)))  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II" + struct.pack("<HIH", 42, 8, len(tags)) + entries + bytes(4) + packed


def bmp_with_masks(header_bytes: int, *, masks: tuple[int, ...]) -> bytes:
    """A 32-bit BMP of 40 x 24 whose header holds the masks of its channels (BITMAPV2INFOHEADER and later)."""
    pixels = np.zeros((24, 40), "<u4")
    for mask, value in zip(masks, (200, 90, 40), strict=False):
        pixels |= np.uint32(value << ((mask & -mask).bit_length() - 1))
    pixels[:12] = 0
    info = struct.pack(
        "<IiiHHIIiiII", header_bytes, 40, 24, 1, 32, 3, pixels.nbytes, 2835, 2835, 0, 0
    )
    info += struct.pack(f"<{len(masks)}I", *masks)
    info = info[:header_bytes].ljust(header_bytes, b"\0")
    start = 14 + header_bytes
    return (
        b"BM" + struct.pack("<IHHI", start + pixels.nbytes, 0, 0, start) + info + pixels.tobytes()
    )


def animated_png(*, frames_in_header: int) -> bytes:
    """Two frames, whatever number the header names."""
    data = encode(photo(60, 40), "PNG", save_all=True, append_images=[photo(60, 40, seed=9)])
    place = data.index(b"acTL")
    body = struct.pack(">II", frames_in_header, 0)
    return data[: place - 4] + chunk(b"acTL", body) + data[place + 16 :]


@functools.cache
def rare() -> dict[str, bytes]:
    """Whole files of rare kinds. All open in Pillow; whether their pixels are known is for the code to say."""
    small = photo(60, 40)
    grey16 = Image.fromarray((np.arange(40 * 60).reshape(40, 60) * 27).astype(np.uint16))
    see_through = small.convert("RGBA")
    see_through.putalpha(Image.linear_gradient("L").resize((60, 40)))
    palette = small.convert("P")
    icc = encode(small, "JPEG", icc_profile=b"\0" * 200)
    cut = encode(small, "PNG")
    return {
        "12-bit TIFF": grey_tiff(12),
        "16-bit TIFF": grey_tiff(16),
        "4-bit TIFF": grey_tiff(4),
        "16-bit TIFF, white is zero": grey_tiff(16, photometric=0),
        "16-bit PNG": encode(grey16, "PNG"),
        "16-bit JPEG 2000": encode(grey16, "JPEG2000"),
        "float TIFF": encode(small.convert("F"), "TIFF"),
        "32-bit TIFF": encode(small.convert("I"), "TIFF"),
        "PA TIFF": encode(palette.convert("PA"), "TIFF"),
        "LAB TIFF": encode(Image.new("LAB", (60, 40), (90, 128, 128)), "TIFF"),
        "CMYK TIFF": encode(small.convert("CMYK"), "TIFF"),
        "YCbCr TIFF": encode(small.convert("YCbCr"), "TIFF"),
        "1-bit TIFF": encode(small.convert("1"), "TIFF", compression="group4"),
        "LZW TIFF": encode(small, "TIFF", compression="tiff_lzw"),
        "TIFF of two pages": encode(small, "TIFF", save_all=True, append_images=[photo(60, 40, seed=5)]),
        "BMP, 52-byte header": bmp_with_masks(52, masks=(0xFF0000, 0xFF00, 0xFF)),
        "BMP, 52-byte header, other order": bmp_with_masks(
            52, masks=(0xFF000000, 0xFF0000, 0xFF00)
        ),
        "BMP, 56-byte header": bmp_with_masks(56, masks=(0xFF0000, 0xFF00, 0xFF, 0xFF000000)),
        "BMP, palette": encode(palette, "BMP"),
        "CMYK JPEG": encode(small.convert("CMYK"), "JPEG"),
        "grey JPEG": encode(small.convert("L"), "JPEG"),
        "RGB JPEG": encode(small, "JPEG", keep_rgb=True),
        "JPEG 4:4:4": encode(small, "JPEG", subsampling=0),
        "JPEG 4:2:2, progressive": encode(small, "JPEG", subsampling=1, progressive=True),
        "JPEG of odd size": encode(photo(61, 39), "JPEG"),
        "JPEG with a profile": icc,
        "JPEG with a tail": icc + b"tail" * 50,
        "MPO": encode(small, "MPO", save_all=True, append_images=[photo(60, 40, seed=5)]),
        "palette PNG, transparent": encode(palette, "PNG", transparency=bytes(range(256))),
        "palette PNG, one transparent": encode(palette, "PNG", transparency=3),
        "grey PNG, one transparent": encode(small.convert("L"), "PNG", transparency=7),
        "LA PNG": encode(see_through.convert("LA"), "PNG"),
        "RGBA PNG": encode(see_through, "PNG"),
        "1-bit PNG": encode(small.convert("1"), "PNG"),
        "PNG cut inside IEND": cut[:-3],
        "PNG cut before IEND": cut[:-12],
        "PNG with a tail": cut + b"tail",
        "animated PNG": animated_png(frames_in_header=2),
        "animated PNG of one frame by its header": animated_png(frames_in_header=1),
        "animated PNG of nine frames by its header": animated_png(frames_in_header=9),
        "animated PNG of no frame by its header": animated_png(frames_in_header=0),
        "animated GIF": encode(palette, "GIF", save_all=True, append_images=[photo(60, 40, seed=5).convert("P")]),
        "transparent GIF": encode(palette, "GIF", transparency=3),
        "animated WebP": encode(small, "WEBP", save_all=True, append_images=[photo(60, 40, seed=5)]),
        "RGBA WebP": encode(see_through, "WEBP"),
        "RGBA WebP, lossless": encode(see_through, "WEBP", lossless=True),
        "AVIF": encode(small, "AVIF"),
        "JPEG 2000": encode(small, "JPEG2000"),
        "icon": encode(see_through, "ICO"),
        "PPM": encode(small, "PPM"),
        "16-bit PGM": b"P5\n8 4\n65535\n" + grey16.crop((0, 0, 8, 4)).tobytes(),
    }  # fmt: skip


@functools.cache
def damaged() -> dict[str, bytes]:
    """Files that Pillow does not decode, or only by luck."""
    jpeg, png = encode(photo(160, 120), "JPEG"), encode(photo(160, 120), "PNG")
    tiff, webp = encode(photo(60, 40), "TIFF"), encode(photo(160, 120), "WEBP")
    cut = {f"JPEG cut at {share}%": jpeg[: len(jpeg) * share // 100] for share in (1, 50, 90, 99)}
    return cut | {
        "JPEG without its last byte": jpeg[:-1],
        "PNG cut in half": png[: len(png) // 2],
        "PNG without its last pixels": png[:-40],
        "TIFF cut in half": tiff[: len(tiff) // 2],
        "WebP cut in half": webp[: len(webp) // 2],
        "no bytes": b"",
        "a page of the web": b"<html>404 Not Found</html>",
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n%%EndComments\nshowpage\n",
        "bomb": encode(Image.new("1", (12_000, 12_000)), "PNG"),
        "bomb beyond Pillow's limit": encode(Image.new("1", (20_000, 10_000)), "PNG"),
    }
