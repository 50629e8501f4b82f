"""Windows that outlive their process: a restart, a kill, and every file that must not be believed."""

import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import numpy as np
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load_file, save_file

from fullrank import SpectrumMonitor
from service.metrics import Metrics
from service.settings import Settings
from service.watching.persistence import WindowStore
from tests.support.images import as_files, encoded, pictures
from tests.support.process import get, replica, running, until

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
    assert monitor.flush(120)
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


def test_an_older_save_does_not_overwrite_a_newer_one(tmp_path: Path, metrics: Metrics) -> None:
    """As where the service ends while it saves."""
    store, release = WindowStore(tmp_path, metrics), threading.Event()
    with monitor_of(100) as older, monitor_of(400) as newer, monitor_of(0) as after:
        begun = threading.Event()

        def state() -> dict[str, torch.Tensor]:
            begun.set()
            release.wait(60)
            return older.state()

        slow = cast(SpectrumMonitor, SimpleNamespace(state=state))
        first = threading.Thread(target=store.save_all, args=([("m", "r", slow)],))
        second = threading.Thread(target=store.save_all, args=([("m", "r", newer)],))
        first.start()
        assert begun.wait(60)
        second.start()
        second.join(0.3)  # time for it to overtake, were it not made to wait
        release.set()
        first.join(60)
        second.join(60)
        assert store.restore("m", "r", after)
        assert after.snapshot().windows[300.0].rows == 400
    assert results(metrics) == {"saved": 2, "restored": 1}


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
    "another format's": (lambda path: resave(path, format="2"), "'format': '2'"),
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
        assert after.flush(120)
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


def seen(url: str) -> int:
    count: int = get(url + "/spectrum").json()["windows"]["300"]["rows"]
    return count


def taken(url: str, model: str) -> float:
    """The same before the next snapshot, since the start."""
    samples = (
        sample
        for family in text_string_to_metric_families(get(url + "/metrics").text)
        for sample in family.samples
        if sample.name == "fullrank_rows_total"
    )
    return sum(it.value for it in samples if (it.labels["model"], it.labels["fate"]) == (model, "sampled"))


def test_a_restart_and_a_kill_do_not_blind_the_monitor(
    settings: Callable[..., Settings], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = [encoded(picture) for picture in pictures(128, 7)]
    observed = {"model": "theirs", "rows": rows(64).tolist()}
    kept: dict[str, Any] = {"state_dir": tmp_path / "state", "state_period": 0.2, "block_rows": 32}
    caplog.set_level("INFO")
    with running(settings(**kept)) as (url, _):
        assert seen(url) == 0
        assert httpx.post(url + "/embed", files=as_files(images), timeout=120).status_code == 200
        assert httpx.post(url + "/observe", json=observed).status_code == 202
    log = tmp_path / "log"
    with replica(log, encoder=settings().encoder, **kept) as it:
        assert seen(it.url) == 128
        assert httpx.post(it.url + "/observe", json=observed).status_code == 202
        until(lambda: taken(it.url, "theirs") == 64)
        more = [encoded(picture) for picture in pictures(64, 8)]
        assert httpx.post(it.url + "/embed", files=as_files(more), timeout=120).status_code == 200
        until(lambda: taken(it.url, "alpha") == 64)
        saved = 'fullrank_persisted_windows_total{result="saved"}'
        before = it.metric(saved)
        # Two models: what is being saved now may be older than the last rows, what is begun after it is not.
        until(lambda: it.metric(saved) >= before + 4)
        it.process.kill()
    assert re.findall(r"resumed the windows of (\w+)@", log.read_text()) == ["alpha", "theirs"]
    with running(settings(**kept)) as (url, _):
        assert seen(url) == 192
    assert caplog.text.count("resumed the windows of alpha@") == 1


def test_files_that_no_start_would_resume_are_removed(tmp_path: Path, metrics: Metrics) -> None:
    def file(name: str, age: float) -> Path:
        path = tmp_path / name
        path.write_bytes(b"x")
        os.utime(path, (time.time() - age,) * 2)
        return path

    old, young = file("m@old.safetensors", 4000), file("m@young.safetensors", 1000)
    half, other = file(".saving-abc", 10), file("notes.txt", 9000)
    store = WindowStore(tmp_path, metrics, longest=3600.0)
    assert [path.exists() for path in (old, young, half, other)] == [False, True, False, True]
    os.utime(young, (time.time() - 4000,) * 2)
    writing = file(".saving-def", 10)
    with monitor_of(40) as monitor:
        store.save_all([("m", "now", monitor)])
    assert [path.exists() for path in (young, writing, tmp_path / "m@now.safetensors")] == [False, True, True]
