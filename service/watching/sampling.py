"""Which of many images are watched: as many of every moment's as a fixed rate allows, at random."""

import math
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray


class Sample:
    """Chooses among images so that watching them costs no more than so many a second, however many come.

    rate: images a second in the long run, infinite for all; burst: images at once after a quiet time. While no more
    come, all are chosen; of more that come together, each has the same chance. One thread at a time.
    """

    def __init__(self, rate: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self._allowance, self._then = float(burst), clock()
        self._random = np.random.default_rng()

    def choose(self, count: int) -> NDArray[np.intp] | None:
        """Indices of the chosen among `count` images that come together; None for all of them."""
        if math.isinf(self._rate):
            return None
        now = self._clock()
        self._allowance = min(self._burst, self._allowance + (now - self._then) * self._rate)
        self._then = now
        chosen = min(count, int(self._allowance))
        self._allowance -= chosen
        return None if chosen == count else self._random.permutation(count)[:chosen]
