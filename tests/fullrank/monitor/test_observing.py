"""What a monitor does with the rows it is given: duplicates, bad rows, any dtype, many threads, a full buffer."""

import math
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from fullrank import SpectrumMonitor
from tests.support.monitors import D, rows_of


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
