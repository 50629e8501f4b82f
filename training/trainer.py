"""The trainer: a method, its optimiser and its data on one device, and the state that a checkpoint holds."""

import json
import math
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, convert_conv2d_weight_memory_format

from models.artifact import Artifact, EncoderCard
from models.embedder import Embedder
from training import checkpoint, distributed, precision
from training.checkpoint import TrainingError
from training.data import SOURCES, Split
from training.data.feed import Stream, feed, seeded
from training.data.split import BANK
from training.evaluate import NEIGHBOURS, Spectrum, has_labels, knn_accuracy
from training.methods import Method, build
from training.optimizers import cosine, optimizer, set_learning_rate, warm_up
from training.plugins import OwnArchitecture
from training.precision import Precision
from training.recipes import Recipe
from training.small_maps import quicken

QUERIES = 5_000
LOOK_BACK = 32
"""Steps on an accelerator between two looks at it: to read a loss or a clock the host has to wait for the step."""


DIVERGED = "what was saved before is intact. Lower the learning rate"
TOTALS = ("loss", "seconds", "data_seconds", "watched_seconds")


@dataclass(frozen=True)
class Rows:
    """Representations (n, d) after an epoch: of up to `BANK` training images, and of up to `QUERIES` held-out ones."""

    bank: Tensor
    held_out: Tensor


