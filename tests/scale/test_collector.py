"""The collector of a fleet: exact sums and spectra, counters that never fall, and replicas that are named."""

import json
import math
from collections.abc import Iterable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.parser import text_string_to_metric_families

from fullrank import Reference, SpectrumMonitor
from fullrank.moments import Moments
from fullrank.monitor.window import Block
from fullrank.statistics import measure
from scale.collector import Collector
from scale.reports import Report, Watched
from scale.totals import Ledger, Series, Totals, from_json, samples_of, to_json
from service.watching.peers import Families

D = 16


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def rows(count: int, seed: int, scale: Sequence[float] | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([0.8**k for k in range(D)] if scale is None else scale)
    return torch.nn.functional.normalize(torch.randn(count, D, generator=generator) * spread + 0.5, dim=1)


REFERENCE = Reference.build(rows(4096, 1), rows(4096, 2))


def watched(given: torch.Tensor, *, revision: str = "r1", groups: int = 3, whole: bool = True) -> Watched:
    """What a replica reports whose real monitor was shown these rows."""
    with SpectrumMonitor(D, REFERENCE, windows=(300.0, 3600.0), block_rows=64) as monitor:
        monitor.observe(given)
        snapshot = monitor.snapshot(wait=60)
        return Watched(
            "alpha",
            revision,
            "alpha@r1",
            D,
            monitor.windows,
            monitor.blocks(groups),
            snapshot.verdict.state,
            snapshot.verdict.reason,
            monitor.counters.seen,
            True,
            None,
            REFERENCE if whole else None,
        )


def metrics(images: float, *, revision: str = "r1", pending: int = 0, seconds: Iterable[float] = ()) -> list[Metric]:
    """What a replica's registry holds."""
    registry = CollectorRegistry()
    Counter("images", "Images.", registry=registry).inc(images)
    Counter("encoder_images", "Images.", ["model", "revision"], registry=registry).labels("alpha", revision).inc(images)
    Gauge("pending", "Pending.", registry=registry).set(pending)
    histogram = Histogram("took", "Seconds.", buckets=(1.0, 2.0), registry=registry)
    for it in seconds:
        histogram.observe(it)
    return list(registry.collect())


def report(
    replica: str,
    images: float = 0,
    it: Watched | None = None,
    *,
    revision: str = "r1",
    last: bool = False,
    seconds: Iterable[float] = (),
) -> Report:
    held = metrics(images, revision=revision, seconds=seconds)
    return Report(replica, held, [("alpha", revision)], None if it is None else [it], last=last)


def value(collector: Collector, name: str, **labels: str) -> float | None:
    """A sample of the scrape, read as Prometheus reads it."""
    text = generate_latest(Families(collector.metrics())).decode()  # type: ignore[arg-type]
    found = [
        it.value
        for family in text_string_to_metric_families(text)
        for it in family.samples
        if it.name == name and it.labels == labels
    ]
    assert len(found) < 2, f"{name} is there twice"
    return found[0] if found else None


def test_counters_add_up_and_gauges_stay_each_replicas_own() -> None:
    collector = Collector()
    collector.push(Report("one", metrics(3, pending=2, seconds=[0.5, 1.5]), [("alpha", "r1")]))
    collector.push(Report("two", metrics(4, pending=7, seconds=[1.5]), [("alpha", "r1")]))
    assert value(collector, "images_total") == 7
    assert value(collector, "took_bucket", le="1.0") == 1
    assert value(collector, "took_bucket", le="+Inf") == 3
    assert value(collector, "took_sum") == pytest.approx(3.5)
    assert value(collector, "pending", instance="one") == 2
    assert value(collector, "pending", instance="two") == 7
    assert value(collector, "pending") is None


def test_no_counter_falls_when_a_replica_dies_comes_back_or_says_goodbye() -> None:
    clock = Clock()
    collector = Collector(clock)
    collector.push(report("one", 100))
    collector.push(report("two", 50))
    clock.now += 9
    collector.push(report("two", 60))
    clock.now += 9
    assert value(collector, "images_total") == 160  # one is silent for too long and counts all the same
    assert value(collector, "fullrank_fleet_lost_replicas_total") == 1
    assert value(collector, "pending", instance="one") is None
    collector.push(report("one", 110))  # it had only stalled
    assert value(collector, "images_total") == 170
    collector.push(report("three", 1))
    collector.push(report("two", 65, last=True))
    assert value(collector, "images_total") == 176
    assert value(collector, "fullrank_fleet_lost_replicas_total") == 1


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["count", "restart", "die"])), max_size=60))
def test_totals_never_fall(events: list[tuple[str, str]]) -> None:
    totals = Totals()
    counts = dict.fromkeys("abc", 0.1)
    series = ("images", "images_total", ())
    before = 0.0
    counted = 0.0
    for replica, event in events:
        if event == "die":
            totals.retire(replica)
        else:
            now = 0.3 if event == "restart" else counts[replica] + 0.7
            known = counts[replica] > 0.1
            counted += now - counts[replica] if known and now >= counts[replica] else now
            counts[replica] = now
            totals.update(replica, {series: now})
        after = totals.values().get(series, 0.0)
        assert after >= before
        assert after == pytest.approx(counted)
        before = after


