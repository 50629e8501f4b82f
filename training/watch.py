"""Watchers of a run: the terminal, TensorBoard, Prometheus and trackers. They are called after every step and epoch.

A record is a line of log.jsonl: epoch, step, loss, learning_rate, seconds, views_per_second, knn, and a
`Spectrum.summary()` each of `representation` and `projection`. A method may add entries of its own.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

Record = Mapping[str, Any]
Log = Callable[[int, Mapping[str, float]], None]
"""The type of a tracker's logging function: it is called with a step and numbers by name."""
PARTS = ("representation", "projection")


class Watcher:
    """The base class of watchers. A subclass overrides the calls that it needs."""

    name: str
    """What a message calls it."""

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Called after a step, with its loss and learning rate."""

    def __call__(self, record: Record) -> None:
        """Called after an epoch."""


def line(record: Record) -> str:
    """The line of an epoch on the terminal."""
    h, z = (record[part] for part in PARTS)
    alignment = record.get("predictor_alignment")
    extra = f"  predictor alignment {fmean(alignment):.2f}" if alignment else ""
    knn = "" if record["knn"] is None else f"  kNN {record['knn']:.1%}"
    skipped = f"  {record['unreadable']} unreadable images" if record.get("unreadable") else ""
    return (
        f"epoch {record['epoch']:>3}  loss {record['loss']:.4f}{knn}"
        f"  effective rank {h['effective_rank']:.1f}/{h['dimension']} (projection {z['effective_rank']:.1f}"
        f"/{z['dimension']})  std {h['std_ratio']:.2f}/1{extra}  {record['views_per_second']} views/s"
        f"  data and augmentation {record['data_share']:.1%}{skipped}"
    )


def now(values: Mapping[str, float], views_per_second: float) -> str:
    """What stands beside the bar after a step."""
    return f"loss {values['loss']:.4f}  rate {values['learning_rate']:.3g}  {views_per_second:,.0f} views/s"


class Watchers(Watcher):
    """All watchers of a run. A failing one does not end the run: it is named once, and rests until the epoch's end."""

    name = "the watchers"

    def __init__(self, watchers: Sequence[Watcher], say: Callable[[str], None]) -> None:
        """`say` is given one sentence for each watcher that fails."""
        self.watchers = watchers
        self.say = say
        self.resting: set[Watcher] = set()
        self.named: set[Watcher] = set()

    def step(self, step: int, values: Mapping[str, float]) -> None:
        for watcher in self.watchers:
            if watcher not in self.resting:
                self._attempt(watcher, watcher.step, step, values)

    def __call__(self, record: Record) -> None:
        self.resting.clear()
        for watcher in self.watchers:
            self._attempt(watcher, watcher, record)

    def _attempt(self, watcher: Watcher, call: Callable[..., None], *values: Any) -> None:
        try:
            call(*values)
        except (Exception, SystemExit) as error:  # a user's own tracker, or a disk that is full
            self.resting.add(watcher)
            if watcher not in self.named:
                self.named.add(watcher)
                self.say(
                    f"{watcher.name} failed: {type(error).__name__}: {error}. The run goes on without it, and tries it"
                    " again after each epoch"
                )


class TensorBoard(Watcher):
    """Writes to TensorBoard: the loss and rate of each step, the numbers of each epoch, and the run's settings."""

    name = "TensorBoard"

    def __init__(self, folder: Path, settings: Mapping[str, Any] | None = None) -> None:
        """Open `folder`. Raises ValueError if TensorBoard is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
            from torch.utils.tensorboard.summary import hparams
        except ImportError as error:
            raise ValueError(
                "--tensorboard needs the tensorboard package: pip install 'fullrank-server[train]'"
            ) from error
        self.writer = SummaryWriter(folder)
        if settings:
            kept = {
                key: value if isinstance(value, int | float | str) else str(value) for key, value in settings.items()
            }
            for summary in hparams(kept, {"knn": 0.0, "loss": 0.0}):  # type: ignore[no-untyped-call]
                self.writer._get_file_writer().add_summary(summary)  # type: ignore[no-untyped-call]

    def step(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(f"step/{name}", value, step)

    def __call__(self, record: Record) -> None:
        for name, value in scalars(record).items():
            self.writer.add_scalar(name, value, record["epoch"])
        self.writer.flush()


class Tracker(Watcher):
    """Calls the user's own tracker, such as wandb, MLflow or trackio: a function of (step, numbers by name)."""

    def __init__(self, log: Log, name: str) -> None:
        """Raises TypeError if `log` cannot be called."""
        if not callable(log):
            raise TypeError(f"it returned {type(log).__name__}, not a function of a step and its numbers")
        self.log = log
        self.name = f"the tracker {name}"

    def step(self, step: int, values: Mapping[str, float]) -> None:
        self.log(step, {f"step/{name}": value for name, value in values.items()})

    def __call__(self, record: Record) -> None:
        values = scalars(record)
        # No number is called `step`: trackio reserves the name, and MLflow's files have a folder of it for step/loss.
        step = values.pop("step")
        self.log(int(step), values)


def scalars(record: Record) -> dict[str, float]:
    """The numbers in a record, by name; those of its parts are named part/name. Lists are left out."""
    flat: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}/{name}": number for name, number in scalars(value).items()}
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[key] = float(value)
    return flat


def prometheus(port: int, run: str, epochs: int) -> "Gauges":
    """Serve the last record as gauges `fullrank_training_*` on `port` of every interface. Raises OSError if in use."""
    from prometheus_client import start_http_server

    registry, gauges = registered(run, epochs)
    start_http_server(port, registry=registry)
    return gauges


def registered(run: str, epochs: int) -> "tuple[CollectorRegistry, Gauges]":
    """The gauges of a run, and the registry that they are in."""
    from prometheus_client import CollectorRegistry, Gauge

    registry = CollectorRegistry()

    def gauge(name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"fullrank_training_{name}", text, ["run", *labels], registry=registry)

    plain = {
        "loss": gauge("loss", "Mean loss of the last epoch."),
        "knn": gauge("knn_accuracy_ratio", "kNN accuracy on held-out training images, 0 to 1."),
        "learning_rate": gauge("learning_rate", "Learning rate at the end of the last epoch."),
        "views_per_second": gauge("views_per_second", "Augmented images trained on a second in the last epoch."),
        "epoch": gauge("epoch", "Epochs finished."),
    }
    parts = {
        "effective_rank": gauge("effective_rank", "exp(entropy of the covariance's eigenvalues).", "part"),
        "participation_ratio": gauge("participation_ratio", "(tr C)^2 / tr C^2 of the covariance.", "part"),
        "total_variance": gauge("total_variance", "Total variance of L2-normalised rows.", "part"),
    }
    gauge("epochs", "Epochs of the recipe.").labels(run).set(epochs)
    stamp = gauge("timestamp_seconds", "Unix time of the last update.")
    return registry, Gauges(run, plain, parts, stamp)


class Gauges(Watcher):
    """Prometheus metrics of the last record."""

    name = "the Prometheus metrics"

    def __init__(self, run: str, plain: dict[str, Any], parts: dict[str, Any], stamp: Any) -> None:
        self.run = run
        self.plain = plain
        self.parts = parts
        self.stamp = stamp

    def __call__(self, record: Record) -> None:
        for key, metric in self.plain.items():
            if record[key] is not None:
                metric.labels(self.run).set(record[key])
        for part in PARTS:
            for key, metric in self.parts.items():
                metric.labels(self.run, part).set(record[part][key])
        self.stamp.labels(self.run).set(time.time())
