"""What the terminal, TensorBoard, Prometheus and a tracker are told."""

import socket
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from training import watch


def record(epoch: int, rank: float, std: float = 0.9) -> dict[str, Any]:
    part = {
        "dimension": 64,
        "effective_rank": rank,
        "participation_ratio": 9.0,
        "std_ratio": std,
        "total_variance": 0.5,
    }
    return {
        "epoch": epoch,
        "step": 10 * epoch,
        "loss": 1.5,
        "learning_rate": 0.1,
        "knn": 0.75,
        "seconds": 2.0,
        "views_per_second": 800,
        "data_share": 0.02,
        "representation": part,
        "projection": part | {"effective_rank": 5.0},
        "predictor_alignment": [1.0, 0.5],
    }


def test_an_epochs_line_has_what_matters() -> None:
    line = watch.line(record(3, 21.04) | {"unreadable": 2})
    for words in (
        "epoch   3",
        "kNN 75.0%",
        "effective rank 21.0/64",
        "projection 5.0/64",
        "alignment 0.75",
        "2 unreadable",
    ):
        assert words in line


def test_the_bar_has_loss_and_rate() -> None:
    assert watch.now({"loss": 2.5, "learning_rate": 0.05}, 1234.5) == "loss 2.5000  rate 0.05  1,234 views/s"


def test_prometheus_serves_the_agreed_names(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: it may listen while this binds
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        watcher = watch.prometheus(port, "my-run", epochs=7)
    watcher(record(3, 21.0))
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=120).read().decode()
    found = {
        (sample.name, sample.labels.get("part", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels["run"] == "my-run"
    }
    prefix = "fullrank_training_"
    assert found[prefix + "loss", ""] == 1.5
    assert found[prefix + "knn_accuracy_ratio", ""] == 0.75
    assert found[prefix + "effective_rank", "representation"] == 21
    assert found[prefix + "effective_rank", "projection"] == 5
    assert found[prefix + "participation_ratio", "projection"] == 9
    assert found[prefix + "total_variance", "representation"] == 0.5
    assert (found[prefix + "epoch", ""], found[prefix + "epochs", ""]) == (3, 7)
    assert found[prefix + "learning_rate", ""] == 0.1
    assert found[prefix + "views_per_second", ""] == 800
    assert found[prefix + "timestamp_seconds", ""] > 1.7e9
    with pytest.raises(OSError, match="in use"):
        watch.prometheus(port, "another", epochs=1)


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    watcher = watch.TensorBoard(tmp_path, {"batch_size": 64, "options": {"d0": 8}})
    for step in (1, 2, 3):
        watcher.step(step, {"loss": 1 / step, "learning_rate": 0.1})
    for epoch in (1, 2):
        watcher(record(epoch, 10.0 * epoch))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.value for event in events.Scalars("representation/effective_rank")] == [10, 20]
    assert {"loss", "knn", "projection/effective_rank"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("step/loss")] == [1, 2, 3]
    assert events.Scalars("step/learning_rate")[0].value == pytest.approx(0.1)
    settings = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"batch_size" in settings


def test_a_tracker_is_given_every_number_at_its_step() -> None:
    seen: list[tuple[int, dict[str, float]]] = []
    tracker = watch.Tracker(lambda step, values: seen.append((step, dict(values))), "mine")
    tracker.step(3, {"loss": 0.5})
    tracker(record(1, 10.0))
    assert seen[0] == (3, {"step/loss": 0.5})
    assert seen[1][0] == 10
    assert seen[1][1]["representation/effective_rank"] == 10.0
    assert "predictor_alignment" not in seen[1][1]
    names = {name for _, values in seen for name in values}
    folders = {name.rpartition("/")[0] for name in names}
    assert not names & (folders | {"step"}), "no name is another's folder, which MLflow's files cannot store"


class Failing(watch.Watcher):
    """A watcher that fails at the calls whose numbers are given, counted from 1."""

    name = "the tracker mine:start"

    def __init__(self, *failing: int) -> None:
        self.failing = failing
        self.calls = 0

    def step(self, step: int, values: Any) -> None:
        self.calls += 1
        if self.calls in self.failing:
            raise ConnectionError("the server is gone")

    def __call__(self, record: watch.Record) -> None:
        self.step(0, {})


def test_a_watcher_that_fails_is_named_once_and_tried_again_after_the_epoch() -> None:
    said: list[str] = []
    failing, sound = Failing(2, 4), Failing()
    watchers = watch.Watchers([failing, sound], said.append)
    for step in range(1, 5):
        watchers.step(step, {"loss": 1.0})
    assert (failing.calls, sound.calls) == (2, 4), "it rests, and the other does not"
    watchers(record(1, 10.0))
    assert failing.calls == 3
    watchers.step(5, {"loss": 1.0})
    assert (failing.calls, sound.calls) == (4, 6)
    assert len(said) == 1
    assert said[0].startswith("the tracker mine:start failed: ConnectionError: the server is gone. The run goes on")


def test_a_tracker_that_exits_does_not_end_the_run() -> None:
    said: list[str] = []
    watch.Watchers([watch.Tracker(lambda step, values: sys.exit("no login"), "mine:start")], said.append).step(1, {})
    assert said[0].startswith("the tracker mine:start failed: SystemExit: no login. The run goes on without it")


def test_a_tracker_without_a_function_is_refused() -> None:
    with pytest.raises(TypeError, match="it returned NoneType, not a function of a step and its numbers"):
        watch.Tracker(None, "mine:start")  # type: ignore[arg-type]
