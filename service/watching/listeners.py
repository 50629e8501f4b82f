"""The clients that listen to GET /events: a bounded number of them, all of which end when the service does."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

LIMIT = 32


class Listeners:
    """Counts listeners and wakes them at the end. For the event loop alone."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self.count = 0
        self._ended = asyncio.Event()

    @property
    def full(self) -> bool:
        """Whether no more may listen."""
        return self.count >= self.limit

    @property
    def ended(self) -> bool:
        """Whether nobody may listen any more."""
        return self._ended.is_set()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Count one listener while the block runs."""
        self.count += 1
        try:
            yield
        finally:
            self.count -= 1

    async def pause(self, seconds: float) -> bool:
        """Wait so long. False, at once, if the service ends."""
        try:
            async with asyncio.timeout(seconds):
                await self._ended.wait()
        except TimeoutError:
            return True
        return False

    def end(self) -> None:
        """End all listeners."""
        self._ended.set()