def next_after(collector: Collector, clock: Clock, shown: dict[Series, float] | None = None) -> Collector:
    """The collector that takes its place, and knows what was kept of it."""
    kept = Ledger.load(collector.ledger().dump())
    return Collector(clock, kept, from_json(json.loads(json.dumps(to_json(shown or {})))))


def test_a_collector_that_is_started_again_goes_on_with_the_counts_of_replicas_that_are_gone() -> None:
    clock = Clock()
    first = Collector(clock)
    for replica, images in (("one", 100), ("two", 50), ("lost", 7), ("ended", 3)):
        first.push(report(replica, images))
    first.push(report("ended", 4, last=True))
    clock.now += 10
    first.push(report("one", 101))
    clock.now += 10  # lost has been silent for too long, and two as well: it only stalled
    first.push(report("one", 102))
    assert value(first, "images_total") == 102 + 50 + 7 + 4
    second = next_after(first, clock)
    second.push(report("one", 103))
    assert second.awaited() == []
    assert value(second, "images_total") == 103 + 50 + 7 + 4
    assert value(second, "fullrank_fleet_lost_replicas_total") == 2
    second.push(report("two", 60))  # it was not gone
    assert value(second, "images_total") == 103 + 60 + 7 + 4
    third = next_after(second, clock)
    third.push(report("two", 61))
    assert third.awaited() == ["one"]
    assert any("has not heard of one yet" in it for it in third.spectrum(None)["problems"])
    fourth = next_after(third, clock)
    fourth.push(report("two", 61))
    assert fourth.awaited() == ["one"]
    fourth.push(report("one", 104))
    assert fourth.awaited() == []
    assert not fourth.spectrum(None)["problems"]
    assert value(fourth, "images_total") == 104 + 61 + 7 + 4


@pytest.mark.parametrize("survivors", [("one",), ("two",), ()])
def test_replicas_that_end_with_the_collector_are_lost_and_no_counter_falls(survivors: tuple[str, ...]) -> None:
    clock = Clock()
    first = Collector(clock)
    for replica in ("one", "two"):
        first.push(report(replica, 40, seconds=(0.5,)))
    first.metrics()
    shown = dict(first.shown())
    assert shown["images", "images_total", ()] == 80
    second = next_after(first, clock, shown)
    for replica in survivors:
        second.push(report(replica, 50, seconds=(0.5,)))
    assert second.awaited() == sorted({"one", "two"} - {*survivors})
    clock.now += 14
    for replica in survivors:
        second.push(report(replica, 50, seconds=(0.5,)))
    assert len(second.awaited()) == 2 - len(survivors)
    clock.now += 2
    second.push(report("new", 1, seconds=(0.5,)))
    assert second.awaited() == []
    assert value(second, "images_total") == 80  # what the last scrape showed counts as gone
    assert value(second, "took_count") == 2
    assert value(second, "fullrank_fleet_lost_replicas_total") == 2 - len(survivors)
    second.push(report("new", 101))
    assert value(second, "images_total") == 180  # and the sum does not wait for the others to catch up
    third = next_after(second, clock, dict(second.shown()))
    for replica in survivors:
        third.push(report(replica, 50))
    third.push(report("new", 103))
    assert value(third, "images_total") == 182


