"""Prometheus collector of monitors: yields what their latest snapshots hold."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict

try:
    from prometheus_client import Metric
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    from prometheus_client.registry import Collector
except ImportError as error:
    raise ImportError("fullrank.exposition needs prometheus-client: pip install 'fullrank[prometheus]'") from error

from fullrank.canary import Canary
from fullrank.monitor.monitor import SpectrumMonitor
from fullrank.monitor.snapshot import FATES, Snapshot
from fullrank.sample import SampleMeasures
from fullrank.verdict import STATES

Source = Callable[[], Iterable[tuple[str, str, SpectrumMonitor]]]

_LABELS = ["model", "revision"]
_GAUGES: dict[str, tuple[str, list[str]]] = {
    "effective_rank": (
        "exp(entropy) of the covariance's eigenvalues, first-order bias removed; NaN at too few rows",
        ["window"],
    ),
    "rankme": ("RankMe of centred rows: exp(entropy) of singular values; NaN at too few rows", ["window"]),
    "participation_ratio": ("(tr C)^2 / tr C^2 from unbiased traces, with 95 % bounds", ["window", "bound"]),
    "stable_rank": ("Total variance over the leading direction's; NaN at too few rows", ["window"]),
    "numerical_rank": ("Directions above the noise floor of the serving dtype; NaN at too few rows", ["window"]),
    "eigenvalue": ("Covariance eigenvalue at a rank", ["window", "rank"]),
    "total_variance": ("Trace of the covariance of L2-normalised rows", ["window"]),
    "mean_cosine": ("Mean cosine between rows: 1 when all are one point", ["window"]),
    "band_energy_ratio": (
        "Variance in the reference's directions up to a rank, over the reference's, with 95 % bounds",
        ["window", "rank", "part", "bound"],
    ),
    "head_energy_ratio": ("Variance in all head bands over the reference's, with 95 % bounds", ["window", "bound"]),
    "window_rows": ("Rows the window holds", ["window"]),
    "zero_share": ("Rows of zeros over all rows: answers without a direction", ["window"]),
    "embedding_norm": ("Norm of embeddings before normalising", ["window", "quantile"]),
    "mean_shift_ratio": ("Squared shift of the mean, in units of the reference's total variance (shortest window)", []),
    "tail_shift": ("Squared shift of the mean along tail directions, in their variances (shortest window)", []),
    "canary_cosine_min": ("Least cosine of a canary image's embedding to its stored one", []),
    "canary_angle_degrees": ("Angle of canary images' embeddings to their stored ones", ["quantile"]),
    "canary_neighbours_overlap": ("Share of a canary image's 10 nearest that still are among its 10 nearest", []),
    "canary_distance_correlation": ("Rank correlation of canary images' distances with those stored", []),
    "canary_participation_ratio": ("Participation ratio of the canary images' embeddings", []),
    "wasserstein_uniformity": (
        "Wasserstein distance of the rows' Gaussian law from an isotropic one: 0 spread evenly, 1.41 at one point",
        ["window"],
    ),
    "dead_units": ("Coordinates that hardly vary in the sampled rows (shortest window)", []),
    "saturated_units": ("Coordinates stuck at one end of their range in 95 % of the sampled rows", []),
    "hubness": ("Skewness of how often a sampled row is among the 10 nearest of the others", []),
    "local_dimension": ("Intrinsic dimension of the sampled rows (TwoNN), with 95 % bounds", ["bound"]),
    "gaussianity": ("Epps and Pulley's statistic over random slices of the sampled rows: about 0.3 if Gaussian", []),
    "copies_share": ("Share of the sampled rows that have a copy among them", []),
    "shared_answers": ("Share of the sampled rows that equal the row of another input", []),
    "input_correlation": (
        "Distance correlation of sampled rows and their inputs, with 95 % bounds: 0 where answers are other requests'",
        ["bound"],
    ),
    "sample_rows": ("Rows sampled for measures of neighbourhoods and units (shortest window)", []),
    "input_participation_ratio": ("Participation ratio of the inputs' descriptors (shortest window)", []),
    "input_distance": ("How far the inputs are from the reference's, 0 where alike (shortest window)", []),
    "texture_shift": (
        "How far the inputs' textures have moved from the reference's, in standard deviations (shortest window)",
        [],
    ),
    "evidence": ("log10 of the sequential test's evidence against healthy traffic: an alarm from 8 on", []),
    "reference_participation_ratio": ("Participation ratio of the reference", []),
    "reference_effective_rank": ("Effective rank of the reference", []),
    "reference_band_energy": ("Variance of the reference in a band of its directions", ["rank"]),
    "threshold": ("The value of a signal from which it counts as abnormal", ["signal"]),
    "verdict": ("1 for the current verdict, 0 for the others", ["state"]),
    "window_verdict": ("1 for the verdict on a window's rows alone, 0 for the others", ["window", "state"]),
    "snapshot_timestamp_seconds": ("When the gauges were last refreshed, Unix time", []),
}
_OF_A_WINDOW = (
    "effective_rank",
    "rankme",
    "stable_rank",
    "total_variance",
    "mean_cosine",
    "zero_share",
    "wasserstein_uniformity",
)
_COUNTERS: dict[str, tuple[str, list[str]]] = {
    "trace_product": ("Products of consecutive blocks' traces", []),
    "frobenius_product": ("Inner products of consecutive blocks' covariances", []),
    "band_energy": ("Variance in a band of the reference's directions, summed over rows", ["rank"]),
    "rows": ("Rows observed, by what became of them", ["fate"]),
    "monitor_seconds": ("CPU seconds of the monitor's thread", []),
}


class SpectrumCollector(Collector):
    """Yields every `fullrank_*` statistic of each monitor of `source()`, which gives (model, revision, monitor).

    Reads cached snapshots and totals: a scrape computes nothing and waits for nothing. Windows appear as Prometheus
    durations, 300.0 as "5m"; statistics that the rows do not determine as NaN, so that every
    series exists from the start.
    """

    def __init__(self, source: Source) -> None:
        self._source = source

    def describe(self) -> Iterator[Metric]:
        """The families without samples, so that registering collects nothing."""
        yield from _families().values()

    def collect(self) -> Iterator[Metric]:
        """The families with the samples of all monitors."""
        families = _families()
        for model, revision, monitor in self._source():
            for name, labels, value in (*_gauges(monitor.snapshot()), *_counters(monitor)):
                families[name].add_metric([model, revision, *labels], value)
        yield from families.values()


def duration(seconds: float) -> str:
    """300.0 -> "5m", 3600.0 -> "1h", 90.0 -> "90s", 0.5 -> "500ms": the one largest unit that is exact."""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        if seconds >= size and seconds % size == 0:
            return f"{int(seconds // size)}{unit}"
    return f"{round(seconds * 1000)}ms"


def _families() -> dict[str, GaugeMetricFamily | CounterMetricFamily]:
    gauges = {n: GaugeMetricFamily(f"fullrank_{n}", h, labels=_LABELS + extra) for n, (h, extra) in _GAUGES.items()}
    counters = {
        n: CounterMetricFamily(f"fullrank_{n}", h, labels=_LABELS + extra) for n, (h, extra) in _COUNTERS.items()
    }
    for name in ("embedding_norm", "canary_angle_degrees"):
        gauges[name].type = "summary"  # no other type may have a label called quantile
    return {**gauges, **counters}


def _gauges(snapshot: Snapshot) -> Iterator[tuple[str, list[str], float]]:
    for seconds, w in snapshot.windows.items():
        window = duration(seconds)
        for name in _OF_A_WINDOW:
            yield name, [window], getattr(w, name)
        yield "numerical_rank", [window], float("nan") if "numerical_rank" in w.unknown else w.numerical_rank
        yield "window_rows", [window], w.rows
        for rank, eigenvalue in w.eigenvalues_at().items():
            yield "eigenvalue", [window, str(rank)], eigenvalue
        for quantile, norm in w.norms.items():
            yield "embedding_norm", [window, f"{quantile:g}"], norm
        for bound, value in asdict(w.participation_ratio).items():
            yield "participation_ratio", [window, bound], value
        for bound, value in asdict(w.head).items():
            yield "head_energy_ratio", [window, bound], value
        for band in w.bands:
            for bound, value in asdict(band.ratio).items():
                yield "band_energy_ratio", [window, str(band.last), band.part, bound], value
    shortest = snapshot.windows[min(snapshot.windows)]
    nan = float("nan")
    yield "mean_shift_ratio", [], shortest.mean_shift_ratio
    yield "tail_shift", [], shortest.tail_shift
    yield from _canary(snapshot.canary or Canary(nan, nan))
    yield from _sample(shortest.sample)
    yield "input_participation_ratio", [], snapshot.input_participation_ratio
    yield "input_distance", [], snapshot.inputs.distance
    yield "texture_shift", [], snapshot.inputs.texture_shift
    yield "evidence", [], snapshot.evidence.log10
    if snapshot.reference is not None:
        yield "reference_participation_ratio", [], snapshot.reference.participation_ratio
        yield "reference_effective_rank", [], snapshot.reference.effective_rank
        for rank, energy in zip(snapshot.reference.bands, snapshot.reference.band_energy.tolist(), strict=True):
            yield "reference_band_energy", [str(rank)], energy
    for signal, value in snapshot.thresholds.items():
        yield "threshold", [signal], value
    for state in STATES:
        yield "verdict", [state], float(state == snapshot.verdict.state)
        for seconds, verdict in snapshot.window_verdicts.items():
            yield "window_verdict", [duration(seconds), state], float(state == verdict.state)
    yield "snapshot_timestamp_seconds", [], snapshot.timestamp


def _canary(canary: Canary) -> Iterator[tuple[str, list[str], float]]:
    yield "canary_cosine_min", [], canary.cosine_min
    yield "canary_angle_degrees", ["1"], canary.angle_degrees
    yield "canary_angle_degrees", ["0.5"], canary.angle_median_degrees
    yield "canary_neighbours_overlap", [], canary.neighbours_overlap
    yield "canary_distance_correlation", [], canary.distance_correlation
    yield "canary_participation_ratio", [], canary.participation_ratio


def _sample(sample: SampleMeasures) -> Iterator[tuple[str, list[str], float]]:
    nan = float("nan")
    yield "dead_units", [], nan if sample.dead_units is None else sample.dead_units
    yield "saturated_units", [], nan if sample.saturated_units is None else sample.saturated_units
    yield "hubness", [], sample.hubness
    for bound, value in sample.local_dimension._asdict().items():
        yield "local_dimension", [bound], value
    yield "gaussianity", [], sample.gaussianity
    yield "copies_share", [], sample.copies_share
    yield "shared_answers", [], sample.shared_answers
    for bound, value in asdict(sample.input_correlation).items():
        yield "input_correlation", [bound], value
    yield "sample_rows", [], sample.rows


def _counters(monitor: SpectrumMonitor) -> Iterator[tuple[str, list[str], float]]:
    counters = monitor.counters
    yield "trace_product", [], counters.trace_product
    yield "frobenius_product", [], counters.frobenius_product
    yield "monitor_seconds", [], counters.seconds
    for rank, energy in counters.band_energy.items():
        yield "band_energy", [str(rank)], energy
    for fate in FATES:
        yield "rows", [fate], counters.rows[fate]
