import gc
import json
import math
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from fullrank import Moments, Reference, SpectrumMonitor, measures

D = 32


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def rows_of(n, seed=0, d=D):
    torch.manual_seed(seed)
    return torch.randn(n, d) * torch.arange(1, d + 1).float() ** -0.5 + 0.2


@pytest.fixture(scope="module")
def reference():
    return Reference.build(rows_of(4000, 100), rows_of(4000, 101), canary=rows_of(40, 102), calibrate=False)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def monitor(reference, clock):
    with SpectrumMonitor(D, reference, clock=clock) as monitor:
        yield monitor


def unit(rows):
    return torch.nn.functional.normalize(rows.double())


def test_a_window_is_the_statistics_of_its_rows(monitor, reference):
    rows = rows_of(2000) * 7.0
    for part in rows.split(300):
        monitor.observe(part)
    assert monitor.flush(120)
    snapshot = monitor.snapshot()
    window = snapshot.windows[300.0]
    z = unit(rows)
    moments = Moments(D).add(z)
    assert window.rows == 2000
    assert window.participation_ratio.estimate == pytest.approx(moments.participation_ratio(), rel=1e-5)
    assert window.participation_ratio.lower < window.participation_ratio.estimate < window.participation_ratio.upper
    assert window.effective_rank == pytest.approx(moments.effective_rank(), rel=1e-5)
    assert window.total_variance == pytest.approx(float(z.T.cov().trace()), rel=1e-5)
    assert window.mean_cosine == pytest.approx(measures.mean_cosine(rows), rel=1e-5)
    assert window.rankme == pytest.approx(measures.rankme(torch.linalg.eigvalsh(z.T.cov()).sqrt()), rel=1e-4)
    norms = torch.linalg.vector_norm(rows, dim=1)
    for q, norm in window.norms.items():
        assert norm == pytest.approx(float(norms.quantile(q)), rel=0.03)
    assert all(band.ratio.estimate == pytest.approx(1, abs=0.12) for band in window.bands)
    assert abs(window.mean_shift_ratio) < 0.01
    assert snapshot.verdict.state == "healthy"
    assert snapshot.windows[3600.0].rows == 2000


def test_band_energies_are_centred_on_each_block(reference, clock):
    z = unit(rows_of(64 * 40))
    with SpectrumMonitor(D, reference, clock=clock, block_rows=64) as monitor:
        monitor.observe(z)
        monitor.flush(120)
        expected = sum((part.T.cov() @ reference.basis * reference.basis).sum(0) * 64 for part in z.split(64))
        firsts = (0, *reference.bands[:-1])
        for (rank, energy), first in zip(monitor.counters.band_energy.items(), firsts, strict=True):
            assert energy == pytest.approx(float(expected[first:rank].sum()), rel=1e-4)


def test_a_mean_that_jumps_between_blocks_does_not_fill_the_tail(reference, clock):
    z = unit(rows_of(64 * 40))
    with SpectrumMonitor(D, reference, clock=clock, block_rows=64) as monitor:
        for i, part in enumerate(z.split(64)):
            # Along the last direction only, then to unit length like any row.
            monitor.observe(part + 5.0 * (i % 2) * reference.basis[:, -1])
        monitor.flush(120)
        assert monitor.snapshot().windows[300.0].bands[-1].ratio.estimate < 1.1
        assert monitor.snapshot().windows[300.0].mean_shift_ratio > 0.1


def test_products_of_consecutive_blocks_are_the_counters(reference, clock):
    z = unit(rows_of(256 * 5))
    with SpectrumMonitor(D, reference, clock=clock) as monitor:
        monitor.observe(z)
        monitor.flush(120)
        covariances = [part.T.cov() for part in z.split(256)]
        pairs = list(pairwise(covariances))
        assert monitor.counters.trace_product == pytest.approx(
            float(sum(a.trace() * b.trace() for a, b in pairs)), rel=1e-4
        )
        assert monitor.counters.frobenius_product == pytest.approx(
            float(sum((a * b).sum() for a, b in pairs)), rel=1e-4
        )


def test_windows_forget_by_their_own_length(monitor, clock):
    monitor.observe(rows_of(300))
    monitor.flush(120)
    clock.now = 301.0
    monitor.observe(rows_of(200, 1))
    monitor.flush(120)
    assert [w.rows for w in monitor.snapshot().windows.values()] == [200, 500]
    clock.now = 4000.0
    monitor.flush(120)
    assert [w.rows for w in monitor.snapshot().windows.values()] == [0, 0]
    assert math.isnan(monitor.snapshot().windows[300.0].effective_rank)
    assert monitor.snapshot().verdict.state == "insufficient_data"


