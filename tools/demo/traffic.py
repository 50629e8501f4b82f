"""A thread that sends real images to POST /embed at a steady rate."""

import base64
import io
import threading
import time
from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from tools.stack import StackError, call


def encoded(images: Tensor) -> list[str]:
    """(n, 1, s, s) uint8 -> n PNG files as base64."""
    return [base64.b64encode(_png(image[0])).decode() for image in images]


class Traffic(threading.Thread):
    """Sends `pictures` (base64) over and over, `rate` a second in requests of `batch`, until closed."""

    def __init__(self, url: str, pictures: Sequence[str], rate: float, batch: int = 16, key: str = "") -> None:
        super().__init__(name="traffic", daemon=True)
        self.answered = self.failed = 0
        self._url = url
        self._pictures = pictures
        self._batch = batch
        self._key = key
        self._period = batch / rate
        self._stop_asked = threading.Event()

    def __enter__(self) -> "Traffic":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_asked.set()
        self.join()

    def run(self) -> None:
        """Send until closed. Images that get no answer are counted, and the next ones are sent."""
        position = 0
        due = time.monotonic()
        while not self._stop_asked.wait(max(0.0, due - time.monotonic())):
            chosen = [self._pictures[(position + i) % len(self._pictures)] for i in range(self._batch)]
            try:
                body = {"images": chosen}
                form = "application/octet-stream"
                call(f"{self._url}/embed", body, accept=form, timeout=30, key=self._key)
                self.answered += self._batch
            except (OSError, StackError):
                self.failed += self._batch
            position = (position + self._batch) % len(self._pictures)
            due = max(due + self._period, time.monotonic() - 1)


def _png(image: Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image.numpy()).save(buffer, "PNG")
    return buffer.getvalue()
