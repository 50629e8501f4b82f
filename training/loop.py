"""The training loop: one file, from images on disk to a finished encoder artifact."""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Generator, Tensor
from torch.nn.utils import convert_conv2d_weight_memory_format

from models.artifact import Artifact, EncoderCard, Preprocessing, load
from models.embedder import Embedder
from training.data import SOURCES, DataError, ImageSet
from training.evaluate import Spectrum, knn_accuracy, load_data
from training.export import export
from training.methods import METHODS, Method
from training.recipes import Recipe

EVALUATION_BANK, EVALUATION_QUERIES = 10_000, 5_000
LEAST_HELD_OUT = 128


class TrainingError(RuntimeError):
    """A run that cannot start or go on; the message says why and what to do."""


@dataclass(frozen=True)
class Run:
    """Where a run reads and writes, on what it computes, and the encoder artifact it starts from, if any."""

    out: Path
    data: Path | None = None
    limit: int | None = None
    device: str = "cpu"
    threads: int | None = None
    resume: bool = False
    init: Path | None = None
    command: str = ""


@dataclass(frozen=True)
class Split:
    """The training set cut in two: the gradient sees `fit`; `held_out` chooses, and carries the reference."""

    fit: ImageSet
    held_out: ImageSet

    @classmethod
    def of(cls, images: ImageSet, held_out: int, seed: int) -> "Split":
        order = torch.randperm(len(images), generator=Generator().manual_seed(seed))
        return cls(images.take(order[held_out:]), images.take(order[:held_out]))


