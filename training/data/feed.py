"""Feeds: batches of a training set that is held on the device, or decoded and cropped by worker processes.

All randomness is a function of (seed, epoch, position). So a run that resumes in the middle of an epoch gets the same
batches. Under torchrun each process takes its share of every batch.
"""

import math
import signal
from collections.abc import Iterator
from enum import IntEnum
from itertools import count, islice
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from models.decode import ImageError, opened
from models.preprocess import orientation, upright
from training.augment import Augmentation, crop_boxes
from training.data.dataset import DataError, ImageSet
from training.data.files import Encoded, FileSet, ShardSet, read_shards
from training.distributed import rank, world_size

MOST_UNREADABLE = 16
SHUFFLE = 4096
GRACE = 20
"""Seconds that a worker outlives a SIGTERM: enough to end a step and save."""
Pair = tuple[Augmentation, Augmentation]


class Stream(IntEnum):
    """The purpose of a random generator. Generators for different purposes are independent."""

    ORDER = 1
    CROPS = 2
    SHARDS = 3
    VIEWS = 4
    METHOD = 5


def seeded(stream: Stream, *numbers: int) -> Generator:
    """A CPU generator seeded by its purpose and the numbers, independent of all others."""
    state = np.random.SeedSequence([stream, *(n % 2**63 for n in numbers)]).generate_state(1, np.uint64)
    return Generator().manual_seed(int(state[0]) >> 1)


class Feed(Protocol):
    """Yields batches for two views. If `cropped`, these are two crops of each image; if not, the same whole images."""

    cropped: bool
    unreadable: set[str]

    def __len__(self) -> int:
        """Images in an epoch."""

    def batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's images for each view, (n, c, h, w) uint8, from step `start` of the epoch on."""


class Resident:
    """The feed of a set that fits on the device. A batch costs only an index operation there."""

    cropped = False

    def __init__(self, images: ImageSet, batch_size: int, seed: int, device: torch.device) -> None:
        self.images = images.images.to(device)
        self.batch_size = batch_size
        self.seed = seed
        self.unreadable: set[str] = set()

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = _order(len(self), self.seed, epoch).to(self.images.device)
        for index in _shares(order, self.batch_size, start):
            batch = self.images[index]
            yield batch, batch


class Streamed:
    """The feed of image files. Workers decode each at the smallest scale that its two crops need."""

    cropped = True

    def __init__(
        self, files: FileSet, views: Pair, size: int, batch_size: int, seed: int, workers: int, pin: bool = False
    ) -> None:
        self.files = files
        self.batch_size = batch_size
        self.seed = seed
        self.unreadable = files.unreadable
        self.dataset = _Crops(files, views, size, seed)
        self.workers = workers
        self.pin = pin

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = _order(len(self), self.seed, epoch)
        keys = [[(i, epoch) for i in share.tolist()] for share in _shares(order, self.batch_size, start)]
        loader = DataLoader(
            self.dataset,
            batch_sampler=keys,
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=self.pin,
            worker_init_fn=_outlive,
        )
        for first, second, unreadable in _from(loader):
            self.unreadable |= set(unreadable)
            yield first, second


class Sharded:
    """The feed of tar shards, which are read from front to back.

    Each epoch has a new order of shards, and a buffer shuffles the images. The order also depends on the number of
    workers, so resume with the same number.
    """

    cropped = True

    def __init__(
        self, shards: ShardSet, views: Pair, size: int, batch_size: int, seed: int, workers: int, pin: bool = False
    ) -> None:
        readers = max(1, workers) * world_size()
        if len(shards.shards) < readers:
            raise DataError(f"{len(shards.shards)} shards for {readers} readers; use fewer --workers or more shards")
        self.shards = shards
        self.views = views
        self.size = size
        self.seed = seed
        self.batch_size = batch_size
        self.unreadable = shards.unreadable
        self.workers = workers
        self.pin = pin

    def __len__(self) -> int:
        return len(self.shards)

    def batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            _ShardCrops(self.shards, self.views, self.size, self.seed, epoch),
            batch_size=self.batch_size // world_size(),
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=self.pin,
            worker_init_fn=_outlive,
        )
        for first, second, unreadable in islice(_from(loader), start, len(self) // self.batch_size):
            self.unreadable |= set(unreadable)
            yield first, second


def feed(
    images: ImageSet | FileSet | ShardSet,
    views: Pair,
    size: int,
    batch_size: int,
    seed: int,
    device: torch.device,
    workers: int,
) -> Feed:
    """The feed for a set in memory, in files or in shards. `workers` is the number of processes that decode files."""
    if isinstance(images, ImageSet):
        return Resident(images, batch_size, seed, device)
    pin = device.type == "cuda"
    if isinstance(images, FileSet):
        return Streamed(images, views, size, batch_size, seed, workers, pin)
    return Sharded(images, views, size, batch_size, seed, workers, pin)


def two_crops(data: bytes, views: Pair, size: int, generator: Generator) -> Tensor:
    """Two random crops of an encoded image, decoded once: (2, 3, size, size) uint8. Raises ImageError.

    It is opened, rotated upright and put on white as in the service. A JPEG is decoded at the smallest of its scales
    (1, 1/2, 1/4, 1/8) at which no crop must be enlarged because of it.
    """
    with opened(data) as image:
        turned = orientation(image) >= 5
        width, height = image.size[::-1] if turned else image.size
        boxes = torch.cat([crop_boxes(1, view.crop, view.ratio, generator, width / height) for view in views])
        least = math.ceil(size / boxes[:, 3].min().item()), math.ceil(size / boxes[:, 2].min().item())
        image.draft(None, least[::-1] if turned else least)
        whole = upright(image)
    crops = []
    for top, left, height, width in boxes.tolist():
        box = (left * whole.width, top * whole.height, (left + width) * whole.width, (top + height) * whole.height)
        box = (box[0], box[1], min(box[2], whole.width), min(box[3], whole.height))
        crops.append(np.asarray(whole.resize((size, size), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)))
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)