@given(
    st.lists(st.tuples(st.sampled_from("abcdefgh"), st.sampled_from(["count", "end", "collector"])), max_size=60),
)
def test_totals_stay_exact_over_many_collectors(events: list[tuple[str, str]]) -> None:
    clock = Clock()
    collector = Collector(clock)
    counts = dict[str, float]()
    ended = set[str]()
    for replica, event in events:
        if event == "collector":
            collector = next_after(collector, clock, dict(collector.shown()))
            for name in sorted(counts.keys() - ended, reverse=replica > "d"):
                collector.push(report(name, counts[name]))
        elif replica not in ended:
            counts[replica] = counts.get(replica, 0) + 1
            collector.push(report(replica, counts[replica], last=event == "end"))
            if event == "end":
                ended.add(replica)
        assert collector.awaited() == []
        if counts.keys() - ended:  # otherwise nobody says which families there are
            assert samples_of(collector.metrics())["images", "images_total", ()] == sum(counts.values())


def test_what_only_a_replica_that_is_awaited_serves_is_not_forgotten() -> None:
    clock = Clock()
    first = Collector(clock)
    first.push(report("one", 10))
    first.push(report("gone", 5, last=True))
    first.push(report("two", 7, revision="r2"))
    second = next_after(first, clock)
    second.push(report("two", 7, revision="r2"))
    second.push(report("one", 11))
    assert value(second, "encoder_images_total", model="alpha", revision="r1") == 16
    assert value(second, "encoder_images_total", model="alpha", revision="r2") == 7


def test_a_series_of_a_replica_that_ended_with_the_collector_stays() -> None:
    clock = Clock()
    first = Collector(clock)
    first.push(Report("one", metrics(1), [("alpha", "r1")]))
    only = CounterMetricFamily("answers", "Answers.", labels=["route"])
    only.add_metric(["/other"], 5)
    first.push(Report("two", [*metrics(1), only], [("alpha", "r1")]))
    first.metrics()
    second = next_after(first, clock, dict(first.shown()))
    clock.now += 16
    mine = CounterMetricFamily("answers", "Answers.", labels=["route"])
    mine.add_metric(["/embed"], 1)
    second.push(Report("one", [*metrics(1), mine], [("alpha", "r1")]))
    assert value(second, "answers_total", route="/other") == 5
    assert value(second, "answers_total", route="/embed") == 1


def test_a_revision_that_nobody_serves_any_more_ends_for_all_at_once() -> None:
    collector = Collector()
    collector.push(report("one", 100))
    collector.push(report("two", 50))
    collector.push(report("one", 0, revision="r2"))  # it swapped, and its registry has no series of r1 any more
    assert value(collector, "encoder_images_total", model="alpha", revision="r1") == 150
    collector.push(report("two", 0, revision="r2"))
    assert value(collector, "encoder_images_total", model="alpha", revision="r1") is None
    assert value(collector, "encoder_images_total", model="alpha", revision="r2") == 0


