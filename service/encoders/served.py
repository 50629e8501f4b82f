"""A loaded encoder (Candidate), and one in service (Served), which has a monitor that watches its embeddings."""

import base64
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fullrank import SpectrumMonitor
from models import headers
from models.artifact import Artifact
from models.decode import ImageError
from models.embedder import Embedder
from models.preprocess import decode, resize
from service.engine.pool import SlowImage
from service.engine.queue import Pixels, Rows
from service.failures import InvalidError
from service.watching.observer import Observer

# An image is decoded on a thread of the service if its header bounds the time for that to this many seconds.
SOON = 0.02


@dataclass(frozen=True)
class Source:
    """An image as the request sent it, and the request's field that an error should name.

    bytes are an encoded file, text is a file in base64, an array is (1 or 3, h, w) uint8 pixels.
    """

    data: bytes | str | Pixels
    field: str


@dataclass(frozen=True)
class Answer:
    """The result of embedding: raw rows (n, d), the same rows with unit L2 norm, and the seconds of each phase."""

    served: "Served"
    rows: Rows
    unit: Rows
    decode_seconds: float
    queue_seconds: float
    forward_seconds: float


@dataclass(eq=False)
class Candidate:
    """An encoder that is loaded but not in service. No monitor watches its rows."""

    artifact: Artifact
    folder: Path  # it was read from here
    embedder: Embedder
    max_pixels: int
    max_whole_pixels: int

    @property
    def name(self) -> str:
        return self.artifact.card.name

    @property
    def revision(self) -> str:
        return self.artifact.card.revision

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}"

    def decode(self, image: Source) -> Pixels | SlowImage:
        """Decode an image to (c, s, s) uint8, or return a SlowImage if decoding may take long.

        Raises InvalidError, which names the field.
        """
        preprocessing = self.artifact.card.preprocessing
        limits = {"max_pixels": self.max_pixels, "max_whole_pixels": self.max_whole_pixels}

        def refused(error: ImageError) -> InvalidError:
            return InvalidError(error.code, str(error), field=image.field)

        try:
            if isinstance(image.data, np.ndarray):
                return resize(image.data, preprocessing, max_pixels=self.max_pixels)
            data = to_bytes(image.data, image.field)
            if headers.seconds(data) > SOON and headers.format_of(data) is not None:
                return SlowImage(data, preprocessing, refused=refused, **limits)
            return decode(data, preprocessing, **limits)
        except ImageError as error:
            raise refused(error) from error

    def embed(self, pixels: Pixels) -> Rows:
        """(n, c, s, s) uint8 -> (n, d) float32, not normalised."""
        rows: Rows = self.embedder.embed(pixels).numpy()
        return rows

    def on_embedded(self, pixels: Pixels, rows: Rows, clients: NDArray[np.int64]) -> None:
        """Do nothing: these rows are no client's traffic."""


@dataclass(eq=False)
class Served(Candidate):
    """An encoder in service, its monitor, and the artifact whose reference it is compared with (usually its own)."""

    baseline: Artifact
    observer: Observer
    monitor: SpectrumMonitor | None
    in_flight: int = 0

    @classmethod
    def of(
        cls, candidate: Candidate, baseline: Artifact, observer: Observer, monitor: SpectrumMonitor | None
    ) -> "Served":
        """Put the candidate in service."""
        fields = candidate.artifact, candidate.folder, candidate.embedder
        return cls(*fields, candidate.max_pixels, candidate.max_whole_pixels, baseline, observer, monitor)

    def __post_init__(self) -> None:
        self.images = self.observer.metrics.encoder_images.labels(self.name, self.revision)
        self.headers = ((b"x-model", self.name.encode()), (b"x-revision", self.revision.encode()))

    def on_embedded(self, pixels: Pixels, rows: Rows, clients: NDArray[np.int64]) -> None:
        """Give the monitor the rows that clients got."""
        if self.monitor is not None:
            self.observer.observe(self.monitor, pixels, rows, clients)


def to_bytes(data: bytes | str, field: str) -> bytes:
    """The image's bytes; text is decoded from base64 or a data URI. Raises InvalidError."""
    if isinstance(data, bytes):
        return data
    text = data.lstrip()
    if text[:5].lower() == "data:":
        header, comma, text = text.partition(",")
        if not comma or not header.lower().endswith(";base64"):
            raise InvalidError("bad_base64", "a data URI must read data:<type>;base64,<data>", field=field)
    elif text[:8].lower().startswith(("http://", "https://")):
        raise InvalidError("no_urls", "this service fetches no URLs; send the image's bytes as base64", field=field)
    try:
        return _from_base64(text)
    except ValueError as error:
        message = f"not base64 ({error}); encode the image's bytes with the standard alphabet"
        raise InvalidError("bad_base64", message, field=field) from error


URL_SAFE = bytes.maketrans(b"-_", b"+/")
ESCAPES = {b"%2B": b"+", b"%2F": b"/", b"%3D": b"="}


def _from_base64(text: str) -> bytes:
    """Base64 as clients write it: with line breaks, without padding, in a URL's alphabet. Raises ValueError."""
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        plain = text.encode("ascii").translate(URL_SAFE, b" \t\r\n\f\v")
        for escape, character in ESCAPES.items() if b"%" in plain else ():
            plain = plain.replace(escape, character).replace(escape.lower(), character)
        plain = plain.rstrip(b"=")
        return base64.b64decode(plain + b"=" * (-len(plain) % 4), validate=True)
