"""Totals of counters over replicas that come and go: they never fall, also if another collector goes on with them."""

import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from prometheus_client import Metric

Series = tuple[str, str, tuple[tuple[str, str], ...]]  # family, sample, labels
REMEMBERED = 256  # replicas that are gone and might come back
NAMED = 4  # of them, those whose counts a ledger keeps apart
ADDITIVE = ("counter", "histogram")


def samples_of(families: Iterable[Metric]) -> dict[Series, float]:
    """The samples of counters and histograms. The times at which they were created do not add up and are left out."""
    return {
        (family.name, sample.name, tuple(sorted(sample.labels.items()))): float(sample.value)
        for family in families
        if family.type in ADDITIVE
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def encoders_of(samples: Iterable[Series]) -> set[tuple[str, str]]:
    """Model and revision of each series that has a revision."""
    labelled = (dict(labels) for _, _, labels in samples)
    return {(labels.get("model", ""), labels["revision"]) for labels in labelled if "revision" in labels}


def to_json(values: Mapping[Series, float]) -> list[Any]:
    """Series as JSON holds them; floats keep every digit."""
    return [[*series, value] for series, value in values.items()]


def from_json(held: list[Any]) -> dict[Series, float]:
    """What `to_json` was given."""
    return {(family, name, tuple((k, v) for k, v in labels)): value for family, name, labels, value in held}


@dataclass(frozen=True)
class Ledger:
    """What a collector knows of replicas that will not report again, for the one that takes its place.

    gone: counts of the last replicas that are gone. past: sums over those before. lost: replicas that are gone without
    a last report. alive: replicas that report, and the seconds of silence after which each counts as gone.
    """

    gone: Mapping[str, Mapping[Series, float]]
    past: Mapping[Series, float]
    lost: int
    alive: Mapping[str, float]

    def dump(self) -> bytes:
        """Itself as JSON."""
        gone = {name: to_json(counts) for name, counts in self.gone.items()}
        return json.dumps(asdict(self) | {"gone": gone, "past": to_json(self.past)}).encode()

    @classmethod
    def load(cls, content: bytes) -> Self:
        """What `dump` gave."""
        held = json.loads(content)
        gone = {name: from_json(counts) for name, counts in held["gone"].items()}
        return cls(gone, from_json(held["past"]), held["lost"], held["alive"])


class Rising:
    """One replica's counters. A series that starts again from zero, or is gone, keeps what it had."""

    def __init__(self) -> None:
        self._before: dict[Series, float] = {}
        self._now: dict[Series, float] = {}

    def update(self, samples: Mapping[Series, float]) -> None:
        """Take the replica's latest samples."""
        for series, value in samples.items():
            if value < (known := self._now.get(series, 0.0)):
                self._before[series] = self._before.get(series, 0.0) + known
            self._now[series] = value

    def values(self) -> dict[Series, float]:
        """What each series counted in all."""
        return {series: value + self._before.get(series, 0.0) for series, value in self._now.items()}

    def forget(self, unwanted: Callable[[Series], bool]) -> None:
        """Drop series."""
        self._before, self._now = (
            {series: value for series, value in held.items() if not unwanted(series)}
            for held in (self._before, self._now)
        )


class Totals:
    """Sums of counters over the replicas that report, and over those that did."""

    def __init__(self, shown: Mapping[Series, float] | None = None) -> None:
        """shown: what `values` said last in another collector."""
        self._live: dict[str, Rising] = {}
        self._gone: OrderedDict[str, Rising] = OrderedDict()
        self._folded: dict[Series, float] = {}
        self.shown = dict(shown or {})  # by the last call of `values`
        self._inherited: dict[str, Mapping[Series, float]] = {}
        self._past: Mapping[Series, float] = {}

    def update(self, replica: str, samples: Mapping[Series, float]) -> None:
        """Take a replica's latest samples. One that was taken for gone goes on where it was."""
        if replica not in self._live:
            self._live[replica] = self._gone.pop(replica) if replica in self._gone else Rising()
        self._live[replica].update(samples)

    def retire(self, replica: str) -> None:
        """Keep the counts of a replica that is gone."""
        if (rising := self._live.pop(replica, None)) is not None:
            self._gone[replica] = rising
        while len(self._gone) > REMEMBERED:
            _, oldest = self._gone.popitem(last=False)
            _add(self._folded, oldest.values())

    def values(self) -> dict[Series, float]:
        """Each series' sum, which is never below what it was at the last call.

        What is missing was counted by a replica that ended together with the collector, and counts as gone. It may also
        be the rounding of floats that are added in another order: Prometheus would take it for a restart from zero.
        """
        sums = dict(self._past)
        _add(sums, self._folded)
        for inherited in self._still_inherited().values():
            _add(sums, inherited)
        for rising in [*self._gone.values(), *self._live.values()]:
            _add(sums, rising.values())
        lacking = {series: shown - sums.get(series, 0.0) for series, shown in self.shown.items()}
        missing = {series: value for series, value in lacking.items() if value > 0}
        _add(self._folded, missing)
        _add(sums, missing)
        self.shown = {series: max(value, self.shown.get(series, value)) for series, value in sums.items()}
        return self.shown

    def gone(self) -> tuple[dict[str, Mapping[Series, float]], dict[Series, float]]:
        """Counts of replicas that are gone: of the last NAMED by name, and the sums over all before."""
        found = self._still_inherited() | {name: rising.values() for name, rising in self._gone.items()}
        past = dict(self._past)
        _add(past, self._folded)
        for name in list(found)[:-NAMED]:
            _add(past, found.pop(name))
        return found, past

    def inherit(self, gone: Mapping[str, Mapping[Series, float]], past: Mapping[Series, float]) -> None:
        """Go on with what another collector's `gone` said."""
        self._inherited = dict(gone)
        self._past = dict(past)

    def _still_inherited(self) -> dict[str, Mapping[Series, float]]:
        """Without those that have come back since."""
        return {name: it for name, it in self._inherited.items() if name not in self._live and name not in self._gone}

    def forget(self, unwanted: Callable[[Series], bool]) -> None:
        """Drop series: those of encoders that no replica serves any more, for all of their replicas at once."""
        for rising in [*self._gone.values(), *self._live.values()]:
            rising.forget(unwanted)

        def left(values: Mapping[Series, float]) -> dict[Series, float]:
            return {series: value for series, value in values.items() if not unwanted(series)}

        self.shown = left(self.shown)
        self._folded = left(self._folded)
        self._past = left(self._past)
        self._inherited = {name: left(it) for name, it in self._inherited.items()}


def _add(sums: dict[Series, float], values: Mapping[Series, float]) -> None:
    for series, value in values.items():
        sums[series] = sums.get(series, 0.0) + value
