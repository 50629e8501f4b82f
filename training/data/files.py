"""Data sets that stay on disk: a folder of class folders (ImageNet's layout), or tar shards in WebDataset's format."""

import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.decode import ImageError
from models.preprocess import Pixels, Preprocessing, decode
from training.data.dataset import DataError, ImageSet

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
CHUNK = 1024
DECODERS = 16
LARGEST_FILE = 1 << 28
"""Limit in bytes on the size in an archive's header, which may be damaged. No image file to train on is larger."""
SPLITS = {"train": ("train",), "test": ("val", "test")}
REMEDY = "ImageNet (image-net.org, registration needed) unpacks to train/CLASS/*.JPEG; sort val/ into class folders too"


class Encoded(NamedTuple):
    """An image as an encoded file."""

    name: str
    data: bytes
    label: int


@dataclass(frozen=True)
class FileSet:
    """Image files and their labels. `unreadable` collects the names of files that could not be decoded."""

    paths: tuple[Path, ...]
    labels: Tensor
    unreadable: set[str] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, index: Tensor | slice) -> "FileSet":
        chosen = torch.arange(len(self))[index]
        return FileSet(tuple(self.paths[i] for i in chosen.tolist()), self.labels[chosen], self.unreadable)

    def read(self, index: int) -> Encoded:
        return Encoded(str(self.paths[index]), self.paths[index].read_bytes(), int(self.labels[index]))

    def chunks(self, preprocessing: Preprocessing) -> Iterator[ImageSet]:
        return decode_chunks((self.read(i) for i in range(len(self))), preprocessing, self.unreadable)


@dataclass(frozen=True)
class ShardSet:
    """Tar files whose members come in pairs KEY.jpg (or .png, .webp) and KEY.cls, the label in decimal."""

    shards: tuple[Path, ...]
    counts: tuple[int, ...]
    unreadable: set[str] = field(default_factory=set)

    def __len__(self) -> int:
        return sum(self.counts)

    def take(self, shards: slice) -> "ShardSet":
        """Some of the shards (the slice counts shards, not images)."""
        return ShardSet(self.shards[shards], self.counts[shards], self.unreadable)

    def chunks(self, preprocessing: Preprocessing) -> Iterator[ImageSet]:
        return decode_chunks(read_shards(self.shards), preprocessing, self.unreadable)


def read_folder(folder: Path, split: str) -> FileSet | ShardSet:
    """Read FOLDER/train/CLASS/*.jpg and FOLDER/val/CLASS/*.jpg, or FOLDER/*train*.tar and FOLDER/*val*.tar.

    Class folders are numbered in the alphabetical order of those to train on. Raises DataError if there is neither,
    or for a class that is not among those.
    """
    for name in SPLITS[split]:
        if shards := sorted(folder.glob(f"*{name}*.tar")):
            return ShardSet(tuple(shards), tuple(count_images(shard) for shard in shards))
        if (folder / name).is_dir():
            return _class_folders(folder / name, folder / SPLITS["train"][0])
    names = " or ".join(SPLITS[split])
    raise DataError(f"{folder} has no folder {names} of class folders and no shards *{names}*.tar; {REMEDY}")


def read_flat(folder: Path, split: str) -> FileSet:
    """Every image file in a folder and below it, without labels (-1). Raises DataError if there are none."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; --data is a folder of image files ({', '.join(SUFFIXES)})")
    found = tuple(sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()))
    if not found:
        raise DataError(f"{folder} holds no image files ({', '.join(SUFFIXES)}), nor do the folders below it")
    return FileSet(found, torch.full((len(found),), -1))


def _class_folders(folder: Path, numbered_by: Path) -> FileSet:
    """The images of the class folders in `folder`, with the labels of their names in `numbered_by`, if there is one."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    known = numbered_by if numbered_by.is_dir() else folder
    numbers = {name: label for label, name in enumerate(sorted(path.name for path in known.iterdir() if path.is_dir()))}
    paths: list[Path] = []
    labels: list[int] = []
    for path in classes:
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        if not found:
            raise DataError(f"{path} holds no images ({', '.join(SUFFIXES)}); {REMEDY}")
        if path.name not in numbers:
            raise DataError(f"{path} is a class that {known} has not; remove it, or add its images there")
        paths += found
        labels += [numbers[path.name]] * len(found)
    if not paths:
        raise DataError(f"{folder} holds no class folders; {REMEDY}")
    return FileSet(tuple(paths), torch.tensor(labels))


