"""Gives the monitor a sample of the embedded images, with a hash and descriptors of each.

This runs on the lane that embedded them, once their clients have their answers and the lane has released the device.
The monitor has a queue and a thread of its own. docs/decisions/engine-on-the-event-loop.md says what this costs.
"""

import logging
import math
import os
import threading
import weakref

import numpy as np
from numpy.typing import NDArray

from fullrank import SpectrumMonitor
from fullrank.calibration.inputs import describe_as
from service.engine.queue import Pixels, Rows
from service.metrics import Metrics
from service.watching.sampling import Sample

log = logging.getLogger("fullrank.service")
ROUGH = 1024  # bytes of an image that are hashed to recognise copies, before images are chosen
BURST = 256  # images that a monitor may see at once after a quiet time: one block of its statistics


class Observer:
    """Gives embedded images to monitors. Thread-safe.

    rate: images a second that each monitor gets at most. The others are counted in fullrank_unsampled_images_total, or
    as duplicates if they are copies of images that the monitor has seen. Images that a monitor refuses are counted in
    fullrank_unobserved_images_total.
    """

    def __init__(self, metrics: Metrics, rate: float = math.inf) -> None:
        self.metrics = metrics
        self._rate = rate
        self._samples: weakref.WeakKeyDictionary[SpectrumMonitor, Sample] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()
        # Random keys, by length. They are secret, so that nobody can craft images that count as duplicates.
        self._secrets: dict[int, NDArray[np.uint64]] = {}
        self._places: dict[int, NDArray[np.intp]] = {}

    def observe(
        self, monitor: SpectrumMonitor, pixels: Pixels, rows: Rows, clients: NDArray[np.int64] | None = None
    ) -> None:
        """Give a monitor a sample of images (n, c, s, s) and their rows (n, d). clients: whose they are, (n,) numbers.

        Raises nothing.
        """
        try:
            with self._lock:
                if (sample := self._samples.get(monitor)) is None:
                    sample = self._samples[monitor] = Sample(self._rate, BURST, monitor.windows[0])
            if not sample.takes_all:
                pixels, rows = self._chosen(sample, monitor, pixels, rows, clients)
            if len(rows):
                known = None if monitor.reference is None else monitor.reference.inputs
                monitor.observe(rows, keys=self.keys(pixels), inputs=describe_as(known, pixels))
        except Exception:
            log.exception("%d rows could not be observed", len(rows))
            self.metrics.unobserved.inc(len(rows))

    def _chosen(
        self,
        sample: Sample,
        monitor: SpectrumMonitor,
        pixels: Pixels,
        rows: Rows,
        clients: NDArray[np.int64] | None,
    ) -> tuple[Pixels, Rows]:
        """Choose the images and rows that the monitor gets. The others are counted."""
        # This comes before whole images are hashed and described, so that images not chosen cost almost nothing.
        contents = self.rough_keys(pixels)
        with self._lock:
            which, copies = sample.choose(contents, None if clients is None else clients.tolist())
        if copies:
            monitor.count_duplicates(copies)
        if unsampled := len(rows) - len(which) - copies:
            monitor.count_unsampled(unsampled)
            self.metrics.unsampled.inc(unsampled)
        return (pixels, rows) if len(which) == len(rows) else (pixels[which], rows[which])

    def rough_keys(self, pixels: Pixels) -> list[int]:
        """One hash for each image (n, c, s, s), of about 1,000 of its bytes at secret positions; 1 to 8 us an image.

        Images that differ elsewhere only have the same hash. That only means that they share a place in the sample.
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
        """(n,) keyed hashes of the decoded pixels, so that one picture in two file formats has one hash.

        Two pictures have the same hash with a probability of at most 2^-33: MULTILINEAR-HM of Lemire and Kaser
        ("Strongly universal string hashing is fast", 2014), all 64 bits.
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
        # All images in one call: a cryptographic hash would need a call, and with it the GIL, for each image.
        hashes: NDArray[np.uint64] = ((words[:, ::2] + first) * (words[:, 1::2] + second)).sum(1)
        return hashes
