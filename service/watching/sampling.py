"""Token-bucket sampling of images for the monitor: no token for copies of recent images, a cap for each client."""

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fullrank.monitor.window import RecentKeys

CAP = 0.25  # of the rate, for each client where there are several
CLIENTS = 1024  # remembered at most; of more, the one that was quiet for longest is forgotten


class Clients:
    """Token buckets that hold each of several clients to a quarter of a rate. One client alone is not held.

    rate: rows a second of all clients; burst: rows at once after a quiet time; horizon: seconds after which a client
    that was quiet is forgotten. Not thread-safe.
    """

    def __init__(self, rate: float, burst: float, horizon: float) -> None:
        self._rate = CAP * rate
        self._burst = CAP * burst
        self._horizon = horizon
        # Client -> what it may still have, and when it was last seen; the latest seen at the end.
        self._known: OrderedDict[int, tuple[float, float]] = OrderedDict()

    def left(self, clients: Sequence[int], now: float) -> dict[int, int] | None:
        """How many rows each of these clients may still have; None where no other was seen within the horizon."""
        if not clients or math.isinf(self._rate):
            return None
        known = self._known
        for client in dict.fromkeys(clients):
            allowance, seen = known.pop(client, (self._burst, now))
            known[client] = min(self._burst, allowance + (now - seen) * self._rate), now
        while len(known) > CLIENTS or now - next(iter(known.values()))[1] > self._horizon:
            known.popitem(last=False)
        if len(known) < 2:
            known[clients[0]] = self._burst, now
            return None
        return {client: max(0, int(known[client][0])) for client in clients if client in known}

    def spend(self, client: int, rows: int = 1) -> None:
        """Take rows that a client got off what it may still have."""
        allowance, seen = self._known[client]
        self._known[client] = allowance - rows, seen


class Sample:
    """Chooses at most `rate` images a second at random, so that the cost of watching is bounded.

    rate: images a second in the long run; infinite chooses all. burst: images at once after a quiet time. horizon:
    seconds within which a second image with the same content counts as a copy.

    Below the rate all images are chosen. Above it, each of the images that come together has the same chance. Copies
    are left out first: otherwise a client that repeats one picture would crowd out all others, and the sample would
    say nothing about the encoder. Where several clients were seen within the horizon, each gets at most a quarter of
    the rate, so that one that floods cannot make up most of the sample. Not thread-safe.
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
        self._clients = Clients(rate, burst, horizon)

    @property
    def takes_all(self) -> bool:
        """Whether every image is chosen, so that choose() need not be called."""
        return math.isinf(self._rate)

    def choose(self, contents: Sequence[int], clients: Sequence[int] | None = None) -> tuple[NDArray[np.intp], int]:
        """Choose among images that come together. Returns the chosen indices, and how many of the others are copies.

        contents: a hash of each image; clients: whose it is, where that is known.
        """
        now = self._clock()
        self._allowance = min(self._burst, self._allowance + (now - self._then) * self._rate)
        self._then = now
        first = {content: index for index, content in reversed(list(enumerate(contents)))}
        fresh = sorted(index for content, index in first.items() if not self._chosen.holds(content, now))
        chosen = np.array(fresh, dtype=np.intp)
        clients = () if clients is None else clients
        left = self._clients.left(clients, now)
        if left is not None:
            chosen = self._capped(chosen, clients, left)
        room = min(len(chosen), int(self._allowance))
        self._allowance -= room
        if room < len(chosen):
            chosen = self._random.permutation(chosen)[:room]
        if left is not None:
            for index in chosen:
                self._clients.spend(clients[index])
        for index in chosen:
            self._chosen.enter(contents[index], now)
        copies = sum(self._chosen.holds(content, now) for content in contents) - room
        return chosen, copies

    def _capped(self, fresh: NDArray[np.intp], clients: Sequence[int], left: dict[int, int]) -> NDArray[np.intp]:
        """Those of the images that their clients may still have, at random."""
        kept = []
        for index in self._random.permutation(fresh):
            if left.get(clients[index], 0) > 0:
                left[clients[index]] -= 1
                kept.append(index)
        return np.sort(np.array(kept, dtype=np.intp))