def count_images(shard: Path) -> int:
    """The number of images in a shard, counted by its headers."""
    try:
        with tarfile.open(shard) as archive:
            count = sum(Path(member.name).suffix.lower() in SUFFIXES for member in archive)
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{shard}: truncated, or no tar file ({error}); copy it again") from error
    if not count:
        raise DataError(f"{shard} holds no images ({', '.join(SUFFIXES)})")
    return count


def read_shards(shards: Iterable[Path]) -> Iterator[Encoded]:
    """Yield every image of the shards, in order. Raises DataError, naming the shard, if one is damaged.

    The files are opened here as plain files. A library that accepts addresses would run a name like `pipe:COMMAND`.
    """
    for shard in shards:
        try:
            with tarfile.open(shard) as archive:
                for key, members in groupby(_members(archive), key=lambda member: member[0]):
                    yield _sample(f"{shard}:{key}", {suffix: data for _, suffix, data in members})
        except (tarfile.TarError, EOFError, OSError) as error:
            raise DataError(f"{shard}: damaged ({error}); copy it again") from error


def _members(archive: tarfile.TarFile) -> Iterator[tuple[str, str, bytes]]:
    """Key, suffix and content of each file. The key of KEY.jpg is its path up to the first dot of the file name."""
    for member in archive:
        folder, _, name = member.name.rpartition("/")
        key, dot, suffix = name.partition(".")
        if not member.isreg() or not key or not dot:
            continue
        if member.size > LARGEST_FILE:
            raise tarfile.TarError(f"{member.name} claims {member.size} bytes")
        file = archive.extractfile(member)
        data = file.read() if file is not None else b""
        if len(data) < member.size:
            raise tarfile.TarError(f"{member.name} is cut short")
        yield f"{folder}/{key}" if folder else key, f".{suffix.lower()}", data


def _sample(name: str, parts: dict[str, bytes]) -> Encoded:
    image = next((parts[suffix] for suffix in SUFFIXES if suffix in parts), None)
    if image is None or ".cls" not in parts:
        raise DataError(f"{name} lacks its image or its label (.cls)")
    try:
        return Encoded(name, image, int(parts[".cls"]))
    except ValueError as error:
        raise DataError(f"{name}: its label (.cls) is no whole number") from error


def decode_chunks(items: Iterator[Encoded], preprocessing: Preprocessing, unreadable: set[str]) -> Iterator[ImageSet]:
    """Decode images for an encoder, as the service does, a thousand at a time. Unreadable images are left out."""

    def try_decode(item: Encoded) -> Pixels | None:
        try:
            return decode(item.data, preprocessing)
        except ImageError:
            unreadable.add(item.name)
            return None

    with ThreadPoolExecutor(DECODERS) as pool:
        while chunk := list(islice(items, CHUNK)):
            pixels = list(pool.map(try_decode, chunk))
            kept = [(p, item.label) for p, item in zip(pixels, chunk, strict=True) if p is not None]
            if kept:
                arrays, labels = zip(*kept, strict=True)
                yield ImageSet(torch.from_numpy(np.stack(arrays)), torch.tensor(labels))


def load(images: FileSet | ShardSet, count: int, preprocessing: Preprocessing) -> ImageSet:
    """Load the first `count` readable images into memory."""
    parts: list[ImageSet] = []
    for part in images.chunks(preprocessing):
        parts.append(part.take(slice(count - sum(map(len, parts)))))
        if sum(map(len, parts)) >= count:
            break
    if not parts:
        first = f", first {min(images.unreadable)}" if images.unreadable else ""
        raise DataError(f"none of the {len(images)} images can be decoded{first}: is this the folder?")
    return ImageSet(torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts]))