def _order(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=seeded(Stream.ORDER, seed, epoch))


def _shares(order: Tensor, batch_size: int, start: int) -> Iterator[Tensor]:
    """This process's share of each whole batch of the order, from batch `start` on."""
    mine = batch_size // world_size()
    for step in range(start, len(order) // batch_size):
        first = step * batch_size + rank() * mine
        yield order[first : first + mine]


Sample = tuple[Tensor, list[str]]
Batch = tuple[Tensor, Tensor, list[str]]


def _from(loader: DataLoader[Sample]) -> Iterator[Batch]:
    """The loader's batches. A worker's DataError comes with its traceback in its message, and leaves without."""
    try:
        yield from loader
    except DataError as error:
        raise DataError(str(error).rstrip().rpartition("DataError: ")[2]) from None


def _collate(samples: list[Sample]) -> Batch:
    crops = torch.stack([crops for crops, _ in samples], dim=1).contiguous(memory_format=torch.contiguous_format)
    return crops[0], crops[1], [name for _, names in samples for name in names]


def _outlive(worker: int) -> None:
    """Make a worker ignore Ctrl-C, and obey SIGTERM only after a delay.

    Ctrl-C and torchrun signal a whole group of processes. A worker that ended at once would end the run before it has
    saved. SIGTERM must still end it, since an exiting interpreter ends its children by that.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))


class _Crops(Dataset[Sample]):
    def __init__(self, files: FileSet, views: Pair, size: int, seed: int) -> None:
        self.files = files
        self.views = views
        self.size = size
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """The crops of an image, or of the next one that can be read, and the names of the unreadable ones."""
        index, epoch = key
        unreadable: list[str] = []
        while len(unreadable) < MOST_UNREADABLE:
            place = (index + len(unreadable)) % len(self.files)
            try:
                data = self.files.read(place).data
                return two_crops(data, self.views, self.size, seeded(Stream.CROPS, self.seed, epoch, place)), unreadable
            except (OSError, ImageError):
                unreadable.append(str(self.files.paths[place]))
        raise DataError(f"{MOST_UNREADABLE} images in a row cannot be read, first {unreadable[0]}: is this the folder?")


class _ShardCrops(IterableDataset[Sample]):
    def __init__(self, shards: ShardSet, views: Pair, size: int, seed: int, epoch: int) -> None:
        self.shards = shards
        self.views = views
        self.size = size
        self.seed = seed
        self.epoch = epoch

    def __iter__(self) -> Iterator[Sample]:
        """Yield crops without end: a reader that runs out of images starts again, so that all give the same number."""
        info = get_worker_info()
        reader, readers = (info.id, info.num_workers) if info else (0, 1)
        reader, readers = rank() * readers + reader, world_size() * readers
        mine = [self.shards.shards[i] for i in _order(len(self.shards.shards), self.seed, self.epoch)[reader::readers]]
        generator = seeded(Stream.SHARDS, self.seed, self.epoch, reader)
        unreadable: list[str] = []
        for _ in count():
            for item in _shuffle(read_shards(mine), generator):
                try:
                    yield two_crops(item.data, self.views, self.size, generator), unreadable
                    unreadable = []
                except (OSError, ImageError):
                    unreadable.append(item.name)
                if len(unreadable) >= MOST_UNREADABLE:
                    raise DataError(f"{MOST_UNREADABLE} images in a row cannot be read, first {unreadable[0]}")


def _shuffle(items: Iterator[Encoded], generator: Generator) -> Iterator[Encoded]:
    """Shuffle with a buffer: yield a random image of the buffer, which is filled as the shards are read."""
    buffer = list(islice(items, SHUFFLE))
    while buffer:
        place = int(torch.randint(len(buffer), (1,), generator=generator))
        buffer[place], buffer[-1] = buffer[-1], buffer[place]
        yield buffer.pop()
        buffer += islice(items, 1)
