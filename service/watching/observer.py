"""From answered images to the monitor: a sample of them, with a hash and a thumbnail of each.

On the thread that embedded them, after their clients have their answers and the device is another's: the monitor has a
queue and a thread of its own. docs/decisions/engine-on-the-event-loop.md has what that costs.
"""

import logging
import math
import os
import threading
import weakref

import numpy as np
from numpy.typing import NDArray

from fullrank import SpectrumMonitor
from fullrank.calibration.inputs import thumbnails
from service.engine.queue import Pixels, Rows
from service.metrics import Metrics
from service.watching.sampling import Sample

log = logging.getLogger("fullrank.service")
ROUGH = 1024  # bytes of an image that tell whether it is a copy, before it is chosen
BURST = 256  # images that a monitor sees at once after a quiet time: a block of its statistics


class Observer:
    """Shows monitors what was embedded. Thread-safe.

    rate: images a second that each monitor is to see, at most; the others are counted in
    fullrank_unsampled_images_total, or as duplicates where they are copies of what the monitor has seen. Those that a
    monitor refuses are counted in fullrank_unobserved_images_total.
    """

    def __init__(self, metrics: Metrics, rate: float = math.inf) -> None:
        self.metrics = metrics
        self._rate = rate
        self._samples: weakref.WeakKeyDictionary[SpectrumMonitor, Sample] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()
        # Secrets of the process, by length: nobody can craft images that the monitor takes for duplicates.
        self._secrets: dict[int, NDArray[np.uint64]] = {}
        self._places: dict[int, NDArray[np.intp]] = {}

    def observe(self, monitor: SpectrumMonitor, pixels: Pixels, rows: Rows) -> None:
        """Hand a sample of images (n, c, s, s) and their rows (n, d) to a monitor. Raises nothing."""
        try:
            with self._lock:
                if (sample := self._samples.get(monitor)) is None:
                    sample = self._samples[monitor] = Sample(self._rate, BURST, monitor.windows[0])
            if not sample.takes_all:
                pixels, rows = self._chosen(sample, monitor, pixels, rows)
            if len(rows):
                monitor.observe(rows, keys=self.keys(pixels), inputs=thumbnails(pixels))
        except Exception:
            log.exception("%d rows could not be observed", len(rows))
            self.metrics.unobserved.inc(len(rows))

    def _chosen(self, sample: Sample, monitor: SpectrumMonitor, pixels: Pixels, rows: Rows) -> tuple[Pixels, Rows]:
        """Those that the monitor is to see; the others are counted."""
        # Before whole images are hashed and thumbnails are made: what is not looked at is to cost next to nothing.
        contents = self.rough_keys(pixels)
        with self._lock:
            which, copies = sample.choose(contents)
        if copies:
            monitor.count_duplicates(copies)
        self.metrics.unsampled.inc(len(rows) - len(which) - copies)
        return (pixels, rows) if len(which) == len(rows) else (pixels[which], rows[which])

    def rough_keys(self, pixels: Pixels) -> list[int]:
        """Keys of about a thousand bytes of each image, at places that are the process's secret: 1 to 8 us an image.

        Pictures that agree there and differ elsewhere share one. They only share a place in the sample.
        """
        flat = pixels.reshape(len(pixels), -1)
        width = flat.shape[1]
        if width > ROUGH:
            with self._lock:
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
        with self._lock:
            if count not in self._secrets:
                self._secrets[count] = np.frombuffer(os.urandom(8 * count), np.uint64)
            first, second = self._secrets[count].reshape(2, -1)
        # All images at once: a cryptographic hash of each would take the GIL from requests once an image.
        hashes: NDArray[np.uint64] = ((words[:, ::2] + first) * (words[:, 1::2] + second)).sum(1)
        return hashes
