"""A monitor's life: its threads, its snapshots, what it saves, and how it ends."""

import gc
import json
import math
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from fullrank import Reference, SpectrumMonitor
from tests.support.monitors import Clock, D, rows_of


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


def test_rows_that_a_restore_forgets_are_dropped_and_waited_for_no_more(monitor):
    monitor.observe(rows_of(256))
    monitor.flush(120)
    state = monitor.state()
    monitor.observe(torch.cat((rows_of(259, 1), torch.zeros(2, D))))
    deadline = time.monotonic() + 120
    while monitor.counters.rows["zero"] < 2 or monitor.counters.rows["sampled"] < 510:  # 5 are left over
        assert time.monotonic() < deadline
        time.sleep(0.001)
    monitor.restore(state)
    snapshot = monitor.snapshot()
    assert snapshot.waiting == 0
    assert snapshot.windows[300.0].rows == 256
    rows = {fate: count for fate, count in snapshot.counters.rows.items() if count}
    assert rows == {"sampled": 510, "zero": 2, "dropped": 5}


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


def test_zeros_of_an_open_block_are_not_taken_off_what_a_failure_lost(monitor, monkeypatch):
    monitor.observe(torch.cat((rows_of(5), torch.zeros(2, D))))
    deadline = time.monotonic() + 120
    while monitor.counters.rows["zero"] < 2:  # they and the 5 make no block yet
        assert time.monotonic() < deadline
        time.sleep(0.001)
    with monkeypatch.context() as patch:
        patch.setattr("fullrank.monitor.blocks.BlockMaker._sift", lambda *_: 1 / 0)
        monitor.observe(rows_of(300, 2))
        monitor.flush(120)
    assert monitor.flush(120)
    rows = {fate: count for fate, count in monitor.counters.rows.items() if count}
    assert rows == {"sampled": 5, "zero": 2, "dropped": 300}
    assert monitor.snapshot().waiting == 0


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
