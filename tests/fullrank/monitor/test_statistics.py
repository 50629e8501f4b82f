"""What a monitor's window says of its rows, against plain formulas on the same rows."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from fullrank import Moments, SpectrumMonitor, measures
from tests.support.monitors import D, rows_of, unit


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
