"""The training loop: one file, from images on disk to a finished encoder artifact.

On several devices: torchrun --nproc-per-node 8 $(which fullrank) train RECIPE --device cuda. Every process runs this
file on its share of each batch. DistributedDataParallel averages the gradients. The first process measures and writes.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, convert_conv2d_weight_memory_format

from models.artifact import Artifact, EncoderCard, load
from models.embedder import Embedder
from training import checkpoint, distributed, precision, watch
from training.checkpoint import StoppedError, TrainingError
from training.data import SOURCES, DataError, ImageSet, Split, load_data, load_split
from training.data.feed import Stream, feed, seeded
from training.data.split import BANK, LEAST_HELD_OUT
from training.evaluate import Spectrum, embed, knn_accuracy
from training.export import export
from training.methods import Method, build
from training.optimizers import cosine, optimizer, set_learning_rate, warm_up
from training.precision import Precision
from training.recipes import Recipe
from training.small_maps import quicken

QUERIES = 5_000
LOOK_BACK = 32
"""Losses left on an accelerator before they are read: reading one makes the host wait for the step."""

__all__ = ["Run", "Split", "Trainer", "TrainingError", "train"]


@dataclass(frozen=True)
class Run:
    """Where a run reads and writes, on what it computes, who watches it, and the encoder it starts from, if any."""

    out: Path
    data: Path | None = None
    limit: int | None = None
    device: str = "cpu"
    threads: int | None = None
    resume: bool = False
    init: Path | None = None
    command: str = ""
    workers: int = 8
    compile: bool = False
    precision: Precision = "auto"
    checkpoint_minutes: float = 10.0
    guard: watch.GuardMode = "warn"
    guard_share: float = 0.5
    tensorboard: bool = False
    metrics_port: int | None = None


def train(recipe: Recipe, run: Run, console: Console | None = None) -> Artifact:
    """Run `recipe` and write `run.out`/log.jsonl, checkpoint.pt and encoder/; return the artifact.

    Raises DataError for a data set that cannot be read, ValueError for an option that the method does not take,
    TrainingError for a run that cannot start, diverges, cannot be saved or is stopped by its guard, StoppedError after
    Ctrl-C or SIGTERM.
    """
    device, first = distributed.setup(run.device), distributed.rank() == 0
    console = console or Console(stderr=True, quiet=not first, markup=False)
    if run.threads:
        torch.set_num_threads(run.threads)
    split = load_split(recipe.data, run.data, recipe.held_out, run.limit, recipe.seed)
    check_sizes(recipe, split)
    init = load(run.init) if run.init else None
    trainer = Trainer(recipe, split, device, init, run.workers, run.compile, run.precision)
    guard, path = watch.Guard(run.guard_share), run.out / "checkpoint.pt"
    records, watchers = claim(trainer, run), watchers_of(recipe, run) if first else []
    steps = float(distributed.all_reduce(torch.tensor(float(trainer.step), device=device)))
    if steps != trainer.step * distributed.world_size():
        raise TrainingError(f"not every machine sees {path}; --resume needs an --out that all of them share")
    for done in records:
        guard(done)
    console.print(trainer.describe(), soft_wrap=True)

    with checkpoint.stop_requests() as stop:
        saved = time.monotonic()

        def after_step() -> None:
            nonlocal saved
            advance()
            if not first:  # it goes on, so that the first process can end the step that it is in
                return
            if stop.is_set() or time.monotonic() - saved > 60 * run.checkpoint_minutes:
                checkpoint.save(trainer.state(records), path)
                saved = time.monotonic()
            if stop.is_set():
                raise StoppedError(f"stopped after step {trainer.step} and saved; --resume goes on from there")

        while trainer.epoch < recipe.epochs:
            title = f"epoch {trainer.epoch + 1}/{recipe.epochs}"
            with _progress(console, title, trainer.steps_per_epoch, trainer.position) as advance:
                record: dict[str, Any] = trainer.train_epoch(after_step)
            if not first:
                continue
            record |= trainer.measure()
            warning = guard(record) if run.guard != "off" else None
            record |= {"guard": warning} if warning else {}
            records.append(record)
            checkpoint.save(trainer.state(records), path)
            saved = time.monotonic()
            checkpoint.append(run.out / "log.jsonl", record)
            console.print(watch.line(record), soft_wrap=True)
            for watcher in watchers:
                watcher(record)
            if warning:
                console.print(warning, style="bold red", soft_wrap=True)
                if run.guard == "stop":
                    raise TrainingError(f"{warning}. The guard stopped the run; its checkpoint is intact")
    distributed.shutdown()
    if not first:
        return trainer.artifact(run.command)
    with console.status("measuring the encoder and writing its reference"):
        artifact = finish(trainer, run)
    console.print(f"{run.out / 'encoder'}: {json.dumps(artifact.card.quality)}", soft_wrap=True)
    return artifact


def check_sizes(recipe: Recipe, split: Split) -> None:
    if len(split.fit) < recipe.batch_size or len(split.held_out) < LEAST_HELD_OUT:
        raise DataError(
            f"{len(split.fit)} images to train on and {len(split.held_out)} held out; at least {recipe.batch_size}"
            f" (one batch) and {LEAST_HELD_OUT} are needed: raise --limit, or lower --batch-size"
        )
    each, left = divmod(recipe.batch_size, distributed.world_size())
    if left or each < 2:
        raise TrainingError(
            f"batch_size is {recipe.batch_size}; each of {distributed.world_size()} process(es) needs the same number"
            " of images, and BatchNorm at least two"
        )


def claim(trainer: "Trainer", run: Run) -> list[dict[str, Any]]:
    """Make the run's folder ours and return the records of the epochs done. TrainingError if it holds another run."""
    path, log = run.out / "checkpoint.pt", run.out / "log.jsonl"
    if run.out.exists() and not run.out.is_dir():
        raise TrainingError(f"{run.out} is a file; --out is the folder of a run")
    if run.resume and path.exists():
        records = trainer.restore(checkpoint.load(path, trainer.recipe, trainer.device))
        if distributed.rank() == 0:  # a kill between checkpoint and log leaves the log a line short
            log.write_text("".join(json.dumps(record) + "\n" for record in records))
        return records
    if any(p.exists() for p in (path, log, run.out / "encoder")) and distributed.rank() == 0:
        raise TrainingError(f"{run.out} holds another run; pass --resume to go on with it, or another --out")
    run.out.mkdir(parents=True, exist_ok=True)
    return []


