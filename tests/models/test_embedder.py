"""Bytes to pixels against Pillow and arithmetic; bad bytes against their codes; pixels to rows against plain torch."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models import embedder as embedder_module
from models.artifact import Preprocessing, load
from models.backbones.resnet import Name, ResNet
from models.embedder import Embedder, ImageError, decode, normalize, prepare
from models.inference import buckets, folded, smallest

GREY = Preprocessing(size=28, resize="stretch", channels=1, mean=(0.286,), std=(0.353,))
COLOUR = Preprocessing(size=16, resize="crop", channels=3, mean=(0.5,) * 3, std=(0.25,) * 3)


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def noise(size: tuple[int, int] = (28, 28), mode: str = "RGB", seed: int = 0) -> Image.Image:
    shape = (size[1], size[0], len(mode)) if len(mode) > 1 else (size[1], size[0])
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode)


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


def photo(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Detail at every scale with a photograph's falling spectrum, unlike noise, which no two resizes agree on."""
    rng, total = np.random.default_rng(seed), np.zeros((size[1], size[0], 3))
    for cells in (2, 4, 8, 16, 32, 64, 128):
        small = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += (np.asarray(small.resize(size, Image.Resampling.BICUBIC)) - 127.5) * (2 / cells**0.7)
    return Image.fromarray((127.5 + total / 2).clip(0, 255).astype(np.uint8))


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


def test_embeddings_of_scaled_decodes_are_those_of_full_ones(small_artifact: Path) -> None:
    embedder = Embedder(load(small_artifact))
    files = [encoded(photo((500 + 37 * i, 400), i), "JPEG", quality=90) for i in range(8)]
    full = np.stack([prepare(Image.open(io.BytesIO(data)), embedder.card.preprocessing) for data in files])
    scaled = np.stack([decode(data, embedder.card.preprocessing) for data in files])
    assert not np.array_equal(full, scaled)
    cosine = torch.nn.functional.cosine_similarity(embedder.embed(full), embedder.embed(scaled))
    assert float(cosine.min()) > 0.995


def test_a_large_jpeg_is_decoded_at_the_scale_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(embedder_module, "prepare", lambda image, how: seen.append(image.size) or prepare(image, how))
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


def test_folding_changes_no_embedding_and_no_artifact(small_artifact: Path) -> None:
    artifact = load(small_artifact)
    before = {name: tensor.clone() for name, tensor in artifact.encoder.state_dict().items()}
    fused = folded(artifact.encoder)
    assert not [module for module in fused.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    x = torch.randn(5, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(fused(x), artifact.encoder(x), rtol=1e-4, atol=1e-5)
    after = artifact.encoder.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert load(small_artifact).card.revision == artifact.card.revision


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_folding_takes_running_statistics_scales_and_shortcuts_along(name: Name) -> None:
    torch.manual_seed(0)
    encoder = ResNet(name, width=4, in_channels=3)
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.2)
            module.running_mean, module.running_var = (
                torch.randn(len(module.weight)),
                torch.rand(len(module.weight)) + 0.5,
            )
    x = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(folded(encoder)(x), encoder.eval()(x), rtol=1e-4, atol=1e-4)


def test_every_batch_has_a_bucket_and_no_bucket_is_over_twice_a_batch() -> None:
    for largest in (1, 2, 3, 24, 32, 100):
        sizes = buckets(largest)
        assert sizes[-1] == largest
        assert all(n <= smallest(sizes, n) < 2 * n or n == 1 for n in range(1, largest + 1))
    with pytest.raises(ValueError, match="empty"):
        smallest(buckets(8), 9)


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


def test_embeddings_are_the_plain_forward_pass_batch_by_batch(small_artifact: Path) -> None:
    artifact = load(small_artifact)
    pixels = torch.randint(0, 256, (11, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = artifact.encoder((pixels.float() / 255 - 0.286) / 0.353)
    embedder = Embedder(artifact, max_batch=4)
    torch.testing.assert_close(embedder.embed(pixels), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(embedder.embed(pixels.numpy()), expected, rtol=1e-4, atol=1e-5)
    assert embedder.embed(pixels[:0]).shape == (0, 32)
    bf16 = Embedder(artifact, dtype=torch.bfloat16).embed(pixels)
    assert bf16.dtype == torch.float32
    assert float(torch.nn.functional.cosine_similarity(bf16, expected).min()) > 0.999


@pytest.mark.parametrize("shape", [(3, 28, 28), (3, 3, 28, 28), (3, 1, 27, 28)])
def test_wrong_shapes_are_refused(small_artifact: Path, shape: tuple[int, ...]) -> None:
    embedder = Embedder(load(small_artifact))
    with pytest.raises(ValueError, match=r"takes uint8 \(n, 1, 28, 28\)"):
        embedder.embed(torch.zeros(shape, dtype=torch.uint8))
    with pytest.raises(ValueError, match="float32"):
        embedder.embed(torch.zeros(2, 1, 28, 28))


def test_files_are_named_when_they_are_bad(small_artifact: Path, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    good.write_bytes(encoded(noise((30, 30))))
    bad.write_bytes(b"?")
    embedder = Embedder(load(small_artifact))
    assert embedder.embed_files([good, good]).shape == (2, 32)
    with pytest.raises(ImageError, match=r"bad\.png: the bytes are no image"):
        embedder.embed_files([good, bad])


def test_normalize_leaves_zero_rows_zero() -> None:
    rows = normalize(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    torch.testing.assert_close(rows, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
