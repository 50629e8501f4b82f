"""The collector of a fleet: exact spectra, orders for all, and replicas that are named."""

import math

import numpy as np
import pytest
import torch

from fullrank import SpectrumMonitor
from fullrank.moments import Moments
from fullrank.monitor.window import Block
from fullrank.statistics import measure
from scale.collector import Collector
from scale.reports import Report, Watched
from tests.support.collectors import REFERENCE, Clock, D, metrics, report, rows, value, watched


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
