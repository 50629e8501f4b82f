"""Splits of a data set: disjoint images to train on, to choose by (held out), and to measure with (test)."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Generator

from models.preprocess import Pixels, Preprocessing
from models.references import in_chunks
from training.data.dataset import DataError, Images, ImageSet
from training.data.files import FileSet, ShardSet, load
from training.data.sources import SOURCES

BANK = 10_000
LEAST_HELD_OUT = 128


@dataclass(frozen=True)
class Split:
    """The training set in two parts: `fit` to train on, and `held_out` to choose by and to make the reference of.

    `labelled` are training images in memory, whose labels kNN and probes use. They are `fit` itself if that is in
    memory and has labels. No test image is in any of them.
    """

    fit: ImageSet | FileSet | ShardSet
    held_out: ImageSet
    labelled: ImageSet
    files: FileSet | ShardSet | None = None
    """All of the training images, where they lie in files."""

    def known(self) -> Images:
        """All training images with labels, the bank of the final kNN measurement."""
        if self.files is not None:
            return self.files
        parts = self.labelled, self.held_out
        return ImageSet(torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts]))

    @classmethod
    def of(cls, images: ImageSet, held_out: int, seed: int) -> "Split":
        order = torch.randperm(len(images), generator=Generator().manual_seed(seed))
        fit = images.take(order[held_out:])
        return cls(fit, images.take(order[:held_out]), fit)


def load_split(
    name: str, folder: Path | None, held_out: int, limit: int | None, seed: int, size: int | None = None
) -> Split:
    """The training images of a data set of SOURCES, at most `limit` for the gradient. Raises DataError.

    `size`: side in pixels at which files that are kept in memory are decoded, if not the set's own.
    """
    source = SOURCES[name]
    root = folder or source.default
    images = _read(name, root, "train")
    if isinstance(images, ImageSet):
        if not source.unlabelled:
            images = images.take(slice(limit))
        split = Split.of(images, min(held_out, len(images) // 5), seed)
        if source.unlabelled:
            unlabelled = _read(name, root, "unlabelled")
            assert isinstance(unlabelled, ImageSet)
            return replace(split, fit=unlabelled.take(slice(limit)))
        return split
    fit: FileSet | ShardSet
    chosen: FileSet | ShardSet
    if isinstance(images, FileSet):
        fit, chosen = _cut_files(images, held_out, limit, seed)
        if not len(chosen):
            raise DataError(f"{len(fit)} images of {root} are too few to hold a fifth of them out: give more")
    elif limit is None:
        fit, chosen = _cut_shards(images, held_out)
    else:
        raise DataError("--limit does not cut shards; name a folder with fewer of them")
    how = source.sized(size)
    return Split(fit, load(chosen, held_out, how), load(fit, BANK, how), images)


def _read(name: str, root: Path, split: str) -> ImageSet | FileSet | ShardSet:
    images = SOURCES[name].read(root, split)
    if not len(images):
        raise DataError(f"the {split} set of {name} in {root} is empty; unpack it again, or name another --data")
    channels = SOURCES[name].channels
    if isinstance(images, ImageSet) and not images.of_bytes(channels):
        shape, dtype = tuple(images.images.shape), images.images.dtype
        raise DataError(f"the images of {name} are {shape} {dtype}; they must be (n, {channels}, height, width) uint8")
    return images


def _cut_files(images: FileSet, held_out: int, limit: int | None, seed: int) -> tuple[FileSet, FileSet]:
    order = torch.randperm(len(images), generator=Generator().manual_seed(seed))[:limit]
    aside = min(held_out, len(order) // 5)
    return images.take(order[aside:]), images.take(order[:aside])


def _cut_shards(images: ShardSet, held_out: int) -> tuple[ShardSet, ShardSet]:
    """Hold out whole shards from the end until they hold enough: at least one, and at most half of the images."""
    if len(images.shards) < 2:
        raise DataError(f"{images.shards[0]} is the only shard; at least one more is needed to hold images out")
    first = len(images.shards) - 1
    while sum(images.counts[first:]) < held_out and sum(images.counts[first - 1 :]) <= len(images) // 2:
        first -= 1
    return images.take(slice(0, first)), images.take(slice(first, None))


def load_test(name: str, folder: Path | None = None, limit: int | None = None) -> Images | None:
    """The test images of a data set of SOURCES, at most `limit`, or None for a set without any. Raises DataError."""
    source = SOURCES[name]
    if not source.tested:
        return None
    images = _read(name, folder or source.default, "test")
    if isinstance(images, ImageSet):
        return images.take(slice(limit))
    if isinstance(images, FileSet) and limit is not None:  # files are ordered by class
        return images.take(torch.randperm(len(images), generator=Generator().manual_seed(0))[:limit])
    return images


def load_data(name: str, folder: Path | None = None) -> tuple[Images, Images]:
    """(train, test), both labelled, of a data set of SOURCES. Raises DataError."""
    root = folder or SOURCES[name].default
    return _read(name, root, "train"), _read(name, root, "test")


def chunks_of(images: Images, preprocessing: Preprocessing, limit: int) -> Iterator[Pixels]:
    """(n, channels, size, size) uint8 of the first `limit` images of a data set, as the service would see them."""
    for chunk in images.chunks(preprocessing):
        part = chunk.images[:limit]
        limit -= len(part)
        yield from in_chunks(part, preprocessing)
        if not limit:
            return
