"""A process that watches its embeddings ends as it would have without: whatever it does, and whoever forgot to close.

Each way of ending runs in children of one fresh interpreter, which has imported the library and made no monitor yet.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
CHILDREN = """
import gc, importlib, json, os, signal, sys, threading
import torch
import fullrank
import fullrank.monitor
from fullrank import Reference, SpectrumMonitor

def rows(n=32, seed=0):
    return torch.randn(n, 64, generator=torch.Generator().manual_seed(seed))

def watch(monitor):
    for batch in range(200):
        monitor.observe(rows(seed=batch))
    return monitor

torch.set_num_threads(1)
ways, times = json.loads(sys.argv[1]), int(sys.argv[2])
codes = {way: [] for way in ways}
running = {}

def collect():
    pid, status = os.wait()
    codes[running.pop(pid)].append(os.waitstatus_to_exitcode(status))

for way in [way for way in ways for _ in range(times)]:
    if len(running) == 4:
        collect()
    pid = os.fork()
    if pid == 0:
        break
    running[pid] = way
else:
    while running:
        collect()
    print(json.dumps(codes))
    sys.exit(0)
exec(ways[way])  # in a child, which then ends as a script does
"""
# On a loaded machine a way may take minutes: rows are counted over an hour.
WAYS = {
    "a script that ends": "monitor = watch(SpectrumMonitor(64))",
    "with a reference": "monitor = watch(SpectrumMonitor(64, Reference.build(rows(400, 1), calibrate=False)))",
    "one that nobody keeps": "watch(SpectrumMonitor(64))",
    "one in a cycle": "class Cycle: pass\nit = Cycle(); it.me, it.monitor = it, watch(SpectrumMonitor(64)); del it",
    "an exception on the way out": "monitor = watch(SpectrumMonitor(64)); raise KeyError('on the way out')",
    "fifty": "monitors = [SpectrumMonitor(64) for _ in range(50)]\nfor it in monitors: it.observe(rows(512))",
    "closed": "monitor = watch(SpectrumMonitor(64)); monitor.close()",
    "a handler at exit that reads it": """
import atexit
monitor = watch(SpectrumMonitor(64))
atexit.register(lambda: os._exit(3) if monitor.snapshot(wait=600).windows[3600.0].rows != 6400 else None)
""",
    "a notebook that is restarted": """
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
for cell in range(3):  # run again, after an edit of the library
    monitor = watch(SpectrumMonitor(64))
    for name in [name for name in sys.modules if name.startswith("fullrank")]:
        del sys.modules[name]
    from fullrank import SpectrumMonitor
importlib.reload(sys.modules["fullrank.monitor.worker"])
os.kill(os.getpid(), signal.SIGTERM)
signal.pause()
""",
    "a child that uses its parent's": """
monitor = watch(SpectrumMonitor(64))
pid = os.fork()
if pid == 0:
    monitor.observe(rows(100))
    snapshot = monitor.snapshot(wait=600)
    # The parent's rows are the parent's to count.
    assert (snapshot.windows[3600.0].rows, monitor.counters.rows["sampled"]) == (100, 100)
else:
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert monitor.snapshot(wait=600).windows[3600.0].rows == 6400
""",
    "a child that leaves its parent's alone": """
monitor = watch(SpectrumMonitor(64))
pid = os.fork()
if pid:
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
""",
    "workers made by fork": """
import multiprocessing
monitor = watch(SpectrumMonitor(64))
context = multiprocessing.get_context("fork")
workers = [context.Process(target=watch, args=(monitor,)) for _ in range(2)]
for it in workers: it.start()
for it in workers: it.join()
assert [it.exitcode for it in workers] == [0, 0]
""",
}
SPAWNED = """
import json, multiprocessing, sys
import torch
from fullrank import SpectrumMonitor

def work():
    global monitor
    torch.set_num_threads(1)
    monitor = SpectrumMonitor(64)
    for _ in range(200):
        monitor.observe(torch.randn(32, 64))

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=work) for _ in range(int(sys.argv[1]))]
    for pair in (workers[i : i + 2] for i in range(0, len(workers), 2)):
        for it in pair: it.start()
        for it in pair: it.join()
    print(json.dumps([it.exitcode for it in workers]))
"""


def output(script: Path, *arguments: str) -> str:
    """What a fresh interpreter prints that runs the script and ends with code 0, whatever its children do."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=3600, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("times", [1, pytest.param(20, marks=pytest.mark.soak)])
def test_a_process_ends_as_it_would_without_a_monitor(tmp_path: Path, times: int) -> None:
    script = tmp_path / "script.py"
    script.write_text(CHILDREN)
    codes = json.loads(output(script, json.dumps(WAYS), str(times)))
    assert codes == {way: [1 if "exception" in way else 0] * times for way in WAYS}


@pytest.mark.parametrize("times", [2, pytest.param(20, marks=pytest.mark.soak)])
def test_spawned_processes_end_in_peace(tmp_path: Path, times: int) -> None:
    script = tmp_path / "script.py"
    script.write_text(SPAWNED)
    assert json.loads(output(script, str(times))) == [0] * times


@pytest.mark.parametrize("times", [1, pytest.param(20, marks=pytest.mark.soak)])
def test_a_fresh_interpreter_that_just_ends(tmp_path: Path, times: int) -> None:
    script = tmp_path / "script.py"
    script.write_text(CHILDREN.partition("ways, times")[0] + "monitor = watch(SpectrumMonitor(64))")
    for _ in range(times):
        assert output(script) == ""
