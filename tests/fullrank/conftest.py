"""The simulated encoder of the tests of verdicts, and its reference."""

import pytest

from fullrank import Reference
from tests.support.simulated import World


@pytest.fixture(scope="module")
def world():
    return World()


@pytest.fixture(scope="module")
def reference(world):
    return Reference.build(world.rows(8000, 1), world.rows(8000, 2), canary=world.rows(48, 3), calibrate=False)
