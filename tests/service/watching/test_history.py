"""What is kept of a day: points that thin out, events, bounds on memory, and a file that is believed only if whole."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fullrank import Reference, SpectrumMonitor
from fullrank.rules import STATES
from service.metrics import Metrics
from service.watching import history as module
from service.watching.history import COARSE, FIGURES, FINE, KEPT, POINT, RANKS, STEP, History, Ring, severity
from service.watching.persistence import HISTORY, WindowStore
from service.watching.traffic import Meter, quantile

NOW = 1.8e9


def rows(count: int, seed: int = 0, dimension: int = 8, rank: int = 8) -> np.ndarray:
    made = np.random.default_rng(seed).normal(size=(count, dimension)).astype(np.float32)
    made[:, rank:] = 0
    return made


def monitor_of(made: np.ndarray, **options: Any) -> SpectrumMonitor:
    healthy = torch.nn.functional.normalize(torch.from_numpy(rows(2000, 7)))
    monitor = SpectrumMonitor(8, Reference.build(healthy[:1000], healthy[1000:]), block_rows=32, **options)
    if len(made):
        monitor.observe(made)
    assert monitor.flush(120)
    return monitor


def point(at: float, state: int = 1) -> np.ndarray:
    made = np.zeros(1, POINT)
    made["time"], made["state"] = at, state
    return made


def test_of_old_points_the_worst_of_each_step_is_kept() -> None:
    ring = Ring(POINT, severity)
    count = round(3 * KEPT / 15)
    for i in range(count):
        ring.add(point(NOW + 15 * i, state=4 if i == count - 2000 else 1))
    kept = ring.since(0)
    assert (np.diff(kept["time"]) > 0).all()
    assert len(kept) <= FINE + COARSE
    fine = kept["time"] > kept["time"][-1] - 15 * (FINE - 0.5)
    assert (np.diff(kept["time"][fine]) == 15).all()
    old = kept["time"][~fine]
    assert len(np.unique(old // STEP)) == len(old)  # one for each step
    assert kept["time"][-1] - old[0] > KEPT - 3 * STEP
    assert kept["time"][-1] - old[0] <= KEPT
    bad = kept[kept["state"] == 4]
    assert bad["time"].tolist() == [NOW + 15 * (count - 2000)]  # one bad point 8 hours ago is still there
    assert len(ring.since(kept["time"][-5])) == 4
    assert sum(map(len, ring.state())) <= (FINE + COARSE) * POINT.itemsize


def test_a_restart_within_a_step_loses_nothing_of_it() -> None:
    """A ring that is stored and restored at every 97th point ends with what one that never stopped has."""
    steady, restarted = Ring(POINT, severity), Ring(POINT, severity)
    states = np.random.default_rng(0).integers(0, 5, 4 * FINE)
    for i, state in enumerate(states):
        steady.add(point(NOW + 15 * i, int(state)))
        restarted.add(point(NOW + 15 * i, int(state)))
        if i % 97 == 0:
            stored, restarted = restarted.state(), Ring(POINT, severity)
            restarted.restore(*stored)
    np.testing.assert_array_equal(restarted.since(0), steady.since(0))


def test_a_clock_that_is_set_back_leaves_the_order() -> None:
    ring = Ring(POINT, severity)
    for at in (NOW, NOW + 15, NOW + 600, NOW + 30, NOW + 45):
        ring.add(point(at))
    assert ring.since(0)["time"].tolist() == [NOW, NOW + 15, NOW + 30, NOW + 45]


def test_points_hold_what_the_snapshot_says() -> None:
    history = History()
    with monitor_of(rows(640)) as monitor:
        history.record([("a", "r1", monitor)], {"pending": 3.0}, NOW)
        snapshot = monitor.snapshot()
    kept = history.of("a", False, 0)
    assert kept is not None
    figures = dict(zip(FIGURES, kept["figures"][0].tolist(), strict=True))
    window = snapshot.windows[300.0]
    assert figures["effective_rank"] == pytest.approx(window.effective_rank, rel=1e-6)
    assert figures["participation_ratio_lower"] == pytest.approx(window.participation_ratio.lower, rel=1e-6)
    assert figures["rows"] == 640
    assert math.isnan(figures["canary_cosine"])
    there = [rank for rank in RANKS if rank <= 8]
    expected = [math.log10(window.eigenvalues[rank - 1]) for rank in there]
    assert kept["spectrum"][0, : len(there)].tolist() == pytest.approx(expected, abs=2e-3)  # float16
    assert np.isnan(kept["spectrum"][0, len(there) :]).all()
    for band in window.bands:  # 1, 2, 3-4, 5-8: each holds a rank
        mine = [kept["bands"][0, k] for k, rank in enumerate(RANKS) if band.first <= rank <= band.last]
        assert mine == pytest.approx([math.log10(band.ratio.estimate)] * len(mine), abs=2e-3)
        assert mine
    assert np.isnan(kept["bands"][0, len(there) :]).all()
    assert STATES[kept["state"][0]] == snapshot.verdict.state == "healthy"
    traffic = history.traffic(0)
    assert dict(zip(traffic["fields"], traffic["figures"][0].tolist(), strict=True))["pending"] == 3
    assert history.of("b", False, 0) is None
    assert history.of("a", True, 0) is None


def test_the_totals_of_a_renewed_monitor_give_no_rate_below_zero() -> None:
    """A model keeps its name where its reference was replaced, or where it came back after an hour of silence."""
    history = History()
    for at, count in enumerate((640, 96, 160)):
        with monitor_of(rows(count)) as monitor:
            history.record([("a", "observed", monitor)], {}, NOW + 10 * at)
    kept = history.of("a", True, 0)
    assert kept is not None
    rates = kept["figures"][:, FIGURES.index("rows_per_second")].tolist()
    assert rates == pytest.approx([math.nan, math.nan, 6.4], rel=1e-6, nan_ok=True)


def test_too_few_rows_leave_no_spectrum() -> None:
    history = History()
    with monitor_of(rows(8)) as monitor:
        history.record([("a", "r1", monitor)], {}, NOW)
    kept = history.of("a", False, 0)
    assert kept is not None
    assert np.isnan(kept["spectrum"]).all()
    assert np.isnan(kept["bands"]).all()


def test_a_dead_band_is_far_below_the_reference_and_without_a_reference_there_are_none() -> None:
    history = History()
    with monitor_of(rows(0)) as dead, SpectrumMonitor(8, block_rows=32) as free:
        assert dead.reference is not None
        dead.observe(rows(640)[:, :2] @ dead.reference.basis[:, :2].T.float().numpy())
        free.observe(rows(640))
        assert dead.flush(120)
        assert free.flush(120)
        history.record([("dead", "r1", dead), ("free", "r2", free)], {}, NOW)
    kept = [history.of(name, False, 0) for name in ("dead", "free")]
    assert kept[0] is not None
    assert kept[1] is not None
    bands = dict(zip(RANKS, kept[0]["bands"][0].tolist(), strict=True))
    assert bands[1] > 0.3  # all of the unit norm lies in two of eight directions
    assert bands[2] > 0.3
    assert max(bands[rank] for rank in (3, 4, 6, 8)) < -6
    assert np.isnan(kept[1]["bands"]).all()


def test_a_swap_and_a_change_of_the_verdict_are_marked_and_the_place_keeps_its_history() -> None:
    history = History()
    with monitor_of(rows(640)) as healthy, monitor_of(rows(640, rank=2)) as collapsed:
        history.record([("a", "r1", healthy), ("other", "r9", healthy)], {}, NOW)
        history.record([("b", "r2", collapsed), ("other", "r9", healthy)], {}, NOW + 15)
    assert history.of("a", False, 0) is None
    kept = history.of("b", False, 0)
    assert kept is not None
    assert len(kept["time"]) == 2
    swap, verdict = kept["events"]
    assert (swap["kind"], swap["from"], swap["to"], swap["time"]) == ("swap", "a@r1", "b@r2", NOW + 15)
    assert (verdict["kind"], verdict["from"], verdict["to"]) == ("verdict", "healthy", "dimensional_collapse")
    assert verdict["reason"]
    assert history.of("b", False, NOW + 15)["events"] == []  # type: ignore[index]
    assert not history.of("other", False, 0)["events"]  # type: ignore[index]


def test_tracks_are_bounded_and_end_after_a_day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TRACKS", 3)
    history = History()
    with monitor_of(rows(0)) as monitor:
        history.record([(f"m{i}", "observed", monitor) for i in range(9)], {}, NOW)
        assert [track.model for track in history.models()] == ["m0", "m1", "m2"]
        history.record([("m7", "observed", monitor)], {}, NOW + KEPT - 1)
        assert history.of("m7", True, 0) is None
        history.record([("m7", "observed", monitor)], {}, NOW + KEPT + 1)  # the three are gone now
        history.record([("m7", "observed", monitor)], {}, NOW + KEPT + 2)
        assert [track.model for track in history.models()] == ["m7"]


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Path, History]:
    """A history in a file."""
    history = History()
    with monitor_of(rows(640)) as healthy, monitor_of(rows(640, rank=2)) as collapsed:
        now = time.time()
        history.record([("a", "r1", healthy), ("them", "observed", healthy)], {"pending": 1.0}, now - 20)
        history.record([("b", "r2", collapsed), ("them", "observed", healthy)], {"pending": 2.0}, now - 5)
    metrics = Metrics("0", "0", "cpu")
    store = WindowStore(tmp_path, metrics)
    store.save_all([], history.state())
    store.close()
    return tmp_path, history


def resumed(folder: Path) -> tuple[History, float]:
    """What is read back, and how many files were refused."""
    metrics, history = Metrics("0", "0", "cpu"), History()
    store = WindowStore(folder, metrics)
    store.restore_history(history.restore)
    store.close()
    return history, metrics.registry.get_sample_value("fullrank_persisted_windows_total", {"result": "refused"}) or 0.0


def test_a_restart_resumes_all_of_it(stored: tuple[Path, History]) -> None:
    folder, before = stored
    after, refused = resumed(folder)
    assert refused == 0
    for model, observed in (("b", False), ("them", True)):
        mine, theirs = before.of(model, observed, 0), after.of(model, observed, 0)
        assert mine is not None and theirs is not None  # noqa: PT018
        for name in ("time", "state", "figures", "spectrum", "bands"):
            np.testing.assert_array_equal(mine[name], theirs[name])
        assert mine["events"] == theirs["events"]
    np.testing.assert_array_equal(before.traffic(0)["figures"], after.traffic(0)["figures"])
    with monitor_of(rows(640)) as healthy:  # the configured encoder is back: that is a swap too
        after.record([("a", "r1", healthy)], {}, time.time())
    assert [it["to"] for it in after.of("a", False, 0)["events"] if it["kind"] == "swap"] == ["b@r2", "a@r1"]  # type: ignore[index]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)


def rename(path: Path) -> None:
    data = path.read_bytes()
    assert data.count(b"dimensional_collapse") >= 1
    path.write_bytes(data.replace(b"dimensional_collapse", b"dimensional_kollapse"))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "one bit": flip,
    "a word in the header": rename,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("hello"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_file_is_refused(stored: tuple[Path, History], case: str, caplog: pytest.LogCaptureFixture) -> None:
    folder, _ = stored
    DAMAGE[case](folder / HISTORY)
    history, refused = resumed(folder)
    assert refused == 1
    assert history.models() == []
    assert "is not resumed" in caplog.text


def test_points_of_another_layout_or_out_of_order_are_refused(stored: tuple[Path, History]) -> None:
    _, history = stored
    tensors, index = history.state()
    with pytest.raises(ValueError, match="another version"):
        History().restore(tensors, index.replace('"schema": 1', '"schema": 2'))
    with pytest.raises(ValueError, match="lacks"):
        History().restore({}, index)
    with pytest.raises(ValueError, match="order"):
        History().restore(tensors | {"0.fine": tensors["0.fine"].view(2, -1).flip(0).reshape(-1)}, index)
    with pytest.raises(ValueError, match="buffer"):
        History().restore(tensors | {"0.fine": tensors["0.fine"][:-1]}, index)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.95, 1.0])
def test_quantiles_are_promqls(share: float) -> None:
    """Against numpy's interpolation of the cumulative counts, which is what histogram_quantile does."""
    bounds = [0.1, 0.5, 1.0, 5.0, math.inf]
    counts = [3.0, 9.0, 10.0, 20.0, 20.0]
    expected = float(np.interp(share * 20, [0, *counts[:-1]], [0, *bounds[:-1]]))
    assert quantile(share, dict(zip(bounds, counts, strict=True))) == pytest.approx(expected)


