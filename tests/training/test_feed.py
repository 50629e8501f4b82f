"""Folders and shards in their published layouts, and batches that start anywhere in an epoch."""

import io
import multiprocessing
import os
import signal
import tarfile
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.preprocess import Preprocessing
from training.augment import Augmentation, crop_boxes
from training.data import SOURCES, DataError, FileSet, ImageSet, ShardSet, feed, load_split, read_folder
from training.data.feed import Resident, Sharded, Stream, Streamed, seeded, two_crops
from training.data.files import load

PREPROCESSING = Preprocessing(size=16, channels=3, mean=(0, 0, 0), std=(1, 1, 1))
WHOLE = Augmentation(crop=(1, 1), ratio=(1, 1))


def jpeg(value: int, size: tuple[int, int] = (40, 30)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(file, "JPEG", quality=95)
    return file.getvalue()


def write_folder(root: Path, each: int = 6) -> None:
    """ImageNet's layout: train/WORDNET-ID/*.JPEG."""
    for split in ("train", "val"):
        for label, name in enumerate(("n01440764", "n01443537")):
            (root / split / name).mkdir(parents=True)
            for i in range(each):
                (root / split / name / f"{name}_{i}.JPEG").write_bytes(jpeg(100 * label + 10 * i))


def write_shards(root: Path, shards: int = 4, each: int = 5) -> None:
    """WebDataset's layout: KEY.jpg and KEY.cls one after the other."""
    for split in ("train", "val"):
        for shard in range(shards):
            with tarfile.open(root / f"imagenet-{split}-{shard:06d}.tar", "w") as archive:
                for i in range(each):
                    label = str(shard).encode()
                    for suffix, data in (("jpg", jpeg(20 * shard + i)), ("cls", label)):
                        member = tarfile.TarInfo(f"{shard}_{i}.{suffix}")
                        member.size = len(data)
                        archive.addfile(member, io.BytesIO(data))


def greys(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> list[list[int]]:
    return [first[:, 0, 4, 4].tolist() for first, _ in batches]


def test_class_folders_are_numbered_alphabetically_and_read_by_the_serving_path(tmp_path: Path) -> None:
    write_folder(tmp_path)
    files = read_folder(tmp_path, "train")
    assert isinstance(files, FileSet)
    assert files.labels.tolist() == [0] * 6 + [1] * 6
    (found,) = files.chunks(PREPROCESSING)
    assert found.images.shape == (12, 3, 16, 16)
    np.testing.assert_allclose(
        found.images[:, 0, 0, 0], [10 * i for i in range(6)] + [100 + 10 * i for i in range(6)], atol=2
    )


def test_unreadable_images_are_named_and_skipped(tmp_path: Path) -> None:
    write_folder(tmp_path)
    bad = tmp_path / "train" / "n01440764" / "n01440764_2.JPEG"
    bad.write_bytes(bad.read_bytes()[:200])
    files = read_folder(tmp_path, "train")
    assert isinstance(files, FileSet)
    assert len(load(files, 100, PREPROCESSING)) == 11
    assert files.unreadable == {str(bad)}
    files.unreadable.clear()
    stream = Streamed(files, (WHOLE, WHOLE), 16, batch_size=4, seed=0, workers=0)
    assert [len(first) for first, _ in stream.batches(0, 0)] == [4, 4, 4]
    assert stream.unreadable == {str(bad)}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_does_not_take_the_workers_from_a_run(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "GRACE", 600)  # this machine may be busy
    write_folder(tmp_path)
    files = read_folder(tmp_path, "train")
    assert isinstance(files, FileSet)
    batches = Streamed(files, (WHOLE, WHOLE), 16, batch_size=2, seed=0, workers=1).batches(0, 0)
    next(batches)
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    os.kill(worker.pid, number)
    assert len(list(batches)) == 5


def test_a_folder_of_nothing_else_is_refused_early(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder train of class folders and no shards"):
        read_folder(tmp_path, "train")
    (tmp_path / "train" / "n01440764").mkdir(parents=True)
    with pytest.raises(DataError, match="n01440764 holds no images"):
        read_folder(tmp_path, "train")
    for i in range(20):
        (tmp_path / "train" / "n01440764" / f"{i}.jpg").write_bytes(b"not an image")
    files = read_folder(tmp_path, "train")
    assert isinstance(files, FileSet)
    for workers in (0, 1):  # a worker's error brings no traceback with it
        with pytest.raises(DataError, match=r"^16 images in a row cannot be read, first \S+: is this the folder\?$"):
            next(Streamed(files, (WHOLE, WHOLE), 16, batch_size=4, seed=0, workers=workers).batches(0, 0))


def test_test_images_have_the_numbers_of_the_classes_to_train_on(tmp_path: Path) -> None:
    for split, classes in (("train", "abcd"), ("val", "bd")):
        for name in classes:
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "1.jpg").write_bytes(jpeg(0))
    assert read_folder(tmp_path, "train").labels.tolist() == [0, 1, 2, 3]  # type: ignore[union-attr]
    assert read_folder(tmp_path, "test").labels.tolist() == [1, 3]  # type: ignore[union-attr]
    (tmp_path / "train" / "b").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"val/b is a class that \S+train has not; remove it, or add its images"):
        read_folder(tmp_path, "test")


def test_a_crop_of_a_scaled_jpeg_is_the_crop_of_the_whole_one() -> None:
    """The colour at the centre of the crop is the colour there in the image, and no box leaves it."""
    ramp = np.linspace(0, 255, 640).astype(np.uint8)
    image = Image.fromarray(np.broadcast_to(ramp[None, :, None], (480, 640, 3)).copy())
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    crop = Augmentation(crop=(0.3, 0.9))
    for seed in range(8):
        generator = seeded(Stream.CROPS, seed)
        first, second = two_crops(file.getvalue(), (crop, crop), 32, generator)
        generator = seeded(Stream.CROPS, seed)
        for view in (first, second):
            _, left, _, width = crop_boxes(1, crop.crop, crop.ratio, generator, 640 / 480)[0].tolist()
            expected = 255 * (left + width * (np.arange(32) + 0.5) / 32)
            np.testing.assert_allclose(view[0, 16].numpy(), expected, atol=4)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_that_starts_late_gives_what_it_would_have_given(tmp_path: Path, workers: int) -> None:
    write_folder(tmp_path)
    files = read_folder(tmp_path, "train")
    assert isinstance(files, FileSet)
    stream = Streamed(files, (Augmentation(), Augmentation()), 16, batch_size=3, seed=1, workers=workers)
    whole = list(stream.batches(2, 0))
    late = list(stream.batches(2, 2))
    assert len(whole) == 4
    for (a, b), (c, d) in zip(whole[2:], late, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)
    assert not torch.equal(whole[0][0], next(stream.batches(3, 0))[0])


def test_shards_give_every_image_once_and_resume(tmp_path: Path) -> None:
    write_shards(tmp_path)
    shards = read_folder(tmp_path, "train")
    assert isinstance(shards, ShardSet)
    assert (len(shards), shards.counts) == (20, (5, 5, 5, 5))
    (found,) = shards.chunks(PREPROCESSING)
    assert found.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5
    feed = Sharded(shards, (WHOLE, WHOLE), 16, batch_size=5, seed=0, workers=0)
    whole = greys(list(feed.batches(0, 0)))
    assert sorted(chain(*whole)) == pytest.approx([20 * s + i for s in range(4) for i in range(5)], abs=2)
    assert greys(list(feed.batches(0, 2))) == whole[2:]
    assert greys(list(feed.batches(1, 0))) != whole
    with pytest.raises(DataError, match="4 shards for 8 readers"):
        Sharded(shards, (WHOLE, WHOLE), 16, batch_size=5, seed=0, workers=8)


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path)
    path = tmp_path / "imagenet-train-000002.tar"
    path.write_bytes(path.read_bytes()[:1300])
    with pytest.raises(DataError, match=r"imagenet-train-000002\.tar"):
        list(read_folder(tmp_path, "train").chunks(PREPROCESSING))


