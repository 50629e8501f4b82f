"""The training loop: one file, from images on disk to a finished encoder artifact.

On several devices: torchrun --nproc-per-node 8 -m cli train RECIPE --device cuda. Every process runs this same file on
its share of each batch; DistributedDataParallel averages the gradients, and the first process measures and writes.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fullrank.verdict import VARIANCE_SHARE
from models.artifact import Artifact, load
from training import checkpoint, distributed, export, guard, memory, watch
from training.checkpoint import StoppedError, TrainingError
from training.data import DataError, Split, load_split, load_test
from training.data.split import LEAST_HELD_OUT
from training.guard import Guard, GuardMode
from training.plugins import found
from training.precision import Precision
from training.progress import shown, stages
from training.recipes import Recipe
from training.trainer import Trainer

__all__ = ["Run", "Split", "Trainer", "TrainingError", "train"]


@dataclass(frozen=True)
class Run:
    """The settings of a run beside its recipe: folders, device, watchers, and the encoder it starts from, if any."""

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
    keep: int = 1
    """Encoders kept in OUT/encoders, those of the last epochs; 0 for none."""
    guard: GuardMode = "warn"
    guard_share: float = VARIANCE_SHARE
    tensorboard: bool = False
    metrics_port: int | None = None
    trackers: tuple[str, ...] = ()
    """MODULE:FUNCTION each. Given the run's settings, it returns what is to be called with a step and its numbers."""
    plugins: tuple[str, ...] = ()
    """Names of the plugins that the run was begun with."""

    def settings(self) -> dict[str, Any]:
        """The settings that a resumed run uses unless others are given, as JSON-ready values."""
        kept = "command limit device threads workers compile checkpoint_minutes keep"
        kept += " guard guard_share tensorboard metrics_port trackers plugins"
        data = None if self.data is None else str(self.data.absolute())
        return {"data": data} | {name: getattr(self, name) for name in kept.split()}


def train(recipe: Recipe, run: Run, console: Console | None = None) -> Artifact:
    """Run `recipe` and write `run.out`/log.jsonl, checkpoint.pt, encoders/ and encoder/; return the artifact.

    Raises DataError for a data set that cannot be read, ValueError for an option that the method does not take,
    TrainingError for a run that cannot start, diverges, cannot be saved or is stopped by its guard, StoppedError after
    Ctrl-C or SIGTERM. What a run will need, the test images too, is opened before its first step.
    """
    device = distributed.setup(run.device)
    first = distributed.rank() == 0
    check_place(run)
    console = console or Console(stderr=True, quiet=not first)
    if device.type == "cpu":
        memory.keep_freed()
    if run.threads:
        torch.set_num_threads(run.threads)
    split = load_split(recipe.data, run.data, recipe.held_out, run.limit, recipe.seed, recipe.image_size)
    check_sizes(recipe, split)
    test = load_test(recipe.data, run.data, run.limit) if first else None
    init = load(run.init) if run.init else None
    trainer = Trainer(recipe, split, device, init, run.workers, run.compile, run.precision)
    trainer.settings = run.settings()
    if first:
        export.servable(trainer.artifact())  # a backbone that cannot be served is refused now, not after its epochs
    twins = guard.twins(trainer) if first else []
    judge = Guard([twin.geometry for twin in twins], trainer.trivial_loss(), run.guard_share)
    records = claim(trainer, run)
    if records:
        judge.recall(records[-1])
    path = run.out / "checkpoint.pt"
    watchers = watch.Watchers(
        watchers_of(trainer, run) if first else (),
        lambda fault: console.print(fault, style="bold yellow", soft_wrap=True, markup=False),
    )
    steps = float(distributed.all_reduce(torch.tensor(float(trainer.step), device=device)))
    if steps != trainer.step * distributed.world_size():
        raise TrainingError(f"not every machine sees {path}; --resume needs an --out that all of them share")
    console.print(trainer.describe(), soft_wrap=True, markup=False)

    with checkpoint.stop_requests() as stop:
        saved = time.monotonic()

        def after_step() -> None:
            nonlocal saved
            each = 2 * recipe.batch_size
            bar.advance(extra=watch.now(trainer.numbers(), each * bar.rate()))
            if not first:  # the other processes go on, so that the first one can end its step
                return
            watchers.step(trainer.step, trainer.numbers())
            if stop.is_set() or time.monotonic() - saved > 60 * run.checkpoint_minutes:
                checkpoint.save(trainer.state(records), path)
                saved = time.monotonic()
            if stop.is_set():
                raise stopped(trainer)

        while trainer.epoch < recipe.epochs:
            title = f"epoch {trainer.epoch + 1}/{recipe.epochs}"
            with shown(console, title, trainer.steps_per_epoch, trainer.position) as bar:
                record: dict[str, Any] = trainer.train_epoch(after_step)
            if not first:
                continue
            with shown(console, f"{title}: measuring", trainer.images_to_measure()) as bar:
                rows = trainer.rows(bar.advance)
            record |= trainer.measure(rows)
            geometry = guard.Geometry.of(rows.held_out[: guard.IMAGES], trainer.project(rows.held_out[: guard.IMAGES]))
            warning = judge(record, geometry) if run.guard != "off" else None
            record |= {"guard": warning} if warning else {}
            record |= {"untrained": guard.log_entry(twins)} if record["epoch"] == 1 else {}
            records.append(record)
            checkpoint.save(trainer.state(records), path)
            saved = time.monotonic()
            checkpoint.append(run.out / "log.jsonl", record)
            export.keep(trainer, rows, record, run.out / "encoders", run.keep)
            console.print(watch.line(record), soft_wrap=True, markup=False)
            watchers.step(trainer.step, trainer.numbers())
            watchers(record)
            if warning:
                console.print(warning, style="bold red", soft_wrap=True, markup=False)
                if run.guard == "stop":
                    raise TrainingError(f"{warning}. The guard stopped the run; its checkpoint is intact")
            if stop.is_set():
                raise stopped(trainer)
    distributed.shutdown()
    if not first:
        return trainer.artifact()
    with stages(console) as stage:
        artifact = export.finish(trainer, test, twins, run.out / "encoder", run.limit, stage)
    console.print(f"{run.out / 'encoder'}: {json.dumps(artifact.card.quality)}", soft_wrap=True, markup=False)
    if "collapsed" in artifact.card.quality:
        console.print(artifact.card.quality["collapsed"], style="bold red", soft_wrap=True, markup=False)
    return artifact