def test_quantiles_beyond_the_last_bound_and_of_nothing() -> None:
    assert quantile(0.99, {1.0: 0.0, math.inf: 5.0}) == 1.0
    assert math.isnan(quantile(0.5, {1.0: 0.0, math.inf: 0.0}))
    assert math.isnan(quantile(0.5, {}))


def test_the_meter_reads_the_time_between_two_looks() -> None:
    metrics = Metrics("0", "0", "cpu")
    metrics.watch_pending(lambda: 7, 512)
    meter = Meter(metrics)
    metrics.images.inc(1000)
    assert meter.read(100.0) == {"pending": 7.0}
    metrics.images.inc(30)
    metrics.rejected["overloaded"].inc(4)
    metrics.phase["forward"].observe(0.2)
    metrics.phase["forward"].observe(0.4)
    for _ in range(4):
        metrics.count_request("/embed", 200, 0.02)
        metrics.count_request("/spectrum", 200, 9.0)  # no embedding
    figures = meter.read(110.0)
    assert figures["images_per_second"] == pytest.approx(3.0)
    assert figures["refused_per_second"] == pytest.approx(0.4)
    assert figures["forward"] == pytest.approx(0.3)
    assert math.isnan(figures["decode"])
    assert 0.01 <= figures["p50"] <= figures["p99"] <= 0.025
    quiet = meter.read(120.0)
    assert quiet["images_per_second"] == 0
    assert math.isnan(quiet["p50"])
