import math

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from fullrank import Reference, SpectrumMonitor
from fullrank.exposition import SpectrumCollector, duration

D = 16


def rows_of(n, seed=0):
    torch.manual_seed(seed)
    return torch.randn(n, D)


@pytest.fixture
def monitor():
    reference = Reference.build(rows_of(1000, 1), rows_of(1000, 2), canary=rows_of(40, 3), calibrate=False)
    with SpectrumMonitor(D, reference, windows=(20.0, 300.0), clock=lambda: 0.0) as monitor:
        yield monitor


def scrape(*sources):
    registry = CollectorRegistry()
    registry.register(SpectrumCollector(lambda: sources))
    text = generate_latest(registry).decode()
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(samples, name, **labels):
    return samples[(name, *sorted({"model": "m", "revision": "r", **labels}.items()))]


def test_every_series_exists_before_the_first_row(monitor):
    empty = scrape(("m", "r", monitor))
    monitor.observe(rows_of(600), inputs=rows_of(600))
    monitor.record_canary(rows_of(40, 3))
    monitor.flush(10)
    full = scrape(("m", "r", monitor))
    later = {key[0] for key in set(full) - set(empty)}
    assert later <= {"fullrank_eigenvalue"}  # whose ranks come with the first rows
    assert value(empty, "fullrank_rows_total", fate="sampled") == 0
    assert math.isnan(value(empty, "fullrank_participation_ratio", window="20s", bound="upper"))
    assert value(empty, "fullrank_verdict", state="insufficient_data") == 1


def test_values_are_the_snapshots(monitor):
    monitor.observe(rows_of(600) * 3, inputs=rows_of(600))
    monitor.record_canary(rows_of(40, 3))
    monitor.flush(10)
    samples, snapshot = scrape(("m", "r", monitor)), monitor.snapshot()
    window = snapshot.windows[300.0]
    assert value(samples, "fullrank_effective_rank", window="5m") == window.effective_rank
    assert (
        value(samples, "fullrank_participation_ratio", window="5m", bound="upper") == window.participation_ratio.upper
    )
    assert value(samples, "fullrank_eigenvalue", window="20s", rank="8") == float(window.eigenvalues[7])
    assert value(samples, "fullrank_total_variance", window="5m") == window.total_variance
    assert value(samples, "fullrank_canary_cosine_min") == pytest.approx(1)
    assert value(samples, "fullrank_embedding_norm", window="5m", quantile="0.5") == pytest.approx(11.8, rel=0.05)
    assert value(samples, "fullrank_rows_total", fate="sampled") == 600
    assert value(samples, "fullrank_band_energy_total", rank="16") == pytest.approx(300, rel=0.2)
    assert value(samples, "fullrank_trace_product_total") > value(samples, "fullrank_frobenius_product_total") > 0
    assert value(samples, "fullrank_threshold", signal="effective_rank") == snapshot.thresholds["effective_rank"]
    assert value(samples, "fullrank_band_energy_ratio", window="5m", rank="16", part="tail", bound="lower") < 1.1
    assert value(samples, "fullrank_snapshot_timestamp_seconds") == pytest.approx(snapshot.timestamp)
    assert sum(v for key, v in samples.items() if key[0] == "fullrank_verdict") == 1


def test_two_monitors_share_the_families(monitor):
    with SpectrumMonitor(D) as other:
        samples = scrape(("m", "r", monitor), ("m", "s", other))
    assert value(samples, "fullrank_verdict", state="insufficient_data", revision="s") == 1
    assert ("fullrank_reference_effective_rank", ("model", "m"), ("revision", "s")) not in samples


def test_registering_collects_nothing():
    def source():
        raise AssertionError("collected")
        yield

    CollectorRegistry(auto_describe=True).register(SpectrumCollector(source))


@pytest.mark.parametrize(
    ("seconds", "text"), [(300.0, "5m"), (3600.0, "1h"), (20.0, "20s"), (90.0, "90s"), (86400.0, "1d"), (0.5, "500ms")]
)
def test_windows_are_prometheus_durations(seconds, text):
    assert duration(seconds) == text
