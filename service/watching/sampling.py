"""Token-bucket sampling of images for the monitor. It spends no token on copies of recent images."""

import math
import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fullrank.monitor.window import RecentKeys


class Sample:
    """Chooses at most `rate` images a second at random, so that the cost of watching is bounded.

    rate: images a second in the long run; infinite chooses all. burst: images at once after a quiet time. horizon:
    seconds within which a second image with the same content counts as a copy.

    Below the rate all images are chosen. Above it, each of the images that come together has the same chance. Copies
    are left out first: otherwise a client that repeats one picture would crowd out all others, and the sample would
    say nothing about the encoder. Not thread-safe.
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
        """Whether every image is chosen, so that choose() need not be called."""
        return math.isinf(self._rate)

    def choose(self, contents: Sequence[int]) -> tuple[NDArray[np.intp], int]:
        """Choose among images that come together. Returns the chosen indices, and how many of the others are copies.

        contents: a hash of each image.
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
