"""From answered images to the monitor, on a thread of its own: hashing and thumbnails never delay an answer."""

import contextlib
import itertools
import logging
import math
import os
import queue
import threading
import weakref
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from fullrank import SpectrumMonitor
from fullrank.calibration.inputs import thumbnails
from service.engine.queue import Pixels, Rows
from service.metrics import Metrics
from service.watching.sampling import Sample

log = logging.getLogger("fullrank.service")
PAUSE = 0.5  # seconds
TOGETHER = 64  # images
BURST = 256  # images that a monitor sees at once after a quiet time: a block of its statistics
ROUGH = 1024  # bytes of an image that tell whether it is a copy, before it is chosen
BACKLOG = 256 * 2**20  # bytes of pixels: 1,700 images of 224 x 224
Item = tuple[SpectrumMonitor, Pixels, Rows]


class Observer:
    """Feeds monitors from a bounded backlog; what it cannot take is counted in fullrank_unobserved_images_total.

    rate: images a second that each monitor is to see, at most; the others are counted in
    fullrank_unsampled_images_total, or as duplicates where they are copies of what the monitor has seen.
    """

    def __init__(self, metrics: Metrics, rate: float = math.inf) -> None:
        self.metrics, self._rate = metrics, rate
        self._samples: weakref.WeakKeyDictionary[SpectrumMonitor, Sample] = weakref.WeakKeyDictionary()
        self._backlog: queue.Queue[Item | None] = queue.Queue()
        self._lock, self._waiting = threading.Lock(), 0  # bytes
        # Secrets of the process, by length: nobody can craft images that the monitor takes for duplicates.
        self._secrets: dict[int, NDArray[np.uint64]] = {}
        self._places: dict[int, NDArray[np.intp]] = {}
        self._awaited = threading.Event()  # somebody waits for the backlog to be handed over
        self._thread = threading.Thread(target=self._run, name="observer", daemon=True)
        self._thread.start()

    def put(self, monitor: SpectrumMonitor, pixels: Pixels, rows: Rows) -> None:
        """Never blocks."""
        with self._lock:
            if (sample := self._samples.get(monitor)) is None:
                sample = self._samples[monitor] = Sample(self._rate, BURST, monitor.windows[0])
        if not sample.takes_all:
            # Before whole images are hashed and thumbnails are made: what is not looked at is to cost next to nothing.
            contents = self.rough_keys(pixels)
            with self._lock:
                which, copies = sample.choose(contents)
            if copies:
                monitor.count_duplicates(copies)
            self.metrics.unsampled.inc(len(rows) - len(which) - copies)
            if not len(which):
                return
            if len(which) < len(rows):
                pixels, rows = pixels[which], rows[which]
        with self._lock:
            if room := self._waiting + pixels.nbytes <= BACKLOG:
                self._waiting += pixels.nbytes
        if room:
            self._backlog.put((monitor, pixels, rows))
        else:
            self.metrics.unobserved.inc(len(rows))

    def rough_keys(self, pixels: Pixels) -> list[int]:
        """Keys of about a thousand bytes of each image, at places that are the process's secret: 1 or 2 us an image.

        Pictures that agree there and differ elsewhere share one. They only share a place in the sample.
        """
        flat = pixels.reshape(len(pixels), -1)
        width = flat.shape[1]
        if width > ROUGH:
            if width not in self._places:
                self._places[width] = np.sort(np.random.default_rng().choice(width, ROUGH, replace=False))
            flat = flat[:, self._places[width]]
        keys: list[int] = self.keys(flat).tolist()
        return keys

    def keys(self, pixels: Pixels) -> NDArray[np.uint64]:
        """(n,) keyed hashes of what the encoder sees, so that one picture in two file formats is one picture.

        Two pictures share one with a chance of at most 2^-33: MULTILINEAR-HM of Lemire and Kaser ("Strongly universal
        string hashing is fast", 2014), all 64 bits of it.
        """
        flat = pixels.reshape(len(pixels), -1)
        if odd := -flat.shape[1] % 8:
            flat = np.pad(flat, ((0, 0), (0, odd)))
        words = np.ascontiguousarray(flat).view(np.uint32)
        count = words.shape[1]
        if count not in self._secrets:
            self._secrets[count] = np.frombuffer(os.urandom(8 * count), np.uint64)
        first, second = self._secrets[count].reshape(2, -1)
        # All images at once: a cryptographic hash of each would take the GIL from requests once an image.
        hashes: NDArray[np.uint64] = ((words[:, ::2] + first) * (words[:, 1::2] + second)).sum(1)
        return hashes

    def close(self) -> None:
        """Hand over the backlog and end the thread."""
        self._awaited.set()
        self._backlog.put(None)
        self._thread.join()

    def join(self) -> None:
        """Wait until everything put so far has been handed over."""
        self._awaited.set()
        self._backlog.join()
        self._awaited.clear()

    def _run(self) -> None:
        items: list[Item | None] = []
        while None not in items:
            items = [self._backlog.get()]
            # What gathers meanwhile is observed at once: waking for each batch would take the GIL from requests.
            self._awaited.wait(PAUSE)
            with contextlib.suppress(queue.Empty):
                while True:
                    items.append(self._backlog.get_nowait())
            for monitor, pixels, rows in _joined(filter(None, items)):
                self._observe(monitor, pixels, rows)
                with self._lock:
                    self._waiting -= pixels.nbytes
            for _ in items:
                self._backlog.task_done()

    def _observe(self, monitor: SpectrumMonitor, pixels: Pixels, rows: Rows) -> None:
        try:
            monitor.observe(rows, keys=self.keys(pixels), inputs=thumbnails(pixels))
        except Exception:
            # The thread must outlive a bad batch: without it the monitor would fall silent.
            log.exception("%d rows could not be observed", len(rows))
            self.metrics.unobserved.inc(len(rows))


def _joined(items: Iterable[Item]) -> Iterator[Item]:
    """Small batches of one monitor put together."""
    several = list(items)
    ends = itertools.accumulate(len(rows) for _, _, rows in several)
    shares = (end // TOGETHER for end in ends)
    for (monitor, _), group in itertools.groupby(several, lambda item: (item[0], next(shares))):
        _, pixels, rows = zip(*group, strict=True)
        yield monitor, np.concatenate(pixels), np.concatenate(rows)