def train(recipe: Recipe, run: Run, console: Console | None = None) -> Artifact:
    """Run `recipe` and write `run.out`/log.jsonl, checkpoint.pt and encoder/; return the artifact.

    Raises DataError for a data set that cannot be read, TrainingError for a run that cannot start or diverges.
    """
    console = console or Console(stderr=True)
    if run.threads:
        torch.set_num_threads(run.threads)
    images, test = load_data(recipe.data, run.data)
    if run.limit:
        images = images.take(slice(0, run.limit))
    split = Split.of(images, min(recipe.held_out, len(images) // 5), recipe.seed)
    if len(split.fit) < recipe.batch_size or len(split.held_out) < LEAST_HELD_OUT:
        raise DataError(
            f"{len(images)} images leave {len(split.fit)} to train on and {len(split.held_out)} held out;"
            f" at least {recipe.batch_size} (one batch) and {LEAST_HELD_OUT} are needed: raise --limit"
        )

    trainer = Trainer(recipe, split, run.device, load(run.init) if run.init else None)
    run.out.mkdir(parents=True, exist_ok=True)
    checkpoint, log = run.out / "checkpoint.pt", run.out / "log.jsonl"
    if checkpoint.exists():
        if not run.resume:
            raise TrainingError(f"{run.out} holds another run; pass --resume to go on with it, or another --out")
        trainer.load(checkpoint)
    for epoch in range(trainer.epoch, recipe.epochs):
        with _progress(console, f"epoch {epoch + 1}/{recipe.epochs}", trainer.steps_per_epoch) as advance:
            record = trainer.train_epoch(advance)
        record |= trainer.measure()
        trainer.save(checkpoint)
        with log.open("a") as file:
            file.write(json.dumps(record) + "\n")
        console.print(_line(record), soft_wrap=True)
    projection = Spectrum.of(trainer.project(Embedder(trainer.artifact(), run.device).embed(test.images)))
    with console.status("measuring the encoder and writing its reference"):
        artifact = export(
            trainer.artifact(run.command), split.fit, split.held_out, images, test, projection, run.out / "encoder"
        )
    console.print(f"{run.out / 'encoder'}: {json.dumps(artifact.card.quality)}")
    return artifact


class Trainer:
    """A method, its optimiser and its data on one device; everything that a checkpoint has to hold."""

    def __init__(self, recipe: Recipe, split: Split, device: str = "cpu", init: Artifact | None = None) -> None:
        torch.manual_seed(recipe.seed)
        source = SOURCES[recipe.data]
        self.recipe, self.split, self.device = recipe, split, torch.device(device)
        encoder = recipe.architecture.build()
        if init is not None:
            if init.card.architecture != recipe.architecture:
                raise TrainingError(f"{init.card.name} is {init.card.architecture}, not {recipe.architecture}")
            encoder.load_state_dict(init.encoder.state_dict())
        try:
            method = METHODS[recipe.method](encoder, **recipe.options)
        except TypeError as error:
            raise TrainingError(f"{recipe.method} does not take these options: {error}") from error
        self.method: Method = convert_conv2d_weight_memory_format(method.to(self.device), torch.channels_last)
        self.optimizer = _optimizer(self.method, recipe)
        self.generator = Generator(self.device).manual_seed(recipe.seed)
        self.images = split.fit.images.to(self.device)
        self.mean = torch.tensor(source.mean, device=self.device).view(1, -1, 1, 1)
        self.std = torch.tensor(source.std, device=self.device).view(1, -1, 1, 1)
        self.steps_per_epoch = len(split.fit) // recipe.batch_size
        self.epoch = 0

    def views(self, index: Tensor) -> Tensor:
        """Two augmentations of the images at `index`, concatenated: (2n, c, h, w) float32, normalised."""
        batch, augment = self.images[index], self.recipe.augmentation
        views = torch.cat([augment(batch, self.generator), augment(batch, self.generator)])
        return ((views - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def train_epoch(self, advance: Callable[[], None] | None = None) -> dict[str, float | int]:
        """One pass over the data; the epoch's mean loss, views per second and share of time spent on augmentation."""
        self.method.train()
        order = torch.randperm(len(self.images), generator=self.generator, device=self.device)
        total, augmenting, start = 0.0, 0.0, time.perf_counter()
        for position in range(self.steps_per_epoch):
            step = self.epoch * self.steps_per_epoch + position
            began = time.perf_counter()
            views = self.views(order[position * self.recipe.batch_size :][: self.recipe.batch_size])
            augmenting += time.perf_counter() - began
            total += self.train_step(views, step)
            if advance:
                advance()
        seconds = time.perf_counter() - start
        self.epoch += 1
        return {
            "epoch": self.epoch,
            "loss": round(total / self.steps_per_epoch, 5),
            "seconds": round(seconds, 1),
            "views_per_second": round(2 * self.steps_per_epoch * self.recipe.batch_size / seconds),
            "augmentation_share": round(augmenting / seconds, 4),
        }

    def train_step(self, views: Tensor, step: int) -> float:
        total_steps = self.recipe.epochs * self.steps_per_epoch
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate * _schedule(step, total_steps, self.recipe.warmup)
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.method(views)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss is {value} at step {step}; the last checkpoint is intact. Lower the learning rate"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.method.step((step + 1) / total_steps)
        return value

    def artifact(self, command: str = "") -> Artifact:
        """The encoder as it is now, without a reference; `command` made it."""
        source = SOURCES[self.recipe.data]
        training = json.loads(json.dumps(asdict(self.recipe), default=lambda model: model.model_dump()))
        card = EncoderCard(
            name=self.recipe.name,
            architecture=self.recipe.architecture,
            preprocessing=Preprocessing(
                size=source.size, resize="stretch", channels=source.channels, mean=source.mean, std=source.std
            ),
            dimension=self.method.encoder.dimension,
            training=training | {"command": command},
        )
        return Artifact(card, self.method.encoder)

    def measure(self) -> dict[str, Any]:
        """kNN and spectra on images the gradient has not seen, through the serving path."""
        embedder = Embedder(self.artifact(), self.device)
        bank, queries = self.split.fit.take(slice(EVALUATION_BANK)), self.split.held_out.take(slice(EVALUATION_QUERIES))
        h = embedder.embed(queries.images)
        knn = knn_accuracy(embedder.embed(bank.images), bank.labels, h, queries.labels)
        return {
            "knn": round(knn, 4),
            "representation": Spectrum.of(h).summary(),
            "projection": Spectrum.of(self.project(h)).summary(),
        }

    @torch.no_grad()
    def project(self, h: Tensor) -> Tensor:
        """What the loss sees of representations (n, d), in evaluation mode: (n, k) on the CPU."""
        self.method.eval()
        return self.method.project(h.to(self.device)).float().cpu()

    def save(self, path: Path) -> None:
        """Atomically: a reader finds the old checkpoint or the new one, never half of one."""
        state = {
            "recipe": self.recipe.name,
            "epoch": self.epoch,
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }
        fresh = path.with_suffix(".new")
        torch.save(state, fresh)
        fresh.replace(path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True, map_location=self.device)
        if state["recipe"] != self.recipe.name:
            raise TrainingError(f"{path} is a run of {state['recipe']}, not of {self.recipe.name}")
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"].cpu())
        self.epoch = state["epoch"]


def _optimizer(method: Method, recipe: Recipe) -> torch.optim.Optimizer:
    """Weight decay on matrices and kernels only, as every one of these papers has it."""
    trainable = [p for p in method.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=recipe.learning_rate)


def _schedule(step: int, total: int, warmup: float) -> float:
    """Linear warm-up, then half a cosine to zero; a factor in (0, 1]."""
    rise = max(1, round(total * warmup))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


@contextmanager
def _progress(console: Console, title: str, steps: int) -> Iterator[Callable[[], None]]:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=steps)
        yield lambda: progress.advance(task)


def _line(record: dict[str, Any]) -> str:
    h, z = record["representation"], record["projection"]
    return (
        f"epoch {record['epoch']:>3}  loss {record['loss']:.4f}  kNN {record['knn']:.1%}"
        f"  effective rank {h['effective_rank']:.1f}/{h['dimension']} (projection {z['effective_rank']:.1f}"
        f"/{z['dimension']})  variance {h['total_variance']:.3f}  {record['views_per_second']} views/s"
        f"  augmentation {record['augmentation_share']:.1%}"
    )
