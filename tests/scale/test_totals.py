"""A fleet's counters never fall and stay exact, whoever dies, comes back or starts again."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.core import CounterMetricFamily

from scale.collector import Collector
from scale.reports import Report
from scale.totals import Ledger, Series, Totals, from_json, samples_of, to_json
from tests.support.collectors import Clock, metrics, report, value


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