def test_what_is_held_out_of_files_and_shards_is_never_trained_on(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "shards").mkdir()
    write_folder(tmp_path / "files")
    write_shards(tmp_path / "shards")
    files = load_split("imagenet", tmp_path / "files", held_out=2, limit=10, seed=0)
    assert (len(files.fit), len(files.held_out), len(files.labelled)) == (8, 2, 8)
    assert files.held_out.images.shape == (2, 3, SOURCES["imagenet"].size, SOURCES["imagenet"].size)
    shards = load_split("imagenet", tmp_path / "shards", held_out=7, limit=None, seed=0)
    assert isinstance(shards.fit, ShardSet)
    assert [path.name[-10:] for path in shards.fit.shards] == ["000000.tar", "000001.tar"]
    assert shards.held_out.labels.tolist() == [2] * 5 + [3] * 2
    with pytest.raises(DataError, match="--limit does not cut shards"):
        load_split("imagenet", tmp_path / "shards", held_out=7, limit=5, seed=0)


def test_resident_batches_cover_the_set_once_and_start_anywhere() -> None:
    images = ImageSet(torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1), torch.zeros(10).long())
    feed = Resident(images, 3, seed=0, device=torch.device("cpu"))
    whole = [first.flatten().tolist() for first, _ in feed.batches(0, 0)]
    assert len(set(chain(*whole))) == 9
    assert [first.flatten().tolist() for first, _ in feed.batches(0, 1)] == whole[1:]
    assert [first.flatten().tolist() for first, _ in feed.batches(1, 0)] != whole


def test_streams_of_different_purpose_never_meet() -> None:
    """NumPy pads short seeds with zeros: without the purpose in front, [0] and [0, 0] would be one."""
    draws = {float(torch.rand(1, generator=seeded(s, *n))) for s in Stream for n in ((0,), (1,), (0, 1), (1, 1))}
    assert len(draws) == 4 * len(Stream)
