"""Bounds the time that decoding an image file takes, from the file's structure, without decoding it.

A few bytes can declare many pixels, scans or chunks, and a decoder works for each of them. The costs here were measured
on the worst files of each format (benchmarks.worst_images), on one core of a slow machine. See
docs/explanation/decoding.md.
"""

import math
import re
import struct
from collections.abc import Callable

import numpy as np

# Limits on structure that decoders written in Python loop over. Ordinary files stay far below them.
MAX_SEGMENTS = 64  # segments of a JPEG's head, and chunks of a WebP
MAX_CHUNKS = 512  # chunks of a PNG, and blocks before a GIF's first frame
MAX_METADATA = 1 << 16  # bytes that are not pixels
SCAN = b"\xff\xda"

NANOSECOND = 1e-9
# (nanoseconds a pixel, nanoseconds a byte) of the worst file of each format.
JPEG_COST = (8, 20)
PNG_COST = (40, 12)
GIF_COST = (40, 15)
WEBP_COST = (40, 60)
BMP_COST = (12, 3)
JPEG_SCAN_COST = 2  # nanoseconds for each pixel of each scan
_SEGMENT = struct.Struct(">HH").unpack_from  # marker and length of a JPEG's segment
LARGEST_BLOCK = 32  # pixels: the largest unit to which a side of a JPEG is padded, four blocks of 8

