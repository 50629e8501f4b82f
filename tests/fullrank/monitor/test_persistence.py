"""A window saved by one process and resumed by another, to the last bit; and what it weighs."""

import subprocess
import sys

import torch
from safetensors.torch import load_file, save_file

from fullrank import SpectrumMonitor

D = 24
FIRST_LIFE = """
import sys, torch
from safetensors.torch import save_file
from fullrank import SpectrumMonitor
torch.manual_seed(0)
with SpectrumMonitor({d}) as monitor:
    for part in torch.randn(2000, {d}).split(300):
        monitor.observe(part, inputs=part[:, :5])
        monitor.flush()
    save_file(monitor.state(), sys.argv[1])
    save_file(monitor.moments().tensors(), sys.argv[2])
"""


def test_another_process_resumes_the_window_to_the_last_bit(tmp_path):
    state, moments = tmp_path / "state.safetensors", tmp_path / "moments.safetensors"
    subprocess.run([sys.executable, "-c", FIRST_LIFE.format(d=D), state, moments], check=True, timeout=600)
    with SpectrumMonitor(D) as monitor:
        monitor.restore(load_file(state))
        resumed, left = monitor.moments().tensors(), load_file(moments)
        assert all(torch.equal(resumed[name], left[name]) for name in left)
        window = monitor.snapshot().windows[300.0]
        assert window.rows == 2000
        assert window.participation_ratio.lower < D * 1.02
        again = tmp_path / "again.safetensors"
        save_file(monitor.state(), again)  # and it may be passed on
        assert monitor.moments().count == 2000
        monitor.observe(torch.randn(300, D))
        monitor.flush()
        assert monitor.snapshot().windows[300.0].rows == 2300


def test_full_windows_weigh_twenty_matrices():
    d, now = 256, [0.0]
    with SpectrumMonitor(d, clock=lambda: now[0]) as monitor:
        for step in [360.0] * 12 + [30.0] * 12:
            now[0] += step
            monitor.observe(torch.randn(8, d))
            monitor.flush()
        assert [window.groups for window in monitor.snapshot().windows.values()] == [10, 20]
        weight = sum(tensor.nbytes for tensor in monitor.state().values())
        assert 20 * d * d * 8 < weight < 1.06 * 20 * d * d * 8
