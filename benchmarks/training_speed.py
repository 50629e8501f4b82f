"""Views a second while training: this project's loop against a PIL + DataLoader loop, and against the model alone.

    python -m benchmarks.training_speed [--recipe cifar10-simclr] [--device cuda] [--workers 8] [--seconds 20]
    python -m benchmarks.training_speed --lightly DIR      # also lightly's own loop, from pip install --target DIR
    python -m benchmarks.training_speed --formats --width 32 --stem 3x3/2 --threads 1 --workers 0      # on a CPU

All run the same method, batch and optimiser in one process, in turns. `fullrank` is `Trainer`: images on the device,
augmentation batched there. `pil` is written as lightly's and FAIR's examples are: a Dataset that makes two views of a
PIL image by PIL operations, a DataLoader with workers, the same trainer's step. `step alone` repeats the step on one
batch of views that is there already: what is left when data cost nothing. `lightly` is lightly's example around the
same backbone, its transform, head, loss and step. Images are random pixels of the recipe's
size: no data set is needed, and none of the three is helped by its content.

`--formats` adds the same loop as it was before formats could be chosen and small maps were matrix products, `before` in
float32 and `before, bfloat16`, and the loop of today in each format and, with `--compile`, compiled.

With `--workers 0` on a CPU everything is in one process, and a rate is of views per second of its CPU time, which other
processes hardly touch; else it is by the clock on the wall. A ratio is the median over rounds, each loop having one
turn a round, and its range: other load moves both sides of a ratio, but not alike. What data and augmentation take of
the step is no difference of two turns on a CPU, where a per cent would drown: it is their share of the process's CPU
time within fullrank's turns. An accelerator works behind the host's back; there it is the difference.
"""

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.augmentation import random_images
from benchmarks.training_lightly import Lightly
from models.preprocess import to_image
from training.augment import Augmentation
from training.data import SOURCES, ImageSet, Split
from training.loop import Trainer
from training.precision import PRECISIONS, Precision
from training.recipes import recipe

Transform = Callable[[Image.Image], Image.Image]
BEFORE = "before, float32"


def pil_transform(chosen: Augmentation, size: int) -> Transform:
    """One view of one image, operation by operation, as torchvision's transforms on PIL images do it."""

    def factor(spread: float) -> float:
        return random.uniform(1 - spread, 1 + spread)

    def hue(image: Image.Image) -> Image.Image:
        h, s, v = image.convert("HSV").split()
        turned = np.asarray(h, np.uint8) + np.uint8(int(random.uniform(-chosen.hue, chosen.hue) * 255) % 256)
        return Image.merge("HSV", (Image.fromarray(turned), s, v)).convert("RGB")

    def transform(image: Image.Image) -> Image.Image:
        for _ in range(10):
            area = random.uniform(*chosen.crop)
            ratio = float(np.exp(random.uniform(*np.log(chosen.ratio))))
            width, height = round(image.width * (area * ratio) ** 0.5), round(image.height * (area / ratio) ** 0.5)
            if 0 < width <= image.width and 0 < height <= image.height:
                break
        else:
            width, height = image.size
        left, top = random.randint(0, image.width - width), random.randint(0, image.height - height)
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))
        if random.random() < chosen.flip:
            image = ImageOps.mirror(image)
        if random.random() < chosen.jitter:
            operations: list[Transform] = [
                lambda x: ImageEnhance.Brightness(x).enhance(factor(chosen.brightness)),
                lambda x: ImageEnhance.Contrast(x).enhance(factor(chosen.contrast)),
            ]
            if image.mode == "RGB":
                operations += [lambda x: ImageEnhance.Color(x).enhance(factor(chosen.saturation)), hue]
            for operation in random.sample(operations, len(operations)):
                image = operation(image)
        if image.mode == "RGB" and random.random() < chosen.grey:
            image = image.convert("L").convert("RGB")
        if random.random() < chosen.blur:
            image = image.filter(ImageFilter.GaussianBlur(random.uniform(*chosen.sigma)))
        return ImageOps.solarize(image) if random.random() < chosen.solarise else image

    return transform


class TwoViews(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, images: ImageSet, first: Callable[..., Any], second: Callable[..., Any]) -> None:
        self.images = [to_image(image) for image in images.images]
        self.transforms = first, second

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        views = [np.array(transform(self.images[index])) for transform in self.transforms]
        first, second = (torch.from_numpy(v if v.ndim == 3 else v[..., None]).permute(2, 0, 1) for v in views)
        return first, second


def epochs_of(loader: DataLoader[tuple[Tensor, Tensor]], trainer: Trainer) -> Iterator[Tensor]:
    while True:
        for first, second in loader:
            views = torch.cat([first, second]).to(trainer.device, non_blocking=True).float().div_(255)
            yield ((views - trainer.mean) / trainer.std).contiguous(memory_format=torch.channels_last)


def resident(trainer: Trainer) -> Iterator[Tensor]:
    epoch = 0
    while True:
        for first, second in trainer.feed.batches(epoch, 0):
            yield trainer.views(first, second)
        epoch += 1


def synchronize(trainer: Trainer | Lightly) -> None:
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Turn:
    """One loop's turn: views a second, and the share of this process's CPU time that went into getting them."""

    rate: float
    """By the wall's clock, or by this process's CPU time; main chooses."""
    data_share: float