@pytest.mark.parametrize("replicas", [1, 2, 5])
def test_the_fleets_figures_are_those_of_one_monitor_that_saw_all_rows(replicas: int) -> None:
    collector = Collector()
    each = [rows(1024, 10 + k) for k in range(replicas)]
    groups = collector.wanted().groups
    for k, it in enumerate(each):
        groups = collector.push(report(f"r{k}", it=watched(it, groups=groups))).groups
    collector.measure()
    window = collector.spectrum(None)["fleets"][0]["windows"]["300"]
    exact = Moments(D).add(torch.cat(each))
    assert window["rows"] == 1024 * replicas
    assert window["effective_rank"] == pytest.approx(exact.effective_rank(), rel=1e-7)
    assert window["participation_ratio"]["estimate"] == pytest.approx(exact.participation_ratio(), rel=1e-7)
    expected = np.linalg.eigvalsh(np.cov(torch.cat(each).double().numpy().T))[::-1]
    np.testing.assert_allclose(window["eigenvalues"], expected, atol=1e-9)
    assert value(collector, "fullrank_fleet_window_rows", model="alpha", revision="r1", window="5m") == 1024 * replicas
    assert value(collector, "fullrank_fleet_verdict", model="alpha", revision="r1", state="healthy") == 1


def test_a_replica_that_collapses_alone_is_named() -> None:
    collector = Collector()
    broken = rows(1024, 5, [0.8**k if k < 2 else 0.0 for k in range(D)])
    for k in range(3):
        collector.push(report(f"r{k}", it=watched(rows(1024, 20 + k) if k else broken)))
    collector.measure()
    (problem,) = collector.spectrum(None)["problems"]
    assert problem.startswith("r0 stands out alone among 3 replicas of alpha@r1: ")
    assert value(collector, "fullrank_fleet_outlier", instance="r0", model="alpha", revision="r1") == 1
    assert value(collector, "fullrank_fleet_outlier", instance="r1", model="alpha", revision="r1") == 0
    states = {it["instance"]: it["verdict"]["state"] for it in collector.spectrum(None)["replicas"]}
    assert states["r0"] == "dimensional_collapse"
    assert states["r1"] == states["r2"] == "healthy"


def test_two_revisions_are_said_and_not_averaged() -> None:
    collector = Collector()
    collector.push(report("one", 1, watched(rows(1024, 1))))
    collector.push(report("two", 1, watched(rows(512, 2), revision="r2"), revision="r2"))
    collector.measure()
    found = collector.spectrum(None)
    assert {it["revision"]: it["windows"]["300"]["rows"] for it in found["fleets"]} == {"r1": 1024, "r2": 512}
    assert any("2 revisions" in it and "r1 on one" in it and "r2 on two" in it for it in found["problems"])
    assert value(collector, "fullrank_fleet_revisions", model="alpha") == 2


def test_monitors_that_cannot_merge_are_left_out_and_named() -> None:
    collector = Collector()
    one = watched(rows(512, 1))
    other = Watched("alpha", "r1", "", 8, (60.0,), [], "insufficient_data", "", 0)
    collector.push(report("one", it=one))
    collector.push(report("two", it=other))
    collector.measure()
    assert any(
        it.startswith("two is left out of alpha@r1: it has 8 dimensions") for it in collector.spectrum(None)["problems"]
    )
    assert collector.spectrum("alpha")["fleets"][0]["replicas"] == 1
    assert collector.spectrum("beta")["fleets"] == []


def test_it_asks_for_references_once_and_for_groups_by_the_number_of_replicas_that_have_rows() -> None:
    collector = Collector()
    wanted = collector.push(report("one", it=watched(rows(512, 1), whole=False)))
    assert wanted.references == {("alpha", "r1")}
    assert wanted.groups == 3
    assert collector.push(report("one", it=watched(rows(512, 1)))).references == frozenset()
    collector.push(report("two", it=watched(rows(512, 2))))
    assert collector.push(report("three")).groups == 2
    assert collector.push(report("three", it=watched(rows(512, 3)))).groups == 1


