"""From answered images to the monitor, on a thread of its own: hashing and thumbnails never delay an answer."""

import contextlib
import hashlib
import itertools
import logging
import operator
import os
import queue
import threading
import time

import numpy as np
from numpy.typing import NDArray

from fullrank import SpectrumMonitor
from fullrank.inputs import thumbnails
from service.batching import Pixels, Rows
from service.metrics import Metrics

log = logging.getLogger("fullrank.service")
PAUSE = 0.02  # seconds
_BACKLOG = 128  # batches: seconds of traffic, a few megabytes


class Observer:
    """Feeds monitors from a bounded backlog; what it cannot take is counted in fullrank_unobserved_images_total."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self._backlog: queue.Queue[tuple[SpectrumMonitor, Pixels, Rows] | None] = queue.Queue(_BACKLOG)
        # A secret per process: nobody can craft images that the monitor takes for duplicates.
        self._secret = os.urandom(16)
        self._thread = threading.Thread(target=self._run, name="observer", daemon=True)
        self._thread.start()

    def put(self, monitor: SpectrumMonitor, pixels: Pixels, rows: Rows) -> None:
        """Never blocks."""
        try:
            self._backlog.put_nowait((monitor, pixels, rows))
        except queue.Full:
            self.metrics.unobserved.inc(len(rows))

    def keys(self, pixels: Pixels) -> NDArray[np.uint64]:
        """(n,) keyed hashes of what the encoder sees, so that one picture in two file formats is one picture."""
        digests = (hashlib.blake2b(image.tobytes(), digest_size=8, key=self._secret) for image in pixels)
        return np.frombuffer(b"".join(digest.digest() for digest in digests), np.uint64)

    def close(self) -> None:
        """Hand over the backlog and end the thread."""
        self._backlog.put(None)
        self._thread.join()

    def join(self) -> None:
        """Wait until everything put so far has been handed over."""
        self._backlog.join()

    def _run(self) -> None:
        items: list[tuple[SpectrumMonitor, Pixels, Rows] | None] = []
        while None not in items:
            items = [self._backlog.get()]
            # What gathers meanwhile is observed at once: waking for each batch would take the GIL from requests.
            time.sleep(PAUSE)
            with contextlib.suppress(queue.Empty):
                while True:
                    items.append(self._backlog.get_nowait())
            for monitor, batches in itertools.groupby(filter(None, items), operator.itemgetter(0)):
                _, pixels, rows = zip(*batches, strict=True)
                self._observe(monitor, np.concatenate(pixels), np.concatenate(rows))
            for _ in items:
                self._backlog.task_done()

    def _observe(self, monitor: SpectrumMonitor, pixels: Pixels, rows: Rows) -> None:
        try:
            monitor.observe(rows, keys=self.keys(pixels), inputs=thumbnails(pixels))
        except Exception:
            # The thread must outlive a bad batch: without it the monitor would fall silent.
            log.exception("%d rows could not be observed", len(rows))
            self.metrics.unobserved.inc(len(rows))