def stopped(trainer: Trainer) -> StoppedError:
    return StoppedError(f"stopped after step {trainer.step} and saved; --resume goes on from there")


def check_place(run: Run) -> None:
    """Raise TrainingError, before any work, if the run's folder is a file, or holds another run."""
    if run.out.exists() and not run.out.is_dir():
        raise TrainingError(f"{run.out} is a file; --out is the folder of a run")
    path = run.out / "checkpoint.pt"
    if run.resume and path.exists():
        return
    if any(p.exists() for p in (path, run.out / "log.jsonl", run.out / "encoder")) and distributed.rank() == 0:
        if run.resume:
            raise TrainingError(f"{run.out} holds a run without its checkpoint.pt; name another --out to begin anew")
        raise TrainingError(f"{run.out} holds another run; pass --resume to go on with it, or another --out")


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
    if recipe.accumulate < 1 or each % recipe.accumulate or each // recipe.accumulate < 2:
        raise TrainingError(
            f"accumulate is {recipe.accumulate}; it must cut a process's {each} images into equal parts of two or more"
        )


def claim(trainer: Trainer, run: Run) -> list[dict[str, Any]]:
    """Take the run's folder; return the records of the epochs done."""
    path, log = run.out / "checkpoint.pt", run.out / "log.jsonl"
    if run.resume and path.exists():
        records = trainer.restore(checkpoint.load(path, trainer.recipe, trainer.device))
        if distributed.rank() == 0:  # after a kill between checkpoint and log, the log lacks a line
            checkpoint.write(log, "".join(json.dumps(record) + "\n" for record in records))
        return records
    run.out.mkdir(parents=True, exist_ok=True)
    return []


def watchers_of(trainer: Trainer, run: Run) -> list[watch.Watcher]:
    """The run's watchers. Each opens the file or the port that it writes to.

    Raises PluginError for a tracker that cannot be found, TrainingError for one that does not start.
    """
    settings = checkpoint.describe(trainer.recipe) | run.settings()
    watchers: list[watch.Watcher] = []
    if run.tensorboard:
        watchers.append(watch.TensorBoard(run.out / "tensorboard", settings))
    if run.metrics_port is not None:
        try:
            watchers.append(watch.prometheus(run.metrics_port, run.out.name, trainer.recipe.epochs))
        except OSError as error:
            raise TrainingError(f"--metrics-port {run.metrics_port}: {error.strerror}; name another port") from error
    for name in run.trackers:
        start = found(name)
        try:
            watchers.append(watch.Tracker(start(settings), name))
        except (Exception, SystemExit) as error:  # the user's own function
            raise TrainingError(f"the tracker {name} did not start: {type(error).__name__}: {error}") from error
    return watchers