# Common formats that are not decoded, by their first bytes.
OTHERS: tuple[tuple[str, bytes], ...] = (
    ("HEIC", rb".{4}ftyp(heic|heix|hevc|heim|heis|mif1|msf1)"),
    ("AVIF", rb".{4}ftyp(avif|avis)"),
    ("TIFF", rb"II\*\0|MM\0\*|II\+\0|MM\0\+"),
    ("SVG", rb"\s*(\xef\xbb\xbf)?\s*(<\?xml[^>]*>\s*)?(<!--.{0,500}?-->\s*)*(<!DOCTYPE svg[^>]*>\s*)?<svg"),
    ("JPEG XL", rb"\xff\x0a|\0\0\0\x0cJXL "),
    ("JPEG 2000", rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"),
    ("PDF", rb"%PDF-"),
)


def format_of(data: bytes) -> str | None:
    """JPEG, PNG, WEBP, GIF or BMP by the file's first bytes; None for anything else."""
    if data[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return "GIF" if data[:6] in (b"GIF87a", b"GIF89a") else "BMP" if data[:2] == b"BM" else None


def known_as(data: bytes) -> str | None:
    """The name of a format that is recognised but not decoded."""
    head = data[:1024]
    return next((name for name, pattern in OTHERS if re.match(pattern, head, re.DOTALL)), None)


def seconds(data: bytes) -> float:
    """The most CPU seconds that decoding takes; infinite if the file's structure sets no bound or is unusual."""
    bound = BOUNDS.get(format_of(data))
    return math.inf if bound is None else bound(data) * NANOSECOND


def scans(data: bytes, start: int = 0) -> int:
    """An upper bound on the scans of a JPEG file: bytes in metadata that look like the start of a scan count too."""
    # numpy, since bytes.count takes 5 ns a byte if the first byte is frequent
    values = np.frombuffer(data, np.uint8)[start:]
    return int(np.count_nonzero((values[:-1] == SCAN[0]) & (values[1:] == SCAN[1])))


def rle_bitmap(data: bytes) -> bool:
    """Whether a BMP file is run-length encoded."""
    return data[:2] == b"BM" and _number(data, 14, 4) >= 40 and _number(data, 30, 4) in (1, 2)


def padded_pixels(width: int, height: int) -> int:
    """The most pixels that a JPEG of this size can have after its sides are padded to whole blocks."""
    wide, high = (-(-side // LARGEST_BLOCK) * LARGEST_BLOCK for side in (width, height))
    return wide * high


def _number(data: bytes, at: int, size: int, order: str = "little") -> int:
    return int.from_bytes(data[at : at + size], "big" if order == "big" else "little")


def _cost(costs: tuple[int, int], pixels: int, length: int) -> float:
    return float(costs[0] * pixels + costs[1] * length)


def _jpeg(data: bytes) -> float:
    at, pixels = 2, 0
    for _ in range(MAX_SEGMENTS):
        marker, length = _SEGMENT(data, at) if at + 4 <= len(data) else (_number(data, at, 2, "big"), 0)
        if marker == 0xFFDA:
            work = _cost(JPEG_COST, pixels, len(data)) + JPEG_SCAN_COST * pixels * scans(data, at)
            return work if pixels and at <= 2 * MAX_METADATA else math.inf
        if not 0xFFC0 <= marker <= 0xFFFE:
            break
        if marker in (0xFFC0, 0xFFC1, 0xFFC2):  # baseline, extended, progressive: Huffman-coded all
            pixels = max(pixels, padded_pixels(_number(data, at + 7, 2, "big"), _number(data, at + 5, 2, "big")))
        elif 0xFFC0 <= marker <= 0xFFCF and marker not in (0xFFC4, 0xFFC8):
            break
        at += 2 + max(2, length)
    return math.inf


def _png(data: bytes) -> float:
    at = 8
    metadata = 0
    unpacked = 0
    for _ in range(MAX_CHUNKS):
        kind = data[at + 4 : at + 8]
        length = _number(data, at, 4, "big")
        if kind in (b"IEND", b""):
            break
        if kind in (b"acTL", b"fcTL", b"fdAT"):
            return math.inf
        if kind not in (b"IDAT", b"IHDR", b"PLTE"):
            metadata += length
        unpacked += kind in (b"zTXt", b"iTXt", b"iCCP")
        at += 12 + length
    else:
        return math.inf
    if metadata > MAX_METADATA or unpacked > 2 or data[12:16] != b"IHDR":
        return math.inf
    return _cost(PNG_COST, _number(data, 16, 4, "big") * _number(data, 20, 4, "big"), len(data))


def webp_pixels(data: bytes) -> tuple[int, bool]:
    """The most pixels that a WebP file declares, and whether it is plain: no animation and little metadata."""
    at = 12
    pixels = 0
    metadata = 0
    plain = True
    for _ in range(MAX_SEGMENTS):
        if at >= len(data):
            return pixels, plain and metadata <= MAX_METADATA
        kind = data[at : at + 4]
        length = _number(data, at + 4, 4)
        body = at + 8
        if kind == b"VP8X":
            plain &= not _number(data, body, 1) & 2  # animated
            pixels = max(pixels, (1 + _number(data, body + 4, 3)) * (1 + _number(data, body + 7, 3)))
        elif kind == b"VP8L":
            bits = _number(data, body + 1, 4)
            pixels = max(pixels, (1 + (bits & 0x3FFF)) * (1 + (bits >> 14 & 0x3FFF)))
        elif kind == b"VP8 ":
            pixels = max(pixels, (_number(data, body + 6, 2) & 0x3FFF) * (_number(data, body + 8, 2) & 0x3FFF))
        elif kind != b"ALPH":
            metadata += length
        at = body + length + length % 2
    return pixels, False


def _webp(data: bytes) -> float:
    pixels, plain = webp_pixels(data)
    return _cost(WEBP_COST, pixels, len(data)) if pixels and plain else math.inf


def _gif(data: bytes) -> float:
    def after_colours(at: int, flags: int) -> int:
        return at + (3 << (flags & 7) + 1 if flags & 0x80 else 0)

    pixels = _number(data, 6, 2) * _number(data, 8, 2)
    at = after_colours(13, _number(data, 10, 1))
    blocks = 0
    while data[at : at + 1] == b"!" and blocks < MAX_CHUNKS:
        at += 2
        while (length := _number(data, at, 1)) and blocks < MAX_CHUNKS:
            at += 1 + length
            blocks += 1
        at += 1
        blocks += 1
    if data[at : at + 1] != b"," or blocks >= MAX_CHUNKS:
        return math.inf
    left, top, width, height = (_number(data, at + offset, 2) for offset in (1, 3, 5, 7))
    return _cost(GIF_COST, max(pixels, (left + width) * (top + height)), len(data))


def _bmp(data: bytes) -> float:
    if (header := _number(data, 14, 4)) == 12:
        pixels = _number(data, 18, 2) * _number(data, 20, 2)
    else:
        height = int.from_bytes(data[22:26], "little", signed=True)
        pixels = _number(data, 18, 4) * abs(height)
        if header < 40 or _number(data, 30, 4) not in (0, 3):
            return math.inf
    return _cost(BMP_COST, pixels, len(data))


BOUNDS: dict[str | None, Callable[[bytes], float]] = {
    "JPEG": _jpeg,
    "PNG": _png,
    "WEBP": _webp,
    "GIF": _gif,
    "BMP": _bmp,
}
