"""Names are names, headers are claims, and an image in training is the image that is served."""

import io
import os
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.preprocess import Preprocessing, decode
from training.augment import Augmentation
from training.data import DataError, FileSet, ShardSet, read_folder
from training.data.feed import Sharded, Stream, Streamed, seeded, two_crops
from training.data.files import read_shards

WHOLE = Augmentation(crop=(1, 1), ratio=(1, 1))
COLOUR = Preprocessing(size=16, resize="stretch", channels=3, mean=(0, 0, 0), std=(1, 1, 1))


def encoded(image: Image.Image, form: str = "PNG", **settings: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **settings)  # type: ignore[arg-type]
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header claims any size and whose pixels are missing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def write_shard(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def test_a_file_name_is_never_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read from within the folder, where a name that begins with a scheme would be taken for an address."""
    monkeypatch.chdir(tmp_path)
    image = encoded(Image.new("RGB", (20, 20), "red"))
    names = ("pipe:touch PWNED; cat pipe*train.tar #train.tar", "http:train.tar", "file:train.tar", "-train.tar")
    for i, name in enumerate(names):
        write_shard(Path(name), {f"{i}.png": image, f"{i}.cls": str(i).encode()})
    shards = read_folder(Path(), "train")
    assert isinstance(shards, ShardSet)
    (found,) = shards.chunks(COLOUR)
    assert sorted(found.labels.tolist()) == [0, 1, 2, 3]
    assert len(list(Sharded(shards, (WHOLE, WHOLE), 16, batch_size=2, seed=0, workers=0).batches(0, 0))) == 2
    assert sorted(os.listdir()) == sorted(names), "nothing else came into being"  # noqa: PTH208


def test_members_are_grouped_by_the_path_up_to_the_first_dot(tmp_path: Path) -> None:
    image = encoded(Image.new("RGB", (20, 20)))
    path = tmp_path / "train.tar"
    members = {"a/1.cls": b"3", "a/1.seg.png": b"mask", "a/1.PNG": image, "b/1.png": image, "b/1.cls": b" 4\n"}
    write_shard(path, members | {"README": b"no suffix"})
    assert [(item.name, item.label) for item in read_shards([path])] == [(f"{path}:a/1", 3), (f"{path}:b/1", 4)]
    for damage, message in (({"1.png": image}, "lacks its image or its label"), ({"1.cls": b"3"}, "lacks its image")):
        write_shard(path, damage)
        with pytest.raises(DataError, match=message):
            list(read_shards([path]))
    write_shard(path, {"1.png": image, "1.cls": b"three"})
    with pytest.raises(DataError, match="no whole number"):
        list(read_shards([path]))


def test_a_member_that_claims_the_world_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "train.tar"
    write_shard(path, {"1.png": b"x"})
    raw = bytearray(path.read_bytes())
    raw[124:136] = b"%011o\0" % (1 << 32)
    raw[148:156] = b"        "
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    path.write_bytes(bytes(raw))
    with pytest.raises(DataError, match=r"damaged .*claims 4294967296 bytes"):
        list(read_shards([path]))


def pictures() -> dict[str, bytes]:
    """A picture a kind that two readers could read differently."""
    ramp = np.linspace(0, 255, 16).astype(np.uint8)
    across, down = np.broadcast_to(ramp, (16, 16)), np.broadcast_to(ramp[:, None], (16, 16))
    whole = Image.fromarray(np.ascontiguousarray(np.stack([across, down, across // 2], axis=2)))
    turned, clear = Image.Exif(), whole.convert("RGBA")
    turned[0x0112] = 6
    clear.putalpha(Image.fromarray(ramp[None].repeat(16, 0)))
    wide = Image.fromarray((np.broadcast_to(ramp, (16, 16)).astype(np.uint16) << 8) + 37)
    palette = whole.quantize(16)
    palette.info["transparency"] = 3
    return {
        "transparent": encoded(Image.new("RGBA", (16, 16), (0, 0, 0, 0))),
        "half transparent": encoded(clear),
        "turned": encoded(whole, exif=turned),
        "turned jpeg": encoded(whole, "JPEG", exif=turned, quality=95),
        "16 bits": encoded(wide),
        "palette": encoded(palette, transparency=3),
        "grey": encoded(whole.convert("L")),
        "plain": encoded(whole),
    }


@pytest.mark.parametrize("kind", pictures())
def test_training_sees_the_picture_that_is_served(kind: str) -> None:
    """A crop of the whole image, which has the encoder's size, is to the bit what the service makes of the file."""
    data = pictures()[kind]
    first, second = two_crops(data, (WHOLE, WHOLE), 16, seeded(Stream.CROPS, 0))
    served = decode(data, COLOUR)
    for view in (first, second):
        np.testing.assert_array_equal(view.numpy(), served)
    if kind == "transparent":
        assert (served == 255).all()


def test_a_rectangle_that_is_turned_is_cropped_as_it_stands() -> None:
    """Twice as high as wide once it is upright; JPEG's scaled decoding has to know which side is which."""
    ramp = np.linspace(0, 255, 640).astype(np.uint8)
    lying = Image.fromarray(np.broadcast_to(ramp[None, :, None], (320, 640, 3)).copy())
    turned = Image.Exif()
    turned[0x0112] = 6
    crop = Augmentation(crop=(0.3, 0.9))
    expected = lying.transpose(Image.Transpose.ROTATE_270)
    for seed in range(4):
        views = [
            two_crops(data, (crop, crop), 32, seeded(Stream.CROPS, seed))
            for data in (encoded(lying, "JPEG", exif=turned, quality=95), encoded(expected, "JPEG", quality=95))
        ]
        np.testing.assert_allclose(views[0].numpy().astype(int), views[1].numpy().astype(int), atol=4)


def test_a_header_that_claims_too_much_is_skipped_and_counted(tmp_path: Path) -> None:
    folder = tmp_path / "train" / "class"
    folder.mkdir(parents=True)
    for i in range(6):
        (folder / f"{i}.png").write_bytes(encoded(Image.new("RGB", (20, 20), (10 * i, 0, 0))))
    (folder / "bomb.png").write_bytes(png_header(20_000, 20_000))
    (folder / "larger.png").write_bytes(png_header(200_000, 200_000))
    (folder / "tiny.png").write_bytes(encoded(Image.new("RGB", (1, 1))))
    files = read_folder(tmp_path, "train")
    assert isinstance(files, FileSet)
    stream = Streamed(files, (WHOLE, WHOLE), 16, batch_size=3, seed=0, workers=0)
    assert len(list(stream.batches(0, 0))) == 3
    assert {Path(name).name for name in stream.unreadable} == {"bomb.png", "larger.png", "tiny.png"}
    (found,) = files.chunks(COLOUR)
    assert len(found) == 6
    assert torch.equal(found.labels, torch.zeros(6, dtype=torch.int64))


def test_tensorboard_takes_no_folder_for_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard hands names with a scheme to a remote file system; a Path of ours never has one."""
    from training.watch import TensorBoard

    monkeypatch.chdir(tmp_path)
    watch = TensorBoard(Path("s3://bucket/run"))
    watch({"epoch": 1, "loss": 0.5})
    assert [path.name.startswith("events.out") for path in (tmp_path / "s3:" / "bucket" / "run").iterdir()] == [True]