def test_orders_reach_replicas_that_start_later_and_survive_the_collector() -> None:
    collector = Collector()
    collector.push(report("one"))
    order = collector.order("beta", "enforce", None)
    assert collector.progress(order.number) == (["one"], {})
    wanted = collector.push(Report("late", metrics(0), [("alpha", "r1")]))
    assert wanted.orders == (order,)
    collector.push(Report("one", metrics(0), [("alpha", "r1")], orders=wanted.orders, done=1))
    collector.push(Report("late", metrics(0), [("alpha", "r1")], done=1, failed={1: "collapsed"}))
    assert collector.progress(order.number) == ([], {"late": "collapsed"})
    restarted = Collector()
    restarted.push(Report("one", metrics(0), [("alpha", "r1")], orders=wanted.orders, done=1))
    assert restarted.wanted().orders == (order,)
    assert restarted.order("gamma", "warn", None).number == 2


def test_an_update_to_other_settings_starts_without_the_orders_of_the_old_ones() -> None:
    collector = Collector()

    def push(replica: str, settings: str, *, last: bool = False) -> int:
        report = Report(replica, metrics(5), [("alpha", "r1")], started_with=settings, last=last)
        return len(collector.push(report).orders)

    push("old", "a")
    order = collector.order("beta", "enforce", None, "a")
    assert push("new", "b") == 0
    assert push("old", "a") == 1
    assert collector.progress(order.number, "a") == (["old"], {})  # the other one has no such order
    assert push("old", "a", last=True) == 1
    # The replica that takes the place of the last one, with the same settings, makes the same swap.
    assert push("older", "a") == 1
    assert push("older", "a", last=True) == 1
    assert push("new", "b") == 0
    assert push("again", "a") == 0
    assert value(collector, "images_total") == 20


def test_each_replica_says_after_how_long_it_counts_as_gone() -> None:
    clock = Clock()
    collector = Collector(clock)
    collector.push(Report("fast", metrics(0), [("alpha", "r1")], silent=15))
    collector.push(Report("slow", metrics(0), [("alpha", "r1")], silent=300))
    clock.now += 299
    assert value(collector, "pending", instance="fast") is None
    assert value(collector, "pending", instance="slow") == 0
    clock.now += 2
    assert value(collector, "pending", instance="slow") is None


def test_measuring_rests_and_happens_only_for_news() -> None:
    clock = Clock()
    collector = Collector(clock=clock)
    assert not collector.due()
    collector.push(report("one", it=watched(rows(512, 1))))
    assert collector.due()
    collector.measure()
    clock.now += 1e6
    collector.push(report("one"))
    collector.measure()
    collector.push(report("one"))  # metrics alone are no news
    clock.now += 10
    assert not collector.due()


@pytest.mark.parametrize("groups", [1, 2, 3, 100])
def test_joined_blocks_hold_the_same_rows_and_leave_the_monitors_own_alone(groups: int) -> None:
    clock = Clock()
    with SpectrumMonitor(D, REFERENCE, (10.0, 100.0), 32, clock) as monitor:
        for k in range(12):
            monitor.observe(rows(32, k), inputs=rows(32, 50 + k)[:, :3])
            monitor.flush()
            clock.now += 4
        before = monitor.moments(100.0)
        blocks = monitor.blocks(groups)
        assert len(blocks) <= 2 * groups
        for seconds in monitor.windows:
            _same(blocks, seconds, monitor)
        described = [it.inputs for it in blocks if it.inputs is not None]
        assert sum(it.count for it in described) == sum(it.moments.count for it in blocks)
        blocks[0].moments.add(rows(5, 0))
        described[0].add(rows(5, 0)[:, :3])
        torch.testing.assert_close(monitor.moments(100.0).scatter, before.scatter, rtol=0, atol=0)
        assert sum(it.inputs.count for it in monitor.blocks(groups) if it.inputs) == before.count


def _same(blocks: list[Block], seconds: float, monitor: SpectrumMonitor) -> None:
    mine = measure(seconds, [it for it in blocks if it.start <= seconds], REFERENCE, D)
    exact = monitor.moments(seconds)
    assert mine.rows == exact.count
    assert mine.total_variance == pytest.approx(float(exact.covariance().trace()), rel=1e-12)
    assert math.isclose(mine.participation_ratio.estimate, exact.participation_ratio(), rel_tol=1e-9)
