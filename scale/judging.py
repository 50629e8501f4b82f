"""Judges what replicas of one encoder report: their rows together, by the functions that each uses for its own."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from fullrank import Reference
from fullrank.canary import Canary
from fullrank.exposition import duration
from fullrank.fleet import Replica, Survey
from fullrank.moments import Moments, merge
from fullrank.monitor.window import inputs_of
from fullrank.rules import STATES
from fullrank.statistics import WindowStatistics, measure
from fullrank.verdict import Verdict, diagnose
from scale.reports import Encoder, Watched


@dataclass(frozen=True)
class Judged:
    """The rows of all replicas of one encoder together: their statistics in each window, and the verdict on them."""

    model: str
    revision: str
    replicas: int
    windows: dict[float, WindowStatistics]
    verdict: Verdict


@dataclass(frozen=True)
class Measured:
    """Everything that moments say: a verdict for each encoder, and which replicas stand out."""

    fleets: list[Judged]
    survey: Survey
    outliers: set[tuple[str, Encoder]]


def judge(members: Sequence[Watched], reference: Reference | None) -> Judged:
    """The verdict on the rows of replicas of one encoder, by the functions that each replica uses for its own."""
    first = members[0]
    windows: dict[float, WindowStatistics] = {}
    inputs = {}
    for seconds in first.windows:
        blocks = [block for it in members for block in it.blocks if block.start <= seconds]
        windows[seconds] = measure(seconds, blocks, reference, first.dimension)
        if reference is not None and reference.inputs is not None:
            inputs[seconds] = reference.inputs.read(inputs_of(blocks))
    canary = _best([it.canary for it in members if it.canary is not None])
    verdict = diagnose(windows, reference, canary, inputs, canary_is_recent=canary is not None)
    return Judged(first.model, first.revision, len(members), windows, verdict)


def _best(canaries: Sequence[Canary]) -> Canary | None:
    """The canary nearest to its reference: a fault of one replica is that replica's, and no fault of the encoder."""
    return max(canaries, key=lambda it: -2.0 if math.isnan(it.cosine_min) else it.cosine_min, default=None)


def replica_of(name: str, it: Watched) -> Replica:
    """A monitor's report as `fullrank.fleet.survey` takes it."""
    moments = merge([Moments(it.dimension), *(block.moments for block in it.blocks)])
    window = f"{max(it.windows):g}"
    return Replica(name, it.model, it.revision, window, moments, it.verdict, it.reason, it.seen)


def figures(fleet: Judged) -> Iterator[tuple[str, list[str], float]]:
    """The metrics of a fleet: name, values of the labels after model and revision, and value."""
    yield "replicas", [], fleet.replicas
    for state in STATES:
        yield "verdict", [state], float(state == fleet.verdict.state)
    for seconds, it in fleet.windows.items():
        window = [duration(seconds)]
        yield "window_rows", window, it.rows
        yield "effective_rank", window, it.effective_rank
        yield "total_variance", window, it.total_variance
        bounds: Mapping[str, float] = asdict(it.participation_ratio)
        for bound, value in bounds.items():
            yield "participation_ratio", [*window, bound], value