@pytest.mark.parametrize("as_bytes", [True, False])
def test_duplicates_enter_once_a_horizon(monitor, clock, as_bytes):
    keys = np.arange(100, dtype=np.uint64) % 10
    given = [key.tobytes() for key in keys] if as_bytes else keys
    monitor.observe(rows_of(100), keys=given)
    monitor.flush(120)
    assert monitor.counters.rows == {"sampled": 10, "duplicate": 90, "dropped": 0, "nonfinite": 0, "zero": 0}
    clock.now = 300.0
    monitor.observe(rows_of(100), keys=given)
    monitor.flush(120)
    assert monitor.counters.rows["sampled"] == 20


def test_rows_that_are_not_finite_are_counted_and_their_key_stays_free(monitor):
    rows = rows_of(64)
    rows[0, 0], rows[1, 1] = math.nan, math.inf
    monitor.observe(rows, keys=[b"a", b"b"] + [b"%d" % i for i in range(62)])
    monitor.observe(rows_of(2, 1), keys=[b"a", b"b"])
    monitor.flush(120)
    assert monitor.counters.rows == {"sampled": 64, "duplicate": 0, "dropped": 0, "nonfinite": 2, "zero": 0}
    assert math.isfinite(monitor.snapshot().windows[300.0].total_variance)


def test_extreme_scales_are_defined(monitor):
    rows = rows_of(600).double()
    rows[100:200] *= 1e30
    rows[200:300] *= 1e-30
    monitor.observe(rows)
    monitor.flush(120)
    window = monitor.snapshot().windows[300.0]
    assert window.rows == 600
    assert math.isfinite(window.effective_rank)


def test_rows_of_zeros_are_counted_apart_and_change_no_statistic(reference, clock):
    rows = rows_of(2000)
    zeros = torch.zeros(100, D)
    with SpectrumMonitor(D, reference, clock=clock) as plain, SpectrumMonitor(D, reference, clock=clock) as mixed:
        for part, none in zip(rows.split(256), (*zeros.split(12),), strict=False):
            plain.observe(part)
            mixed.observe(torch.cat((none, part)))
        assert plain.flush(120)
        assert mixed.flush(120)
        mine, theirs = plain.snapshot(), mixed.snapshot()
        assert theirs.counters.rows["zero"] == 96
        window = theirs.windows[300.0]
        assert (window.rows, window.zeros, window.zero_share) == (2000, 96, 96 / 2096)
        assert window.effective_rank == pytest.approx(mine.windows[300.0].effective_rank, rel=1e-6)
        assert window.total_variance == pytest.approx(mine.windows[300.0].total_variance, rel=1e-6)
        assert theirs.verdict.state == mine.verdict.state == "healthy"
        restored = load(save(mixed.state()))
        with SpectrumMonitor(D, reference, clock=clock) as again:
            again.restore(restored)
            assert again.snapshot().windows[300.0].zeros == 96


def test_an_encoder_that_gives_zeros_has_collapsed(monitor):
    monitor.observe(torch.zeros(600, D))
    monitor.flush(120)
    snapshot = monitor.snapshot()
    assert snapshot.verdict.state == "complete_collapse"
    assert "100% of the rows are zeros" in snapshot.verdict.reason


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_float_dtype_and_numpy(monitor, dtype):
    monitor.observe(rows_of(300).to(dtype))
    monitor.observe(rows_of(300, 1).numpy())
    monitor.flush(120)
    assert monitor.snapshot().windows[300.0].rows == 600


def test_the_caller_may_reuse_its_buffer(monitor):
    rows = rows_of(64)
    monitor.observe(rows)
    rows.fill_(math.nan)
    monitor.flush(120)
    assert monitor.counters.rows["sampled"] == 64


def test_a_full_buffer_drops_and_counts_and_never_waits(reference):
    with SpectrumMonitor(D, reference, buffer_rows=1000) as monitor:
        rows = rows_of(1000)
        caller = threading.Thread(target=lambda: [monitor.observe(rows) for _ in range(10)], daemon=True)
        with monitor._worker.state:  # the worker cannot proceed
            caller.start()
            caller.join(120)
            assert not caller.is_alive()
        monitor.flush(120)
        rows = monitor.counters.rows
        assert rows["sampled"] + rows["dropped"] == 10000
        assert rows["sampled"] <= 2000


