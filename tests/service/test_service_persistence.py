"""Windows that outlive their process: a restart, a kill, and every file that must not be believed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fullrank import SpectrumMonitor
from service.metrics import Metrics
from service.persistence import WindowStore
from tests.service.conftest import as_files, encoded, pictures
from tests.service.test_service_process import PROGRAM, await_ready, free_port

Rows = np.ndarray


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("0", "0", "cpu")


def rows(count: int, seed: int = 0, dimension: int = 8) -> Rows:
    return np.random.default_rng(seed).normal(size=(count, dimension)).astype(np.float32)


def monitor_of(count: int, **options: Any) -> SpectrumMonitor:
    monitor = SpectrumMonitor(8, block_rows=32, **options)
    if count:
        monitor.observe(rows(count))
    assert monitor.flush(10)
    return monitor


def results(metrics: Metrics) -> dict[str, int]:
    counted = {
        r: metrics.registry.get_sample_value("fullrank_persisted_windows_total", {"result": r}) for r in metrics.windows
    }
    return {result: int(value) for result, value in counted.items() if value}


def test_a_window_is_resumed_as_it_was(tmp_path: Path, metrics: Metrics) -> None:
    store = WindowStore(tmp_path, metrics)
    with monitor_of(400) as before, monitor_of(0) as after:
        store.save("m", "r", before)
        assert store.restore("m", "r", after)
        mine, theirs = before.snapshot().windows[300.0], after.snapshot().windows[300.0]
        assert theirs.rows == mine.rows == 400
        assert theirs.participation_ratio == pytest.approx(mine.participation_ratio)
        torch.testing.assert_close(theirs.eigenvalues, mine.eigenvalues)
        assert not store.restore("m", "another", after)  # no such file is no fault
    assert results(metrics) == {"saved": 1, "restored": 1}


def test_rows_age_while_nobody_serves(tmp_path: Path, metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    store = WindowStore(tmp_path, metrics)
    with monitor_of(400) as before:
        store.save("m", "r", before)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 400)
    with monitor_of(0) as after:
        assert store.restore("m", "r", after)
        assert {s: w.rows for s, w in after.snapshot().windows.items()} == {300.0: 0, 3600.0: 400}
    monkeypatch.setattr(time, "time", lambda: now() + 4000)
    with monitor_of(0) as after:
        assert not store.restore("m", "r", after)
        assert after.snapshot().windows[3600.0].rows == 0
    monkeypatch.setattr(time, "time", lambda: now() - 500)  # a clock that was set back makes nothing younger than new
    with monitor_of(0) as after:
        assert store.restore("m", "r", after)
        assert after.snapshot().windows[300.0].rows == 400


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)


def resave(path: Path, **changes: str) -> None:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        header = file.metadata()
    save_file(load_file(path), path, header | changes)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut short": (cut, "damaged"),
    "one bit": (flip, "hash"),
    "empty": (lambda path: path.write_bytes(b""), "damaged"),
    "text": (lambda path: path.write_bytes(b"hello, world, this is no tensor"), "damaged"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "directory"),  # type: ignore[func-returns-value]
    "another model's": (lambda path: resave(path, model="n"), "'model': 'n'"),
    "another revision's": (lambda path: resave(path, revision="s"), "'revision': 's'"),
    "another version's": (lambda path: resave(path, version="0.0.0"), "'version': '0.0.0'"),
    "without hash": (lambda path: resave(path, sha256=""), "hash"),
    "no state": (lambda path: save_file({"x": torch.ones(2)}, path), "None"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_file_that_cannot_be_believed_is_refused_in_words(
    tmp_path: Path, metrics: Metrics, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    damage, reason = DAMAGE[case]
    store = WindowStore(tmp_path, metrics)
    with monitor_of(200) as before, monitor_of(100) as after:
        store.save("m", "r", before)
        damage(tmp_path / "m@r.safetensors")
        assert not store.restore("m", "r", after)
        assert after.flush(10)
        assert after.snapshot().windows[300.0].rows == 100
        assert reason in caplog.text
        store.save("m", "r", after)
    expected = {"saved": 2, "refused": 1} if case != "a folder" else {"saved": 1, "refused": 1, "unsaved": 1}
    assert results(metrics) == expected


def test_windows_of_another_width_are_refused(tmp_path: Path, metrics: Metrics) -> None:
    store = WindowStore(tmp_path, metrics)
    with monitor_of(200) as before, SpectrumMonitor(9) as after:
        store.save("m", "r", before)
        assert not store.restore("m", "r", after)
    assert results(metrics) == {"saved": 1, "refused": 1}


def test_a_folder_has_one_owner(tmp_path: Path, metrics: Metrics, caplog: pytest.LogCaptureFixture) -> None:
    first, second = WindowStore(tmp_path, metrics), WindowStore(tmp_path, metrics)
    with monitor_of(100) as monitor:
        first.save("m", "r", monitor)
        assert not second.restore("m", "r", monitor)
        second.save("m", "s", monitor)
        first.close()
        third = WindowStore(tmp_path, metrics)
        assert third.restore("m", "r", monitor)
    assert "start blind" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"lock", "m@r.safetensors"}


def test_a_disk_that_cannot_be_written_stops_nothing(tmp_path: Path, metrics: Metrics) -> None:
    (tmp_path / "file").write_text("")
    store = WindowStore(tmp_path / "file", metrics)
    with monitor_of(100) as monitor:
        store.save("m", "r", monitor)
        assert not store.restore("m", "r", monitor)
    assert results(metrics) == {"refused": 1}


@contextmanager
def replica(encoder: Path, state_dir: Path, port: int, log: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A service in a process of its own, ready."""
    values = {"ENCODER": encoder, "PORT": port, "THREADS": 1, "STATE_DIR": state_dir, "STATE_PERIOD": 0.2}
    values |= {"BLOCK_ROWS": 32}
    environment = os.environ | {f"FULLRANK_{name}": str(value) for name, value in values.items()}
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env=environment | {"OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parents[2],
            stderr=output,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        await_ready(url)
        yield url, process
    finally:
        process.kill()
        process.wait()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def seen(url: str, **model: str) -> int:
    count: int = httpx.get(url + "/spectrum", params=model).json()["windows"]["300"]["rows"]
    return count


def test_a_restart_and_a_kill_do_not_blind_the_monitor(encoders: Path, tmp_path: Path) -> None:
    port, state, log = free_port(), tmp_path / "state", tmp_path / "log"
    images = [encoded(picture) for picture in pictures(128, 7)]
    observed = {"model": "theirs", "rows": rows(64).tolist()}
    with replica(encoders / "alpha", state, port, log) as (url, process):
        assert seen(url) == 0
        assert httpx.post(url + "/embed", files=as_files(images), timeout=30).status_code == 200
        assert httpx.post(url + "/observe", json=observed).status_code == 202
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) in (0, -signal.SIGTERM)
    with replica(encoders / "alpha", state, port, log) as (url, process):
        assert seen(url) == 128
        assert httpx.post(url + "/observe", json=observed).status_code == 202
        until(lambda: seen(url, model="theirs") == 128)
        more = [encoded(picture) for picture in pictures(64, 8)]
        assert httpx.post(url + "/embed", files=as_files(more), timeout=30).status_code == 200
        until(lambda: seen(url) == 192)
        saved = state.stat().st_mtime_ns
        until(lambda: state.stat().st_mtime_ns > saved)
        time.sleep(0.5)
        process.send_signal(signal.SIGKILL)
        process.wait()
    with replica(encoders / "alpha", state, port, log) as (url, _):
        assert seen(url) == 192
        assert "restored" in httpx.get(url + "/metrics").text
    assert log.read_text().count("resumed the windows of alpha@") == 2
