"""The collector of a fleet: merges what replicas report into one scrape and one verdict. Plain Python, without Ray."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from fullrank import Reference
from fullrank.fleet import Survey, survey
from fullrank.monitor.snapshot import to_json
from scale.judging import Measured, figures, judge, replica_of
from scale.reports import Encoder, Order, Report, Wanted, Watched, not_heard_of
from scale.totals import ADDITIVE, Ledger, Series, Totals, encoders_of, samples_of

GROUPS = 3  # groups of rows that bounds need; two replicas with rows send more than one each
REST = 20.0  # measuring takes at most one part in so many of a core


class Collector:
    """Keeps the latest report of each replica. For one thread, except `measure`, which may run on another.

    clock: seconds. ledger, shown: what the collector before this one knew, and showed in its last scrape. Orders hold
    among replicas that started with the same settings: an update to others serves what these say.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        ledger: Ledger | None = None,
        shown: Mapping[Series, float] | None = None,
    ) -> None:
        self._clock = clock
        self._reports: dict[str, tuple[Report, float]] = {}
        self._references: dict[Encoder, Reference] = {}
        self._named: set[Encoder] = set()  # in the labels of totals
        self._totals = Totals(shown)
        self._orders: dict[str, tuple[Order, ...]] = {}
        self._lost = 0
        self._awaited: dict[str, tuple[float, float]] = {}  # seconds of silence, and until when
        self.version = 0  # rises with each change of the ledger
        if ledger is not None:
            self._totals.inherit(ledger.gone, ledger.past)
            self._named = encoders_of([series for it in (*ledger.gone.values(), ledger.past) for series in it])
            self._lost = ledger.lost
            self._awaited = {name: (silent, clock() + silent) for name, silent in ledger.alive.items()}
        self._measured = Measured([], Survey([], {}, []), set())
        self._changed = False
        self._rested = -math.inf

    # ---- reports

    def push(self, report: Report) -> Wanted:
        """Take a replica's report. The answer says what it has to do, and what to send next."""
        self._expire()
        before = self._reports.get(report.replica)
        if before is None:
            self.version += 1
            self._awaited.pop(report.replica, None)
        if report.watched is None and before is not None:
            report = replace(report, watched=before[0].watched)
        else:
            self._changed = True
        for it in report.watched or ():
            if it.reference is not None:
                self._references[it.encoder] = it.reference
        self._reports[report.replica] = report, self._clock()
        samples = samples_of(report.metrics)
        self._totals.update(report.replica, samples)
        self._named |= encoders_of(samples)
        self._forget()
        settings = report.started_with
        live = {it.started_with for it in self.reports()}
        self._orders = {held: orders for held, orders in self._orders.items() if held in live}
        self._orders[settings] = max(self._orders.get(settings, ()), report.orders, key=len)
        if report.last:
            self._retire(report.replica)
        return self.wanted(settings)

    # ---- the collector before and after this one

    def ledger(self) -> Ledger:
        """What the collector that takes the place of this one has to know."""
        gone, past = self._totals.gone()
        awaited = {name: silent for name, (silent, _) in self._awaited.items()}
        return Ledger(gone, past, self._lost, awaited | {it.replica: it.silent for it in self.reports()})

    def shown(self) -> Mapping[Series, float]:
        """Counters of the last scrape."""
        return self._totals.shown

    def awaited(self) -> list[str]:
        """Replicas that reported to the collector before this one, and to this one not yet: sums lack theirs."""
        self._expire()
        return sorted(self._awaited)

    # ---- what replicas are told

    def wanted(self, started_with: str = "") -> Wanted:
        """What a replica with these settings has to do and to send."""
        referenced = {it.encoder for report in self.reports() for it in report.watched or () if it.referenced}
        missing = frozenset(referenced - self._references.keys())
        fewest = min(self._with_rows().values(), default=1)
        return Wanted(self._orders.get(started_with, ()), math.ceil(GROUPS / fewest), missing)

    def _with_rows(self) -> Counter[Encoder]:
        """How many replicas have rows of each encoder in the shortest window. The others send no group at all."""
        return Counter(
            it.encoder
            for report in self.reports()
            for it in report.watched or ()
            if any(block.start <= min(it.windows) for block in it.blocks)
        )

    def reports(self) -> list[Report]:
        """The latest report of each replica that is not gone."""
        return [report for report, _ in list(self._reports.values())]

    def _expire(self) -> None:
        for name in [name for name, (it, at) in self._reports.items() if self._clock() - at > it.silent]:
            self._lost += 1
            self._retire(name)
        for name in [name for name, (_, until) in self._awaited.items() if self._clock() > until]:
            self._lost += 1
            self.version += 1
            del self._awaited[name]

    def _retire(self, replica: str) -> None:
        self.version += 1
        del self._reports[replica]
        self._totals.retire(replica)
        self._changed = True

    def _forget(self) -> None:
        """Drop the counters and references of encoders that nobody serves any more."""
        served = {encoder for report in self.reports() for encoder in report.serving}
        watched = {it.encoder for report in self.reports() for it in report.watched or ()}
        self._references = {encoder: it for encoder, it in self._references.items() if encoder in served | watched}

        if served and not self._awaited and self._named - served:  # who knows what awaited ones serve
            self._totals.forget(lambda series: bool(encoders_of([series]) - served))
            self._named &= served

    # ---- orders

    def order(self, name: str, gate: str, replaces: str | None, started_with: str = "") -> Order:
        """Have every replica with these settings make a swap, also those that start later."""
        known = self._orders.get(started_with, ())
        order = Order(len(known) + 1, name, gate, replaces)
        self._orders[started_with] = (*known, order)
        return order

    def progress(self, number: int, started_with: str = "") -> tuple[list[str], dict[str, str]]:
        """The replicas that have not got to this order yet, and those that failed at it with the reason."""
        self._expire()
        found = [it for it in self.reports() if it.started_with == started_with]
        waiting = [it.replica for it in found if it.done < number]
        return waiting, {it.replica: it.failed[number] for it in found if number in it.failed}

    # ---- what moments say

    def due(self) -> bool:
        """Whether `measure` has something to do. It rests between two calls, because eigenvalues are expensive."""
        self._expire()
        return self._changed and self._clock() >= self._rested

    def measure(self) -> None:
        """Merge and judge the replicas' rows."""
        started = time.monotonic()
        self._changed = False
        members: dict[Encoder, list[tuple[str, Watched]]] = {}
        apart = []
        for report in self.reports():
            for it in report.watched or ():
                like = members.setdefault(it.encoder, [])
                if like and it.kind != like[0][1].kind:
                    apart.append(f"{report.replica} is left out of {it.model}@{it.revision}: it has {it.kind_in_words}")
                else:
                    like.append((report.replica, it))
        fleets = [judge([it for _, it in found], self._references.get(encoder)) for encoder, found in members.items()]
        found = survey([replica_of(name, it) for each in members.values() for name, it in each], ranked=False)
        found.problems.extend(apart)
        outliers = {
            (it.url, (group.model, group.revision)) for group in found.groups for it in group.members if it.stands_out
        }
        self._measured = Measured(fleets, found, outliers)
        self._rested = self._clock() + REST * (time.monotonic() - started)

    def spectrum(self, model: str | None) -> dict[str, Any]:
        """JSON-able: every replica's verdict, the fleet's for each encoder, and in words what is wrong with whom.

        model: leave out the others.
        """
        found = self._measured
        fleets = []
        for it in found.fleets:
            windows = {
                f"{seconds:g}": {
                    "rows": window.rows,
                    "effective_rank": window.effective_rank,
                    "participation_ratio": asdict(window.participation_ratio),
                    "total_variance": window.total_variance,
                    "eigenvalues": window.eigenvalues.tolist(),
                }
                for seconds, window in it.windows.items()
            }
            identity = {"model": it.model, "revision": it.revision, "replicas": it.replicas}
            fleets.append(identity | {"verdict": asdict(it.verdict), "windows": windows})
        replicas = [
            {
                "instance": report.replica,
                "model": it.model,
                "revision": it.revision,
                "verdict": {"state": it.verdict, "reason": it.reason},
                "seconds_ago": self._clock() - at,
            }
            for report, at in self._reports.values()
            for it in report.watched or ()
        ]
        if model is not None:
            fleets, replicas = ([it for it in some if it["model"] == model] for some in (fleets, replicas))
        problems = [*found.survey.problems]
        if awaited := self.awaited():
            problems.append(not_heard_of(awaited))
        value = {"fleets": fleets, "replicas": replicas, "problems": problems}
        json_able: dict[str, Any] = to_json(value)
        return json_able

    # ---- metrics

    def metrics(self) -> list[Metric]:
        """One scrape of the fleet.

        Counters and histograms are sums over all replicas, also those that are gone, and have no label `instance`.
        Everything else is each replica's own, with its name in `instance`. fullrank_fleet_* is on all together.
        """
        self._expire()
        families: dict[str, Metric] = {}
        for report in self.reports():
            for family in report.metrics:
                mine = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples if family.type not in ADDITIVE else ():
                    mine.samples.append(sample._replace(labels={**sample.labels, "instance": report.replica}))
        for (name, sample_name, labels), value in self._totals.values().items():
            if name in families:
                families[name].add_sample(sample_name, dict(labels), value)
        return [*families.values(), *self._fleet_metrics()]

    def _fleet_metrics(self) -> Iterator[Metric]:
        encoder = ["model", "revision"]
        gauges = {
            name: GaugeMetricFamily(f"fullrank_fleet_{name}", text, labels=labels)
            for name, text, labels in (
                ("replicas", "Replicas that report", encoder),
                ("revisions", "Revisions that the replicas serve under one name; they are never averaged", ["model"]),
                ("verdict", "1 for the verdict on all replicas' rows together, 0 for the others", [*encoder, "state"]),
                ("window_rows", "Rows that the windows of all replicas hold", [*encoder, "window"]),
                ("effective_rank", "Effective rank of all replicas' rows together", [*encoder, "window"]),
                ("participation_ratio", "Participation ratio of all replicas' rows", [*encoder, "window", "bound"]),
                ("total_variance", "Total variance of all replicas' rows together", [*encoder, "window"]),
                ("outlier", "1 for a replica that stands out among the others", ["instance", *encoder]),
                ("report_age_seconds", "Seconds since a replica's last report", ["instance"]),
            )
        }
        for report, at in self._reports.values():
            gauges["report_age_seconds"].add_metric([report.replica], self._clock() - at)
            for it in report.watched or ():
                odd = (report.replica, it.encoder) in self._measured.outliers
                gauges["outlier"].add_metric([report.replica, *it.encoder], float(odd))
        revisions: dict[str, set[str]] = {}
        for model, revision in {encoder for report in self.reports() for encoder in report.serving}:
            revisions.setdefault(model, set()).add(revision)
        for model, held in revisions.items():
            gauges["revisions"].add_metric([model], len(held))
        for fleet in self._measured.fleets:
            for name, labels, value in figures(fleet):
                gauges[name].add_metric([fleet.model, fleet.revision, *labels], value)
        yield from gauges.values()
        lost = "Replicas that ended without a last report"
        yield CounterMetricFamily("fullrank_fleet_lost_replicas", lost, value=self._lost)