def test_observing_from_many_threads_loses_nothing(monitor):
    def send(seed):
        for i in range(50):
            monitor.observe(rows_of(3, seed * 100 + i))

    threads = [threading.Thread(target=send, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    monitor.flush(120)
    assert monitor.counters.rows["sampled"] == 900
    assert monitor.snapshot().windows[300.0].rows == 900


def test_the_snapshot_is_cached_and_refreshes_without_being_asked(monitor, clock):
    first = monitor.snapshot()
    assert monitor.snapshot() is first
    monitor.observe(rows_of(600))
    clock.now = 200.0
    deadline = time.monotonic() + 120
    while monitor.snapshot().windows[300.0].rows < 512 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert monitor.snapshot().windows[300.0].rows >= 512


def test_the_callers_threads_are_left_alone(reference):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with SpectrumMonitor(D, reference) as monitor:
            seen = []
            monitor._worker.snapshots.record_canary = lambda rows: seen.append(torch.get_num_threads())
            monitor.record_canary(rows_of(40, 102))
            monitor.flush(120)
            late = []
            thread = threading.Thread(target=lambda: late.append(torch.get_num_threads()))
            thread.start()
            thread.join()
            assert (seen, torch.get_num_threads(), late) == ([1], 2, [2])
    finally:
        torch.set_num_threads(before)


def test_a_monitor_made_on_another_thread_leaves_the_default_alone(reference):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with ThreadPoolExecutor(1) as fresh:
            fresh.submit(SpectrumMonitor, D, reference).result().close()
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(before)


def test_canary(monitor):
    monitor.record_canary(rows_of(40, 102) * 3)
    monitor.flush(120)
    assert monitor.snapshot().canary.cosine_min == pytest.approx(1.0)
    assert monitor.snapshot().verdict.state == "insufficient_data"
    monitor.record_canary(rows_of(40, 103))
    monitor.flush(120)
    assert monitor.snapshot().verdict.state == "model_fault"
    monitor.record_canary(torch.full((40, D), math.nan))
    monitor.flush(120)
    assert monitor.snapshot().verdict.state == "model_fault"


def test_inputs_have_a_twin(monitor):
    torch.manual_seed(0)
    assert math.isnan(monitor.snapshot().input_participation_ratio)
    for part in torch.randn(2000, 12).split(100):
        monitor.observe(rows_of(100), inputs=part)
    monitor.flush(120)
    assert monitor.snapshot().input_participation_ratio == pytest.approx(12, rel=0.05)


def test_moments_of_a_window_are_those_of_its_rows(monitor):
    assert monitor.moments().count == 0
    monitor.observe(rows_of(700))
    monitor.flush(120)
    np.testing.assert_allclose(monitor.moments(300.0).covariance(), unit(rows_of(700)).T.cov(), rtol=1e-4, atol=1e-7)
    with pytest.raises(KeyError, match="window 7"):
        monitor.moments(7)


def test_a_restart_resumes_its_window(monitor, reference, clock):
    for i in range(4):
        clock.now = 20.0 * i
        monitor.observe(rows_of(256, i), inputs=rows_of(256, i)[:, :5])
        monitor.flush(120)
    saved = load(save(monitor.state()))
    later = Clock()
    later.now = 1e6  # another process, another clock
    with SpectrumMonitor(D, reference, clock=later) as again:
        again.restore(saved)
        before, after = monitor.snapshot(), again.snapshot()
        assert after.windows[300.0].rows == 1024
        assert after.windows[300.0].participation_ratio == before.windows[300.0].participation_ratio
        assert after.windows[300.0].bands == before.windows[300.0].bands
        assert after.input_participation_ratio == before.input_participation_ratio
        with pytest.raises(ValueError, match="inputs: expected width 5, got 6"):
            again.observe(rows_of(2), inputs=rows_of(2)[:, :6])
        saved["saved"] -= 270.0  # the restart took that long
        again.restore(saved)
        assert [w.rows for w in again.snapshot().windows.values()] == [512, 1024]


@pytest.mark.parametrize("name", ["dimension", "reference", "saved", "0.ages", "0.scatter"])
def test_a_state_that_is_damaged_or_of_another_encoder_is_refused(monitor, reference, name):
    monitor.observe(rows_of(256))
    monitor.flush(120)
    state = monitor.state()
    del state[name]
    with pytest.raises(ValueError, match=r"state|moments"):
        monitor.restore(state)
    assert monitor.snapshot().windows[300.0].rows == 256
    other = Reference.build(rows_of(100, 1), rows_of(100, 2), calibrate=False)
    with SpectrumMonitor(D, other) as another, pytest.raises(ValueError, match="reference"):
        another.restore(monitor.state())


def test_snapshot_is_json(monitor):
    empty = json.loads(json.dumps(monitor.snapshot().to_dict(), allow_nan=False))
    assert empty["windows"]["300"]["effective_rank"] is None
    assert empty["verdict"]["state"] == "insufficient_data"
    monitor.observe(rows_of(600))
    monitor.flush(120)
    full = json.loads(json.dumps(monitor.snapshot().to_dict(), allow_nan=False))
    assert full["windows"]["300"]["rows"] == 600
    assert len(full["windows"]["300"]["eigenvalues"]) == D
    assert full["windows"]["300"]["bands"][0]["part"] == "head"


def test_without_a_reference_there_are_statistics_and_no_verdict(clock):
    with SpectrumMonitor(D, clock=clock) as monitor:
        monitor.observe(rows_of(600))
        monitor.flush(120)
        snapshot = monitor.snapshot()
        assert snapshot.windows[300.0].effective_rank > 1
        assert snapshot.verdict.state == "insufficient_data"
        with pytest.raises(ValueError, match="canary"):
            monitor.record_canary(rows_of(4))


def test_closing_takes_in_what_waits_and_refuses_more(reference):
    monitor = SpectrumMonitor(D, reference)
    monitor.observe(rows_of(100))
    monitor.close()
    monitor.close()
    assert monitor.snapshot().windows[300.0].rows == 100
    monitor.observe(rows_of(5))
    assert monitor.counters.rows["dropped"] == 5
    assert monitor.flush(1)


def test_a_failure_on_a_block_is_logged_and_survived(monitor, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        patch.setattr("fullrank.monitor.blocks.unit", lambda rows: 1 / 0)
        monitor.observe(rows_of(300))
        monitor.flush(120)
    assert "spectrum monitor failed" in caplog.text
    assert monitor.counters.rows["dropped"] == 300
    assert monitor.snapshot().waiting == 0
    monitor.observe(rows_of(300))
    assert monitor.flush(120)
    assert monitor.snapshot().windows[300.0].rows >= 300


def test_the_three_lines_of_the_readme_print_a_number(capsys):
    text = (Path(__file__).parents[3] / "README.md").read_text()
    (block,) = re.findall(r"```python\n(from fullrank import SpectrumMonitor\n.*?)```", text, re.DOTALL)
    for n in (40, 2000):
        exec(block, {"embeddings": torch.randn(n, 256, generator=torch.Generator().manual_seed(n))})
    few, many = capsys.readouterr().out.split("no reference to compare with\n")[:2]
    assert re.search(r"participation ratio \d+\.\d, .* over 40 rows", few)
    assert "the effective rank needs more rows: 40 do not determine it" in few
    assert "effective rank 25" in many
    assert "nan" not in few + many


def test_a_snapshot_says_what_it_waits_for(reference):
    with SpectrumMonitor(D, reference) as monitor:
        assert monitor.snapshot().waits_for == "nothing was observed in the last 300 s"
        with monitor._worker.state:  # the worker cannot proceed
            monitor.observe(rows_of(300))
            snapshot = monitor.snapshot()
            assert snapshot.waiting == 300
            assert snapshot.waits_for.startswith("300 rows observed are not counted yet")
        snapshot = monitor.snapshot(wait=120)
        assert (snapshot.waiting, snapshot.waits_for, snapshot.windows[300.0].rows) == (0, "", 300)
        assert snapshot.to_dict()["waits_for"] == ""


def test_a_monitor_that_nobody_keeps_ends_its_thread(reference):
    monitor = SpectrumMonitor(D, reference)
    thread = monitor._worker._thread
    monitor.observe(rows_of(10))
    del monitor
    gc.collect()
    thread.join(120)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": torch.zeros(2, 5)}, "rows: expected width 32, got 5"),
        ({"rows": torch.zeros(32)}, "rows: expected two dimensions"),
        ({"rows": torch.zeros(2, 32, dtype=torch.int32)}, "rows: expected a floating dtype, got int32"),
        ({"rows": torch.zeros(2, 32), "keys": [b"a"]}, "keys: expected 2"),
        ({"rows": torch.zeros(2, 32), "inputs": torch.zeros(3, 4)}, "inputs: expected 2 rows, got 3"),
        ({"rows": torch.zeros(2, 32), "inputs": torch.zeros(2)}, "inputs: expected two dimensions"),
        ({"rows": torch.zeros(2, 32), "inputs": torch.zeros(2, 0)}, "inputs: expected at least one column"),
    ],
)
def test_bad_observations_are_named(monitor, arguments, message):
    with pytest.raises(ValueError, match=message):
        monitor.observe(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dimension": 0}, "dimension"),
        ({"dimension": 4, "windows": ()}, "windows"),
        ({"dimension": 4, "windows": (-1.0,)}, "windows"),
        ({"dimension": 4, "block_rows": 1}, "block_rows"),
    ],
)
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        SpectrumMonitor(**arguments)


def test_a_reference_of_another_dimension_is_refused(reference):
    with pytest.raises(ValueError, match="reference: expected dimension 8, got 32"):
        SpectrumMonitor(8, reference)
