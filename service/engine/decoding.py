"""Decodes images of a batch: on the lane's thread, on helpers if there are many, in processes if one may take long."""

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from service.engine.batch import Batch
from service.engine.pool import Pool, SlowImage
from service.engine.queue import Job, Part, Pixels

IMAGES_PER_HELPER = 4  # images that one thread decodes before waking a second one pays


class Decoder:
    """Decodes parts into batches.

    threads: that decode one batch, the lane's own included; also the number of processes for images that may take long,
    each of which may take `seconds` of CPU and `memory` bytes. put_back takes a part that such a process has decoded;
    failed takes a job with a bad image, and its error. Both are called on any thread.
    """

    def __init__(
        self,
        threads: int,
        seconds: float,
        memory: int,
        put_back: Callable[[Part], None],
        failed: Callable[[Job, Exception], None],
        killed: Callable[[], None],
    ) -> None:
        self._threads = threads
        self._put_back = put_back
        self._failed = failed
        self._helpers = ThreadPoolExecutor(max(1, threads - 1), "decode")
        self._pool = Pool(threads, seconds, memory, self._decoded_apart, killed)

    def decode(self, parts: list[Part], batch: Batch) -> None:
        """Decode parts and add them to a batch, on several threads if there are many images. A bad image fails its job.

        Parts with images that may take long go to the pool. Parts that no client waits for any more are dropped.
        """
        started = time.monotonic()
        images = [(part.job, image) for part in parts for image in part.images]
        shares = min(self._threads, math.ceil(len(images) / IMAGES_PER_HELPER))
        others = [self._helpers.submit(decode_all, images[i::shares]) for i in range(1, shares)]
        decoded: list[Pixels | SlowImage | Exception | None] = [None] * len(images)
        decoded[::shares] = decode_all(images[::shares])
        for i, other in enumerate(others, 1):
            decoded[i::shares] = other.result()
        seconds = time.monotonic() - started
        results = iter(decoded)
        for part in parts:
            own = [next(results) for _ in range(len(part))]
            part.job.decode_seconds += seconds
            if (error := next((it for it in own if isinstance(it, Exception)), None)) is not None:
                part.job.abandoned = True
                self._failed(part.job, error)
            elif any(isinstance(it, SlowImage) for it in own):
                self._pool.put(part, own)
            elif all(it is not None for it in own):
                batch.add(part, [it for it in own if isinstance(it, np.ndarray)])

    def _decoded_apart(self, part: Part, result: list[Pixels] | Exception) -> None:
        """Take a decoded part back from the pool. Runs on a thread of the pool."""
        if isinstance(result, Exception):
            part.job.abandoned = True
            self._failed(part.job, result)
            return
        self._put_back(replace(part, decoded=result))

    def close(self) -> None:
        """End the processes, then the helpers once they are done. Blocks."""
        self._pool.close()
        self._helpers.shutdown(wait=False, cancel_futures=True)


def decode_all(images: list[tuple[Job, Any]]) -> list[Pixels | SlowImage | Exception | None]:
    """For each image its pixels, or the exception that decoding raised, or None if no client waits for it any more."""
    decoded = list[Pixels | SlowImage | Exception | None]()
    for job, image in images:
        try:
            if not job.wanted(time.monotonic()):
                decoded.append(None)
            else:
                decoded.append(image if isinstance(image, np.ndarray) else job.encoder.decode(image))
        except Exception as error:
            decoded.append(error)
    return decoded