class Trainer:
    """Trains a method on one device. It has the optimiser, the data, and the state that a checkpoint holds."""

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
        self.settings: dict[str, Any] = {}
        """Settings, beside the recipe, that a resumed run uses: the data's folder, the number of images, ..."""
        self.recipe = recipe
        self.split = split
        self.device = torch.device(device)
        self.preprocessing = SOURCES[recipe.data].sized(recipe.image_size)
        self.asked: Precision = numbers
        self.compute_in(precision.choose(numbers, self.device))
        encoder: Any = recipe.architecture.build()
        if init is not None:
            if init.card.architecture is None or init.card.architecture != recipe.architecture:
                raise TrainingError(
                    f"--init: {init.card.name} is {init.card.architecture or 'an ONNX graph'}, "
                    f"not {recipe.architecture}; --backbone, --width, --stem and the data set decide on that"
                )
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
            with warnings.catch_warnings():  # torch 2.13 has another name for broadcast_buffers, which 2.12 lacks
                warnings.simplefilter("ignore", FutureWarning)
                self.forward = DistributedDataParallel(self.method, device_ids=cards, broadcast_buffers=False)
        if compiled:
            self.forward = torch.compile(self.forward)
        self.augmentations = recipe.augmentation, recipe.second or recipe.augmentation
        size = self.preprocessing.size
        self.feed = feed(split.fit, self.augmentations, size, recipe.batch_size, recipe.seed, self.device, workers)
        self.mean = torch.tensor(self.preprocessing.mean, device=self.device).view(1, -1, 1, 1)
        self.std = torch.tensor(self.preprocessing.std, device=self.device).view(1, -1, 1, 1)
        self.steps_per_epoch = len(split.fit) // recipe.batch_size
        self.step = 0
        self.totals = dict.fromkeys(TOTALS, 0.0)
        self.unread: list[Tensor] = []
        self.last_loss = math.nan

    def compute_in(self, numbers: Precision) -> None:
        """Compute the forward pass in a format that `precision.choose` returned."""
        self.precision: Precision = numbers
        self.scaler = precision.scaler(numbers, self.device)

    def describe(self) -> str:
        """The first line of a run: recipe, device, precision, and numbers of epochs, steps and images."""
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
        """Steps done in the current epoch."""
        return self.step % self.steps_per_epoch

    def views(self, first: Tensor, second: Tensor) -> Tensor:
        """Augment two batches (n, c, h, w) uint8, and normalise them: (2n, c, h, w) float32."""
        generator = seeded(Stream.VIEWS, self.recipe.seed, self.step, distributed.rank())
        batches = zip(self.augmentations, (first, second), strict=True)
        views = [
            augment(batch.to(self.device, non_blocking=True), generator, self.feed.cropped, self.preprocessing.size)
            for augment, batch in batches
        ]
        return ((torch.cat(views) - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def train_epoch(self, after_step: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """Train to the end of the epoch. Returns its mean loss, its speed, and the share of time spent on data."""
        self.method.train()
        batches = self.feed.batches(self.epoch, self.position)
        end = (self.epoch + 1) * self.steps_per_epoch
        while self.step < end:
            # Timing a part of a step means waiting for it, and an accelerator idles meanwhile.
            watched = not self.asynchronous or self.step % LOOK_BACK == 0
            start = self.clock(watched)
            views = self.views(*next(batches))
            ready = self.clock(watched)
            torch.manual_seed(seeded(Stream.METHOD, self.recipe.seed, self.step, distributed.rank()).initial_seed())
            try:
                self.unread.append(self.train_step(views))
            except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
                reason = f"a matrix has no decomposition after step {self.step - 1}"
                raise TrainingError(f"{reason}; {DIVERGED}") from error
            if not self.asynchronous or len(self.unread) == LOOK_BACK or self.step == end:
                self.read_losses()
            done = self.clock(watched or self.step == end)
            self.totals["seconds"] += done - start
            if watched:
                self.totals["data_seconds"] += ready - start
                self.totals["watched_seconds"] += done - start
            if self.step < end:  # the epoch's last step is followed by its record, and saved with it
                after_step()
        self.check_finite()
        totals = self.totals
        self.totals = dict.fromkeys(TOTALS, 0.0)
        total_loss = float(distributed.all_reduce(torch.tensor(totals["loss"], device=self.device)))
        record = {
            "epoch": self.epoch,
            "step": self.step,
            "loss": round(total_loss / distributed.world_size() / self.steps_per_epoch, 5),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "seconds": round(totals["seconds"], 1),
            "views_per_second": round(2 * self.steps_per_epoch * self.recipe.batch_size / max(totals["seconds"], 1e-9)),
            "data_share": round(totals["data_seconds"] / max(totals["watched_seconds"], 1e-9), 4),
        }
        return record | ({"unreadable": len(self.feed.unreadable)} if self.feed.unreadable else {})

    def train_step(self, views: Tensor) -> Tensor:
        """Do one optimiser step on (2n, c, h, w) views. Returns the loss, still on the device."""
        recipe = self.recipe
        total = self.recipe.epochs * self.steps_per_epoch
        warm = warm_up(self.step, total, recipe.warmup)
        factor = cosine(self.step, total, recipe.warmup, recipe.final_lr) if recipe.schedule == "cosine" else warm
        set_learning_rate(self.optimizer, recipe.learning_rate, factor, warm)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.accumulate(views, recipe.accumulate)
        if recipe.clip is not None:
            self.scaler.unscale_(self.optimizer)
            clip_grad_norm_(self.method.parameters(), recipe.clip, foreach=True)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        self.method.step(self.step / total)
        return loss

    def trivial_loss(self) -> float | None:
        """The loss of an encoder that gives every image the same row, for this run's (part of a) batch."""
        return self.method.trivial_loss(self.recipe.batch_size // self.recipe.accumulate)

    def numbers(self) -> dict[str, float]:
        """The latest loss that was read from the device, and the learning rate."""
        return {"loss": self.last_loss, "learning_rate": float(self.optimizer.param_groups[0]["lr"])}

    def images_to_measure(self) -> int:
        """The number of images that `rows` embeds."""
        return min(BANK, len(self.split.labelled)) + min(QUERIES, len(self.split.held_out))

    def accumulate(self, views: Tensor, parts: int) -> Tensor:
        """Split a batch in `parts`, and add up their gradients. Returns the mean loss, still on the device.

        BatchNorm, and a loss that compares images with each other, treat each part as a batch of its own.
        """
        halves = [half.chunk(parts) for half in views.chunk(2)]
        total = torch.zeros((), device=views.device)
        for part, (first, second) in enumerate(zip(*halves, strict=True), 1):
            together = torch.cat([first, second]) if parts > 1 else views
            with precision.autocast(self.precision, self.device), self.unsynchronised(part < parts):
                loss = self.forward(together) / parts
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total = total + loss.detach()
        return total

    def unsynchronised(self, wanted: bool) -> Any:
        """A context in which gradients are not averaged over processes: only a batch's last part needs that."""
        return self.forward.no_sync() if wanted and isinstance(self.forward, DistributedDataParallel) else nullcontext()

    @property
    def asynchronous(self) -> bool:
        """Whether a step may still run on the device when `train_step` returns."""
        return self.device.type != "cpu"

    def clock(self, wait: bool) -> float:
        """The time in seconds. With `wait`, first wait until the device has finished its work."""
        if wait and self.asynchronous:
            self.wait()
        return time.perf_counter()

    def wait(self) -> None:
        """Wait until the device has finished its work."""
        getattr(torch, self.device.type).synchronize()

    def read_losses(self) -> None:
        """Add new losses to the epoch's total. Raises TrainingError, naming the step, if one is not finite."""
        values = torch.stack(self.unread).tolist() if self.unread else []
        for step, value in enumerate(values, self.step - len(values)):
            if not math.isfinite(value):
                raise TrainingError(f"the loss is {value} at step {step}; {DIVERGED}")
            self.totals["loss"] += value
            self.last_loss = value
        self.unread.clear()

    def artifact(self) -> Artifact:
        """The present encoder as an artifact without a reference. Its card names the command that began the run."""
        architecture = self.recipe.architecture
        own = isinstance(architecture, OwnArchitecture)
        card = EncoderCard(
            name=self.recipe.name,
            architecture=None if isinstance(architecture, OwnArchitecture) else architecture,
            graph="encoder.onnx" if own else None,
            preprocessing=self.preprocessing,
            dimension=self.method.encoder.dimension,
            training=checkpoint.describe(self.recipe) | checkpoint.how(self.settings, self.precision),
        )
        return Artifact(card, self.method.encoder)

    def rows(self, progress: Callable[[int], None] = lambda images: None) -> Rows:
        """Embed training and held-out images with the present encoder, by the serving path.

        Raises TrainingError if a representation is not finite.
        """
        embedder = Embedder(self.artifact(), self.device)
        parts = self.split.labelled.images[:BANK], self.split.held_out.images[:QUERIES]
        embedded = (embed_in_chunks(embedder, images, progress) for images in parts)
        bank, held_out = (self.finite("a representation", rows) for rows in embedded)
        return Rows(bank, held_out)

    def measure(self, rows: Rows | None = None) -> dict[str, Any]:
        """kNN accuracy and spectra on held-out images, and the method's own measures."""
        rows = rows or self.rows()
        h = rows.held_out
        labels = self.split.labelled.labels[:BANK]
        queries = self.split.held_out.labels[:QUERIES]
        bank, known, asked, true = (it.to(self.device) for it in (rows.bank, labels, h, queries))
        spaces = {"representation": Spectrum.of(h), "projection": Spectrum.of(self.project(h))}
        measurable = has_labels(labels, NEIGHBOURS) and has_labels(queries)
        return {
            "knn": round(knn_accuracy(bank, known, asked, true), 4) if measurable else None,
            **{name: spectrum.summary() | spectrum.curve() for name, spectrum in spaces.items()},
            **self.method.watch(),
        }

    @torch.no_grad()
    def project(self, h: Tensor) -> Tensor:
        """Project representations (n, d) to the space of the loss, in evaluation mode: (n, k) on the CPU."""
        self.method.eval()
        return self.finite("a projection", self.method.project(h.to(self.device)).float().cpu())

    def check_finite(self) -> None:
        """Raise TrainingError, naming it, if a weight or a running statistic is not finite."""
        for name, tensor in self.method.state_dict().items():
            self.finite(name, tensor)

    def finite(self, name: str, tensor: Tensor) -> Tensor:
        """`tensor` itself. Raises TrainingError, naming it, if it is not finite."""
        if not tensor.isfinite().all():
            raise TrainingError(f"{name} is not finite after step {self.step - 1}; {DIVERGED}")
        return tensor

    def state(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        """The state that a resumed run needs. Raises TrainingError if a value in it is not finite."""
        self.read_losses()
        self.check_finite()
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
            "run": json.dumps(self.settings),
        }

    def restore(self, state: dict[str, Any]) -> list[dict[str, Any]]:
        """Restore a state, and return its records.

        Raises TrainingError for another number of images, another precision, or another method or backbone's state.
        """
        if state["images"] != len(self.split.fit):
            raise TrainingError(
                f"the run began with {state['images']} images, not {len(self.split.fit)}: --data, --limit"
            )
        began_in = checkpoint.precision_of(state)
        if self.asked not in ("auto", began_in):
            raise TrainingError(f"the run began in {began_in}, not {self.asked}: --precision {began_in}, or none")
        try:
            self.compute_in(precision.choose(began_in, self.device))
        except ValueError as error:
            raise TrainingError(f"the run began in {began_in} and cannot go on here: {error}") from error
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        try:
            self.method.load_state_dict(state["method"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (KeyError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise TrainingError(
                f"the checkpoint is of other code of {self.recipe.method} or its backbone ({reason}); go back to that,"
                " or name another --out"
            ) from error
        self.step = state["step"]
        self.totals = dict.fromkeys(TOTALS, 0.0) | state["totals"]
        records: list[dict[str, Any]] = json.loads(state["records"])
        return records


def embed_in_chunks(embedder: Embedder, images: Tensor, progress: Callable[[int], None]) -> Tensor:
    parts = []
    for part in torch.split(images, 256):
        parts.append(embedder.embed_arrays(part))
        progress(len(part))
    return torch.cat(parts)
