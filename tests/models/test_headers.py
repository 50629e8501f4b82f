"""What a file's structure says of the work it makes, against Pillow's own reading of it."""

import io
import math
import struct
import zlib
from typing import Any

import pytest
from PIL import Image

from models import headers
from models.decode import ImageError, opened
from models.preprocess import MAX_ASPECT, Preprocessing, decode
from tests.support.attacks import RLE_BITMAP, repeated_scans, webp
from tests.support.images import encoded, noise

HOW = Preprocessing(size=32, mean=(0.5,) * 3, std=(0.25,) * 3)
COSTS = {
    "JPEG": headers.JPEG_COST,
    "PNG": headers.PNG_COST,
    "GIF": headers.GIF_COST,
    "WEBP": headers.WEBP_COST,
    "BMP": headers.BMP_COST,
}


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (301, 200)])
@pytest.mark.parametrize(
    ("form", "mode", "options"),
    [
        ("JPEG", "RGB", {}),
        ("JPEG", "L", {"progressive": True}),
        ("JPEG", "CMYK", {"dpi": (72, 72)}),
        ("PNG", "RGB", {}),
        ("PNG", "RGBA", {"dpi": (72, 72)}),
        ("GIF", "P", {}),
        ("GIF", "L", {"transparency": 3, "comment": b"a comment"}),
        ("WEBP", "RGB", {}),
        ("WEBP", "RGBA", {"lossless": True}),
        ("WEBP", "RGBA", {}),
        ("BMP", "RGB", {}),
        ("BMP", "1", {}),
    ],
)
def test_the_work_follows_from_the_pixels_that_pillow_finds(
    form: str, mode: str, options: dict[str, Any], size: tuple[int, int]
) -> None:
    data = encoded(noise(size).convert(mode), form, **options)
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
    assert headers.format_of(data) == form
    pixels = headers.padded_pixels(width, height) if form == "JPEG" else width * height
    wanted = COSTS[form][0] * pixels + COSTS[form][1] * len(data)
    if form == "JPEG":
        wanted += headers.JPEG_SCAN_COST * pixels * headers.scans(data)
    assert headers.seconds(data) == pytest.approx(wanted * 1e-9)


@pytest.mark.parametrize(("mode", "progressive", "scans"), [("RGB", False, 1), ("L", True, 6), ("RGB", True, 10)])
def test_scans_are_counted(mode: str, progressive: bool, scans: int) -> None:
    assert headers.scans(encoded(noise((64, 64)).convert(mode), "JPEG", progressive=progressive)) == scans


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def with_chunks(png: bytes, more: bytes) -> bytes:
    """A PNG with chunks behind its header."""
    return png[:33] + more + png[33:]


PNG, JPEG, GIF = encoded(noise(), "PNG"), encoded(noise(), "JPEG"), encoded(noise(), "GIF")
FRAMES = {"save_all": True, "append_images": [noise(seed=1)]}


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(with_chunks(PNG, chunk(b"teXt", b"") * 1000), id="many chunks"),
        pytest.param(with_chunks(PNG, chunk(b"eXIf", b"x" * 100_000)), id="long metadata"),
        pytest.param(with_chunks(PNG, chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(9999))) * 3), id="packed texts"),
        pytest.param(encoded(noise(), "PNG", **FRAMES), id="animated PNG"),
        pytest.param(encoded(noise(), "WEBP", **FRAMES), id="animated WebP"),
        pytest.param(JPEG[:2] + b"\xff\xfe\x00\x02" * 1000 + JPEG[2:], id="many comments"),
        pytest.param(JPEG[:2] + b"\xff" * 1000 + JPEG[2:], id="padding"),
        pytest.param(JPEG.replace(b"\xff\xc0", b"\xff\xc9"), id="arithmetic coding"),
        pytest.param(GIF[:13] + b"!\xfe" + b"\1a" * 1000 + b"\0" + GIF[13:], id="many blocks"),
        pytest.param(RLE_BITMAP, id="run lengths"),
        pytest.param(b"hello", id="no image"),
        *(pytest.param(data[:20], id=f"cut {data[:4]!r}") for data in (JPEG, GIF)),
    ],
)
def test_what_is_not_plain_has_no_bound(data: bytes) -> None:
    assert headers.seconds(data) == math.inf


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP", "BMP"])
def test_no_bytes_make_it_fail(form: str) -> None:
    data = encoded(noise(), form)
    for at in range(len(data)):
        headers.seconds(data[:at])
        headers.seconds(data[:at] + b"\xff" + data[at + 1 :])
        headers.seconds(data[:at] + b"\0" + data[at + 1 :])


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (RLE_BITMAP, "rle_bitmap"),
        (webp(7000, 7000), "image_too_large"),
        (repeated_scans(2000, 2000, 400), "too_many_scans"),
    ],
)
def test_a_few_bytes_that_cost_seconds_are_refused_before_any_decoding(data: bytes, code: str) -> None:
    with pytest.raises(ImageError) as caught:
        decode(data, HOW, max_whole_pixels=16_000_000)
    assert caught.value.code == code


def test_an_image_decoded_whole_has_a_limit_of_its_own() -> None:
    png, jpeg = encoded(noise((64, 64)), "PNG"), encoded(noise((64, 64)), "JPEG")
    with opened(jpeg, max_whole_pixels=1000) as image:
        assert image.size == (64, 64)
    with pytest.raises(ImageError, match="the limit is 1000"), opened(png, max_whole_pixels=1000):
        pass


def test_a_strip_is_refused_where_its_short_side_would_be_resized() -> None:
    strip = encoded(noise((8, 8 * MAX_ASPECT + 8)), "PNG")
    short = HOW.model_copy(update={"resize": "short", "to": 40})
    with pytest.raises(ImageError, match="32 times the other"):
        decode(strip, short)
    assert decode(encoded(noise((8, 8 * MAX_ASPECT)), "PNG"), short).shape == (3, 32, 32)
    assert decode(strip, HOW).shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"),
        (b"II*\0\x08\0\0\0", "TIFF"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b"%PDF-1.7", "PDF"),
    ],
)
def test_what_people_send_is_refused_by_its_name(data: bytes, name: str) -> None:
    with pytest.raises(ImageError, match=f"this is {name}") as caught:
        decode(data, HOW)
    assert caught.value.code == "not_an_image"
