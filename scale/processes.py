"""What the processes of one bulk run share: a count of images, the order to stop, and their end."""

import multiprocessing
import os
import signal
import threading
from multiprocessing.context import SpawnContext

from scale.output import BulkError


class Progress:
    """Counts the images of all processes, for the progress bar, and stops them in the middle of their shards."""

    def __init__(self, context: SpawnContext) -> None:
        self._value = context.Value("q", 0)
        self._stopped = context.Event()

    def stop(self) -> None:
        """Have the next call in each process raise BulkError, so that its shard is not written."""
        self._stopped.set()

    def __call__(self, images: int) -> None:
        if self._stopped.is_set():
            raise BulkError("the run was stopped")
        with self._value.get_lock():
            self._value.value += images

    def taken(self) -> int:
        """What was counted since the last call."""
        with self._value.get_lock():
            images: int = self._value.value
            self._value.value = 0
        return images


def tied_to_parent() -> None:
    """Have this process end with the one that started it, however that ends, and leave interrupts to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal interrupts all of them at once
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