def watchers_of(recipe: Recipe, run: Run) -> list[watch.Watcher]:
    watchers = [watch.tensorboard(run.out / "tensorboard")] if run.tensorboard else []
    if run.metrics_port is not None:
        watchers.append(watch.prometheus(run.metrics_port, run.out.name, recipe.epochs))
    return watchers


def finish(trainer: "Trainer", run: Run) -> Artifact:
    """Measure the encoder once on the test set and write the artifact."""
    known, test = load_data(trainer.recipe.data, run.data)
    embedder = Embedder(trainer.artifact(), trainer.device)
    projection = Spectrum.of(trainer.project(embed(embedder, test)[0]))
    fit = trainer.split.fit if isinstance(trainer.split.fit, ImageSet) else trainer.split.labelled
    bank = known if run.limit is None else trainer.split.labelled
    return export(
        trainer.artifact(run.command), fit, trainer.split.held_out, bank, test, projection, run.out / "encoder"
    )


class Trainer:
    """A method, its optimiser and its data on one device; everything that a checkpoint has to hold."""

    def __init__(
        self,
        recipe: Recipe,
        split: Split,
        device: torch.device | str = "cpu",
        init: Artifact | None = None,
        workers: int = 0,
        compiled: bool = False,
        numbers: Precision = "auto",
    ) -> None:
        torch.manual_seed(recipe.seed)
        source = SOURCES[recipe.data]
        self.recipe, self.split, self.device = recipe, split, torch.device(device)
        self.asked: Precision = numbers
        self.compute_in(precision.choose(numbers, self.device))
        encoder: Any = recipe.architecture.build()
        if init is not None:
            if init.card.architecture != recipe.architecture:
                raise TrainingError(f"{init.card.name} is {init.card.architecture}, not {recipe.architecture}")
            encoder.load_state_dict(init.encoder.state_dict())
        method = build(recipe.method, encoder, recipe.options)
        distributed.synchronise(method, self.device)
        if self.device.type == "cpu":
            quicken(method)
        self.method: Method = convert_conv2d_weight_memory_format(method.to(self.device), torch.channels_last)
        self.optimizer = optimizer(self.method, recipe)
        self.forward: Callable[[Tensor], Tensor] = self.method
        if distributed.world_size() > 1:
            cards = [self.device] if self.device.type == "cuda" else None
            self.forward = DistributedDataParallel(self.method, device_ids=cards, broadcast_buffers=False)
        if compiled:
            self.forward = torch.compile(self.forward)
        self.augmentations = recipe.augmentation, recipe.second or recipe.augmentation
        self.feed = feed(
            split.fit, self.augmentations, source.size, recipe.batch_size, recipe.seed, self.device, workers
        )
        self.mean = torch.tensor(source.mean, device=self.device).view(1, -1, 1, 1)
        self.std = torch.tensor(source.std, device=self.device).view(1, -1, 1, 1)
        self.steps_per_epoch = len(split.fit) // recipe.batch_size
        self.step = 0
        self.totals = {"loss": 0.0, "seconds": 0.0, "data_seconds": 0.0}
        self.unread: list[Tensor] = []

    def compute_in(self, numbers: Precision) -> None:
        """Take the forward pass to a format that `precision.choose` returned."""
        self.precision: Precision = numbers
        self.scaler = precision.scaler(numbers, self.device)

    def describe(self) -> str:
        """What runs, on what, in what, on how much: the line that a run begins with."""
        why = "what is native here" if self.asked == "auto" else "as asked"
        resumed = f"; resumed at step {self.step}" if self.step else ""
        return (
            f"{self.recipe.name} on {self.device} in {self.precision} ({why}): {self.recipe.epochs} epochs of"
            f" {self.steps_per_epoch} steps of {self.recipe.batch_size} images, {len(self.split.fit)} to train on,"
            f" {len(self.split.held_out)} held out{resumed}"
        )

    @property
    def epoch(self) -> int:
        """Epochs finished."""
        return self.step // self.steps_per_epoch

    @property
    def position(self) -> int:
        """Steps done in the epoch under way."""
        return self.step % self.steps_per_epoch

    def views(self, first: Tensor, second: Tensor) -> Tensor:
        """An augmentation of each of two batches (n, c, h, w) uint8: (2n, c, h, w) float32, normalised."""
        generator = seeded(Stream.VIEWS, self.recipe.seed, self.step, distributed.rank())
        batches = zip(self.augmentations, (first, second), strict=True)
        views = [
            augment(batch.to(self.device, non_blocking=True), generator, self.feed.cropped)
            for augment, batch in batches
        ]
        return ((torch.cat(views) - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def train_epoch(self, after_step: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """What is left of one pass over the data; its mean loss, its speed, and the share of time spent on data."""
        self.method.train()
        batches = self.feed.batches(self.epoch, self.position)
        end = (self.epoch + 1) * self.steps_per_epoch
        while self.step < end:
            start = time.perf_counter()
            views = self.views(*next(batches))
            ready = time.perf_counter()
            self.unread.append(self.train_step(views))
            if self.device.type == "cpu" or len(self.unread) == LOOK_BACK:
                self.read_losses()
            self.totals["data_seconds"] += ready - start
            self.totals["seconds"] += time.perf_counter() - start
            if self.step < end:  # the epoch's last step is followed by its record, and saved with it
                after_step()
        self.read_losses()
        totals, self.totals = self.totals, dict.fromkeys(self.totals, 0.0)
        total_loss = float(distributed.all_reduce(torch.tensor(totals["loss"], device=self.device)))
        record = {
            "epoch": self.epoch,
            "step": self.step,
            "loss": round(total_loss / distributed.world_size() / self.steps_per_epoch, 5),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "seconds": round(totals["seconds"], 1),
            "views_per_second": round(2 * self.steps_per_epoch * self.recipe.batch_size / totals["seconds"]),
            "data_share": round(totals["data_seconds"] / totals["seconds"], 4),
        }
        return record | ({"unreadable": len(self.feed.unreadable)} if self.feed.unreadable else {})

    def train_step(self, views: Tensor) -> Tensor:
        """One optimiser step on (2n, c, h, w) views; the loss, still on the device."""
        recipe, total = self.recipe, self.recipe.epochs * self.steps_per_epoch
        warm = warm_up(self.step, total, recipe.warmup)
        factor = cosine(self.step, total, recipe.warmup, recipe.final_lr) if recipe.schedule == "cosine" else warm
        set_learning_rate(self.optimizer, recipe.learning_rate, factor, warm)
        with precision.autocast(self.precision, self.device):
            loss = self.forward(views)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        if recipe.clip is not None:
            self.scaler.unscale_(self.optimizer)
            clip_grad_norm_(self.method.parameters(), recipe.clip, foreach=True)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        self.method.step(self.step / total)
        return loss.detach()

    def read_losses(self) -> None:
        """Add the losses not read yet to the epoch's total. TrainingError, naming the step, at one not finite."""
        values = torch.stack(self.unread).tolist() if self.unread else []
        for step, value in enumerate(values, self.step - len(values)):
            if not math.isfinite(value):
                raise TrainingError(
                    f"the loss is {value} at step {step}; the last checkpoint is intact. Lower the learning rate"
                )
            self.totals["loss"] += value
        self.unread.clear()

    def artifact(self, command: str = "") -> Artifact:
        """The encoder as it is now, without a reference; `command` made it."""
        card = EncoderCard(
            name=self.recipe.name,
            architecture=self.recipe.architecture,
            preprocessing=SOURCES[self.recipe.data].preprocessing,
            dimension=self.method.encoder.dimension,
            training=checkpoint.describe(self.recipe) | {"command": command, "precision": self.precision},
        )
        return Artifact(card, self.method.encoder)

    def measure(self) -> dict[str, Any]:
        """kNN and spectra on images the gradient has not seen, through the serving path; and the method's own."""
        embedder = Embedder(self.artifact(), self.device)
        bank, queries = self.split.labelled.take(slice(BANK)), self.split.held_out.take(slice(QUERIES))
        h = embedder.embed(queries.images)
        spaces = {"representation": Spectrum.of(h), "projection": Spectrum.of(self.project(h))}
        return {
            "knn": round(knn_accuracy(embedder.embed(bank.images), bank.labels, h, queries.labels), 4),
            **{name: spectrum.summary() | spectrum.curve() for name, spectrum in spaces.items()},
            **self.method.watch(),
        }

    @torch.no_grad()
    def project(self, h: Tensor) -> Tensor:
        """What the loss sees of representations (n, d), in evaluation mode: (n, k) on the CPU."""
        self.method.eval()
        return self.method.project(h.to(self.device)).float().cpu()

    def state(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        """All that a resumed run needs. TrainingError when the state is not worth keeping."""
        self.read_losses()
        for name, tensor in self.method.state_dict().items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise TrainingError(
                    f"{name} is not finite after step {self.step - 1}; the last checkpoint is intact."
                    " Lower the learning rate"
                )
        return {
            "recipe": json.dumps(checkpoint.describe(self.recipe)),
            "images": len(self.split.fit),
            "records": json.dumps(records),
            "step": self.step,
            "totals": self.totals,
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "precision": self.precision,
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> list[dict[str, Any]]:
        """The inverse of `state`: the records. TrainingError when it saw another number of images or other numbers."""
        if state["images"] != len(self.split.fit):
            raise TrainingError(
                f"the run began with {state['images']} images, not {len(self.split.fit)}: --data, --limit"
            )
        began_in: Precision = state.get("precision", "bfloat16")  # the only one before there was a choice
        if self.asked not in ("auto", began_in):
            raise TrainingError(f"the run began in {began_in}, not {self.asked}: --precision {began_in}, or none")
        try:
            self.compute_in(precision.choose(began_in, self.device))
        except ValueError as error:
            raise TrainingError(f"the run began in {began_in} and cannot go on here: {error}") from error
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.totals = state["step"], state["totals"]
        records: list[dict[str, Any]] = json.loads(state["records"])
        return records


@contextmanager
def _progress(console: Console, title: str, steps: int, done: int) -> Iterator[Callable[[], None]]:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=steps, completed=done)
        yield lambda: progress.advance(task)
