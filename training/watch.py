"""Who watches a run: the collapse guard, the terminal, TensorBoard and Prometheus, all fed one record an epoch.

A record is what a line of log.jsonl holds: epoch, step, loss, learning_rate, seconds, views_per_second, knn, and for
`representation` and `projection` each a `Spectrum.summary()`; a method may add entries of its own.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

Record = Mapping[str, Any]
Watcher = Callable[[Record], None]
GuardMode = Literal["warn", "stop", "off"]
PARTS = ("representation", "projection")
WATCHED = {"effective_rank": "effective rank", "std_ratio": "std x sqrt(d)"}
"""Rank is blind to scale and scale to rank: complete collapse shows in the second, dimensional in the first."""


class Guard:
    """Remembers the best effective rank and spread of the representation; says when one falls below a share of it."""

    def __init__(self, share: float = 0.5) -> None:
        if not 0 < share < 1:
            raise ValueError(f"guard_share is {share}; it must lie between 0 and 1")
        self.share = share
        self.best: dict[str, tuple[float, int]] = {}

    def __call__(self, record: Record) -> str | None:
        """What collapsed, from what to what and since when, or None."""
        found = None
        for key, name in WATCHED.items():
            value, epoch = float(record["representation"][key]), int(record["epoch"])
            best, when = self.best.get(key, (value, epoch))
            if value < self.share * best and found is None:
                found = (
                    f"collapse: the representation's {name} is {value:.3g} in epoch {epoch}, {value / best:.0%} of its"
                    f" best, {best:.3g} in epoch {when}; it may fall to {self.share:.0%}"
                )
            self.best[key] = max((best, when), (value, epoch), key=lambda pair: pair[0])
        return found


def line(record: Record) -> str:
    """An epoch on the terminal."""
    h, z = (record[part] for part in PARTS)
    alignment = record.get("predictor_alignment")
    extra = f"  predictor alignment {fmean(alignment):.2f}" if alignment else ""
    skipped = f"  {record['unreadable']} unreadable images" if record.get("unreadable") else ""
    return (
        f"epoch {record['epoch']:>3}  loss {record['loss']:.4f}  kNN {record['knn']:.1%}"
        f"  effective rank {h['effective_rank']:.1f}/{h['dimension']} (projection {z['effective_rank']:.1f}"
        f"/{z['dimension']})  std {h['std_ratio']:.2f}/1{extra}  {record['views_per_second']} views/s"
        f"  data and augmentation {record['data_share']:.1%}{skipped}"
    )


def tensorboard(folder: Path) -> Watcher:
    """Every number of a record as a scalar. ValueError when TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("--tensorboard needs the tensorboard package: pip install 'fullrank-server[train]'") from error
    writer = SummaryWriter(folder)

    def watch(record: Record) -> None:
        for name, value in scalars(record).items():
            writer.add_scalar(name, value, record["epoch"])
        writer.flush()

    return watch


def scalars(record: Record) -> dict[str, float]:
    """A record's numbers by name, those of its parts as part/name; lists are left out."""
    flat: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}/{name}": number for name, number in scalars(value).items()}
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[key] = float(value)
    return flat


def prometheus(port: int, run: str, epochs: int) -> Watcher:
    """Serve the last record as gauges `fullrank_training_*` on every interface at `port`. OSError when it is taken."""
    from prometheus_client import CollectorRegistry, Gauge, start_http_server

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
    start_http_server(port, registry=registry)

    def watch(record: Record) -> None:
        for key, metric in plain.items():
            metric.labels(run).set(record[key])
        for part in PARTS:
            for key, metric in parts.items():
                metric.labels(run, part).set(record[part][key])
        stamp.labels(run).set(time.time())

    return watch
