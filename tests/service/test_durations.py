"""A histogram of ours reads as prometheus_client's own would."""

import math
import re

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from service.durations import Durations
from service.metrics import SECONDS

OBSERVED = [0.0, 0.0003, 0.001, 0.00100001, 0.02, 0.25, 0.3, 29.9, 30.0, 31.0, 1e9]


def text(registry: CollectorRegistry) -> str:
    return re.sub(r"(_created.* )\S+", r"\1then", generate_latest(registry).decode())


def test_it_is_exposed_as_the_librarys() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    durations = Durations("things_seconds", "Of things.", "kind", SECONDS, ours)
    histogram = Histogram("things_seconds", "Of things.", ["kind"], buckets=SECONDS, registry=theirs)
    for kind in ("a", "b", 'with "quotes"'):
        durations.labels(kind)
        histogram.labels(kind)
    assert text(ours) == text(theirs)
    for index, seconds in enumerate(OBSERVED):
        durations.labels("ab"[index % 2]).observe(seconds)
        histogram.labels("ab"[index % 2]).observe(seconds)
    assert text(ours) == text(theirs)


def test_buckets_are_cumulative() -> None:
    series = Durations("things_seconds", "Of things.", "kind", (0.1, 1.0), CollectorRegistry()).labels("a")
    for seconds in (0.05, 0.1, 0.5, 7.0):
        series.observe(seconds)
    assert series.buckets() == {0.1: 2, 1.0: 3, math.inf: 4}
    assert series.total == pytest.approx(7.65)


def test_a_name_is_taken_once() -> None:
    registry = CollectorRegistry()
    Durations("things_seconds", "Of things.", "kind", SECONDS, registry)
    with pytest.raises(ValueError, match="things_seconds"):
        Histogram("things_seconds", "Of things.", registry=registry)
