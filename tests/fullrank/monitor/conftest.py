"""A monitor with a reference, on a clock that a test moves."""

from collections.abc import Iterator

import pytest

from fullrank import Reference, SpectrumMonitor
from tests.support.monitors import Clock, D, rows_of


@pytest.fixture(scope="session")
def reference() -> Reference:
    return Reference.build(rows_of(4000, 100), rows_of(4000, 101), canary=rows_of(40, 102), calibrate=False)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def monitor(reference: Reference, clock: Clock) -> Iterator[SpectrumMonitor]:
    with SpectrumMonitor(D, reference, clock=clock) as monitor:
        yield monitor
