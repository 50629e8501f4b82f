"""Token-bucket sampling of images for the monitor, which spends no token on copies of what it has seen."""

import math
import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fullrank.monitor.window import RecentKeys


class Sample:
    """Chooses among images so that watching them costs no more than so many a second, however many come.

    rate: images a second in the long run, infinite for all; burst: images at once after a quiet time; horizon: seconds
    within which a second image of the same content is a copy. While no more come, all are chosen; of more that come
    together, each has the same chance. Copies are left out first: else a client that repeats one picture would crowd
    out all others, and nothing could be said of the encoder. One thread at a time.
    """

    def __init__(
        self, rate: float, burst: int, horizon: float = 300.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate = rate
        self._burst = burst
        self._clock = clock
        self._allowance = float(burst)
        self._then = clock()
        self._random = np.random.default_rng()
        self._chosen = RecentKeys(horizon)

    @property
    def takes_all(self) -> bool:
        """Whether every image is chosen, so that nobody needs to ask."""
        return math.isinf(self._rate)

    def choose(self, contents: Sequence[int]) -> tuple[NDArray[np.intp], int]:
        """Indices of the chosen among images that come together, and how many of the others are copies.

        contents: a number for each image, the same for the same picture.
        """
        now = self._clock()
        self._allowance = min(self._burst, self._allowance + (now - self._then) * self._rate)
        self._then = now
        first = {content: index for index, content in reversed(list(enumerate(contents)))}
        fresh = sorted(index for content, index in first.items() if not self._chosen.holds(content, now))
        room = min(len(fresh), int(self._allowance))
        self._allowance -= room
        chosen = np.array(fresh, dtype=np.intp)
        if room < len(fresh):
            chosen = self._random.permutation(chosen)[:room]
        for index in chosen:
            self._chosen.enter(contents[index], now)
        copies = sum(self._chosen.holds(content, now) for content in contents) - room
        return chosen, copies