def turn(trainer: Trainer | Lightly, source: Iterator[Tensor], seconds: float, clock: Callable[[], float]) -> Turn:
    """Steps for about `seconds`, at least one, after one to warm up; a loss is read at the end."""
    trainer.train_step(next(source))
    synchronize(trainer)
    start, busy, data, steps = clock(), time.process_time(), 0.0, 0
    while steps == 0 or clock() - start < seconds:
        asked = time.process_time()
        views = next(source)
        data += time.process_time() - asked
        loss = trainer.train_step(views)
        steps += 1
        if steps % 32 == 0:
            float(loss)  # as the loop does: else an accelerator's queue would run away from the clock
    synchronize(trainer)
    rate = 2 * trainer.recipe.batch_size * steps / (clock() - start)
    return Turn(rate, data / (time.process_time() - busy))


def ratio(first: list[Turn], second: list[Turn]) -> str:
    """Rates of the first over those of the second, round by round: median and range."""
    ratios = [a.rate / b.rate for a, b in zip(first, second, strict=True)]
    return f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"


def formats(make: Callable[..., Trainer], compiled: bool) -> dict[str, Trainer]:
    """The loop as it was, with the library's convolutions, and as it is, in each format of a CPU."""
    trainers: dict[str, Trainer] = {}
    with patch("training.trainer.quicken", lambda method: None):
        trainers[BEFORE] = make("float32")
        trainers["before, bfloat16"] = make("bfloat16")
    trainers["today, float32"] = make("float32")
    trainers["today, bfloat16"] = make("bfloat16")
    if compiled:
        trainers["today, float32, compiled"] = make("float32", compiled=True)
        trainers["today, bfloat16, compiled"] = make("bfloat16", compiled=True)
    return trainers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="cifar10-simclr")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each loop's turn in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto")
    parser.add_argument("--formats", action="store_true", help="also every format, and the loop before them")
    parser.add_argument("--width", type=int)
    parser.add_argument("--stem", choices=("3x3", "3x3/2", "7x7"))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--lightly", help="folder that pip install --target put lightly into")
    arguments = parser.parse_args()
    chosen = recipe(arguments.recipe)
    shape = {key: value for key in ("width", "stem") if (value := getattr(arguments, key))}
    chosen = replace(
        chosen,
        batch_size=arguments.batch_size or chosen.batch_size,
        architecture=chosen.architecture.model_copy(update=shape),
    )
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    size = SOURCES[chosen.data].size
    images = random_images(chosen.data, max(arguments.images, chosen.batch_size + 32))

    def make(numbers: Precision, compiled: bool = False) -> Trainer:
        made = Trainer(chosen, Split.of(images, 32, seed=0), arguments.device, compiled=compiled, numbers=numbers)
        made.method.train()
        return made

    trainer = make(arguments.precision, arguments.compile)

    def loader(first: Callable[..., Any], second: Callable[..., Any]) -> Iterator[Tensor]:
        data = DataLoader(
            TwoViews(images, first, second),
            batch_size=chosen.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=arguments.workers,
            persistent_workers=arguments.workers > 0,
            pin_memory=arguments.device != "cpu",
        )
        return epochs_of(data, trainer)

    fixed = trainer.views(images.images[: chosen.batch_size], images.images[: chosen.batch_size])
    loops: dict[str, tuple[Trainer | Lightly, Iterator[Tensor]]] = {}
    loops |= {"step alone": (trainer, iter(lambda: fixed, None)), "fullrank": (trainer, resident(trainer))}
    if arguments.formats:
        loops |= {name: (each, resident(each)) for name, each in formats(make, arguments.compile).items()}
    loops["pil"] = trainer, loader(*(pil_transform(augmentation, size) for augmentation in trainer.augmentations))
    if arguments.lightly:
        try:
            theirs = Lightly(arguments.lightly, chosen, images, trainer.device, arguments.workers)
            loops["lightly"] = theirs, theirs.source()
        except ImportError as error:
            print(f"lightly does not load here ({error}); the PIL loop stands in for it")
    own = arguments.device == "cpu" and arguments.workers == 0
    clock = time.process_time if own else time.perf_counter
    found: dict[str, list[Turn]] = {name: [] for name in loops}
    for _ in range(arguments.rounds):
        for name, (each, source) in loops.items():
            found[name].append(turn(each, source, arguments.seconds, clock))
    base = BEFORE if arguments.formats else "step alone"
    alone, ours = found["step alone"], found["fullrank"]
    cpu = arguments.device == "cpu"
    unit = "views per CPU second" if own else "views/s"
    where = f"{torch.get_num_threads()} CPU thread(s)" if cpu else torch.cuda.get_device_name()
    shape = chosen.architecture.model_dump()
    print(f"{chosen.name}, width {shape.get('width')}, stem {shape.get('stem', 'patches')}", end=", ")
    print(f"{trainer.precision}, batch {chosen.batch_size}, {where}, {arguments.workers} workers for PIL", end="")
    print(f", {arguments.rounds} rounds; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print(f"| loop | {unit} | over {base} | fullrank's over it |\n|---|---|---|---|")
    for name, turns in found.items():
        rate = statistics.median(each.rate for each in turns)
        print(f"| {name} | {rate:,.0f} | {ratio(turns, found[base])} | {ratio(ours, turns)} |")
    medians = [statistics.median(each.rate for each in turns) for turns in (ours, alone)]
    spent = statistics.median(each.data_share for each in ours) if cpu else 1 - medians[0] / medians[1]
    print(f"data and augmentation take {spent:.1%} of fullrank's step")


if __name__ == "__main__":
    main()
