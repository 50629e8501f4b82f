"""Image bytes to pixels against Pillow and arithmetic; bad bytes against their codes."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from models import preprocess as preprocess_module
from models.decode import ImageError
from models.preprocess import Preprocessing, decode, prepare
from tests.support.images import encoded, noise, photo

GREY = Preprocessing(size=28, resize="stretch", channels=1, mean=(0.286,), std=(0.353,))
COLOUR = Preprocessing(size=16, resize="crop", channels=3, mean=(0.5,) * 3, std=(0.25,) * 3)


def test_lossless_pixels_arrive_untouched() -> None:
    image = noise((28, 28), "L")
    for form in ("PNG", "BMP", "GIF"):
        np.testing.assert_array_equal(decode(encoded(image, form), GREY)[0], np.asarray(image))
    colour = noise((16, 16))
    np.testing.assert_array_equal(decode(encoded(colour), COLOUR), np.asarray(colour).transpose(2, 0, 1))
    np.testing.assert_array_equal(
        decode(encoded(colour, "WEBP", lossless=True), COLOUR), np.asarray(colour).transpose(2, 0, 1)
    )


def test_stretch_keeps_everything_and_crop_keeps_the_centre() -> None:
    wide = Image.new("RGB", (48, 16), "black")
    wide.paste("white", (16, 0, 32, 16))
    assert decode(encoded(wide), COLOUR).min() == 255
    stretched = decode(encoded(wide), COLOUR.model_copy(update={"resize": "stretch"}))
    assert stretched.min() == 0
    assert stretched.mean() == pytest.approx(85, abs=2)


def test_grey_encoders_take_colour_and_colour_encoders_take_grey() -> None:
    red = Image.new("RGB", (28, 28), (255, 0, 0))
    assert decode(encoded(red), GREY).flatten().tolist() == [76] * 784  # ITU-R 601-2: 0.299 * 255
    grey = decode(encoded(Image.new("L", (16, 16), 99)), COLOUR)
    assert grey.shape == (3, 16, 16)
    assert np.unique(grey).tolist() == [99]


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    deep = Image.fromarray(np.full((28, 28), 0x8001, np.uint16))
    assert np.unique(decode(encoded(deep), GREY)).tolist() == [0x80]


def test_transparency_is_laid_on_white_and_palettes_are_resolved() -> None:
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    assert np.unique(decode(encoded(clear), COLOUR)).tolist() == [255]
    palette = Image.new("RGB", (16, 16), (10, 200, 30)).convert("P", palette=Image.Palette.ADAPTIVE)
    assert decode(encoded(palette), COLOUR)[:, 3, 3].tolist() == [10, 200, 30]


def test_the_exif_orientation_is_applied() -> None:
    image = Image.new("RGB", (16, 16), "black")
    image.paste("white", (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to show it
    turned = decode(encoded(image, "PNG", exif=exif), COLOUR)
    assert turned[0, 8, 15] == 255
    assert turned[0, 8, 0] == 0


def test_cmyk_jpeg_and_animated_gif_decode() -> None:
    cmyk = encoded(Image.new("CMYK", (20, 20), (0, 255, 255, 0)), "JPEG")
    assert decode(cmyk, COLOUR)[0].min() > 200
    assert decode(cmyk, COLOUR)[1].max() < 60
    frames = [Image.new("L", (28, 28), value) for value in (10, 250)]
    gif = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.unique(decode(gif, GREY)).tolist() == [10]


@pytest.mark.parametrize("preprocessing", [GREY, COLOUR, COLOUR.model_copy(update={"size": 64, "resize": "stretch"})])
@pytest.mark.parametrize("size", [(400, 300), (1021, 767), (300, 1600)])
def test_a_scaled_decode_is_within_bounds_of_the_full_one(preprocessing: Preprocessing, size: tuple[int, int]) -> None:
    data = encoded(photo(size), "JPEG", quality=90)
    full = prepare(Image.open(io.BytesIO(data)), preprocessing).astype(float)
    scaled = decode(data, preprocessing).astype(float)
    assert np.abs(scaled - full).mean() < 2  # of 255
    assert np.abs(scaled - full).max() < 24
    same = decode(encoded(Image.open(io.BytesIO(data)), "PNG"), preprocessing)
    np.testing.assert_array_equal(same, full)


def test_a_large_jpeg_is_decoded_at_the_scale_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(preprocess_module, "prepare", lambda image, how: seen.append(image.size) or prepare(image, how))
    data = encoded(Image.new("RGB", (1600, 1200)), "JPEG")
    decode(data, COLOUR)
    decode(data, COLOUR.model_copy(update={"size": 224}))
    decode(data, COLOUR.model_copy(update={"size": 1024}))
    assert seen == [(200, 150), (800, 600), (1600, 1200)]


def test_a_progressive_greyscale_and_turned_jpeg_decodes_as_it_should() -> None:
    image = Image.new("L", (640, 320), 0)
    image.paste(255, (0, 0, 640, 160))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode(encoded(image, "JPEG", exif=exif, progressive=True), GREY)
    assert turned.shape == (1, 28, 28)
    assert turned[0, 14, 26] > 250
    assert turned[0, 14, 1] < 5


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "empty_image"),
        (b"not an image at all", "not_an_image"),
        (b"\x89PNG\r\n\x1a\n", "not_an_image"),
        (encoded(noise((64, 64)), "JPEG")[:-200], "damaged_image"),
        (encoded(noise((64, 64)))[:-200], "damaged_image"),
        (encoded(Image.new("L", (1, 1))), "image_too_small"),
        (encoded(Image.new("L", (500, 7))), "image_too_small"),
        (png_header(30_000, 30_000), "image_too_large"),
        (png_header(9_000, 9_000), "image_too_large"),
        (png_header(100, 100), "damaged_image"),
        (encoded(noise(), "TIFF"), "not_an_image"),
    ],
)
def test_bad_bytes_are_named(data: bytes, code: str) -> None:
    with pytest.raises(ImageError) as error:
        decode(data, GREY)
    assert error.value.code == code


def test_the_pixel_limit_is_checked_before_pixels_exist() -> None:
    import tracemalloc

    tracemalloc.start()
    with pytest.raises(ImageError, match="9000 x 9000 pixels; the limit is 64000000"):
        decode(png_header(9_000, 9_000), GREY)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


WIDE = Image.new("RGB", (48, 16), "black")
WIDE.paste("white", (16, 0, 32, 16))


def how(**changes: object) -> Preprocessing:
    return Preprocessing.model_validate({"size": 16, "channels": 3, "mean": (0.5,) * 3, "std": (0.5,) * 3} | changes)


def test_short_keeps_the_shape_squash_does_not_and_pad_keeps_everything() -> None:
    assert prepare(WIDE, how(resize="short")).min() == 255
    assert prepare(WIDE, how(resize="squash", interpolation="bilinear")).mean() == pytest.approx(85, abs=2)
    padded = prepare(WIDE, how(resize="pad", interpolation="nearest", fill=(9, 10, 11)))
    assert padded[:, 0, 0].tolist() == [9, 10, 11]
    assert padded[:, 15, 15].tolist() == [9, 10, 11]
    assert padded[0, 5:10, 5:10].min() == 255
    np.testing.assert_array_equal(padded[0, 8], [0] * 5 + [255] * 6 + [0] * 5)


@pytest.mark.parametrize("name", ["bilinear", "bicubic", "lanczos", "nearest"])
def test_short_then_centre_is_pillows_resize_then_crop(name: str) -> None:
    image = photo((301, 200))
    size = (int(32 * 301 / 200), 32)
    resized = image.resize(size, getattr(Image.Resampling, name.upper()))
    left = round((size[0] - 16) / 2)
    expected = np.asarray(resized.crop((left, 8, left + 16, 24))).transpose(2, 0, 1)
    got = prepare(image, how(resize="short", to=32, interpolation=name))
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(("centre", "starts"), [("round", [0, 2, 2]), ("floor", [0, 1, 2])])
def test_an_odd_margin_is_rounded_as_the_card_says(centre: str, starts: list[int]) -> None:
    """Margins of 1, 3 and 5 pixels: torchvision rounds halves to the even side, others down."""
    for margin, start in zip((1, 3, 5), starts, strict=True):
        ramp = Image.fromarray(np.arange(16 + margin, dtype=np.uint8)[None].repeat(16, 0))
        square = prepare(ramp, how(resize="short", centre=centre))
        assert square[0, 0, 0] == start


def test_a_card_that_contradicts_itself_is_refused() -> None:
    for changes, message in (
        ({"resize": "crop", "to": 20}, "use short or squash"),
        ({"resize": "short", "to": 15}, "less than size"),
        ({"fill": (1,)}, "fill needs 3 values"),
        ({"std": (0.0, 1.0, 1.0)}, "std must be positive"),
        ({"mean": (0.5,)}, "mean and std need 3 values"),
    ):
        with pytest.raises(ValueError, match=message):
            how(**changes)


def test_a_jpeg_is_decoded_in_full_where_the_card_says_so() -> None:
    data = encoded(photo((1021, 767)), "JPEG", quality=90)
    whole = how(resize="short", to=18, draft=0)
    np.testing.assert_array_equal(decode(data, whole), prepare(Image.open(io.BytesIO(data)), whole))
    assert not np.array_equal(decode(data, whole), decode(data, how(resize="short", to=18)))
