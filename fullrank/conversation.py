"""What the client and the service say to each other, without the waiting: what to send, what an answer means.

`client.py` has the two ways of waiting for it.
"""

import hashlib
import io
import itertools
import os
import random
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from fullrank.wording import words_of

try:
    import httpx as httpx  # client.py has it from here, so that this is what a user without it is told
except ImportError as error:
    raise ImportError("fullrank.client needs httpx: pip install 'fullrank[client]'") from error

Image = bytes | str | os.PathLike[str]  # an encoded image, or the path of one
Rows = NDArray[np.float32]
BATCH_BYTES = 16 * 2**20  # half of what a service accepts unless told otherwise
BUSY = (429, 503)
TOO_MUCH = ("body_too_large", "too_many_images")


class EmbeddingError(Exception):
    """What the service refused, in its words; `image` is the index of the image to blame, if one is."""

    def __init__(self, code: str, message: str, *, status: int | None = None, image: int | None = None) -> None:
        super().__init__(message)
        self.code, self.status, self.image = code, status, image


@dataclass(frozen=True)
class Batch:
    """Images [start, start + n) of what was asked for."""

    start: int
    images: list[Image]

    def halves(self) -> "tuple[Batch, Batch]":
        middle = len(self.images) // 2
        return Batch(self.start, self.images[:middle]), Batch(self.start + middle, self.images[middle:])


@dataclass(frozen=True)
class Part:
    """A batch's rows (n, d), and the name and revision of the encoder that made them."""

    rows: Rows
    encoder: tuple[str, str]


Talk = Generator[httpx.Request | float, Any, Part]


class Conversation:
    """All but the waiting: what to send, what an answer means. `model` and `revision` are those of the last rows."""

    _http: httpx.Client | httpx.AsyncClient
    model: str | None = None
    revision: str | None = None

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        key: str | None = None,
        batch: int = 32,
        concurrency: int = 4,
        retries: int = 8,
        longest_wait: float = 30.0,
        timeout: float = 60.0,
        progress: bool = False,
    ) -> None:
        """`fullrank.client.Client` says what the options are. ValueError for a url that is none, and counts below 1."""
        try:
            httpx.URL(url)
        except httpx.InvalidURL as error:
            raise ValueError(f"url: {url!r} is no address: {error}") from error
        if min(batch, concurrency) < 1:
            raise ValueError(f"batch and concurrency must be at least 1, not {batch} and {concurrency}")
        self.url, self.batch, self.concurrency = url.rstrip("/"), batch, concurrency
        self.retries, self.longest_wait, self.progress = retries, longest_wait, progress
        self._options: dict[str, Any] = {
            "base_url": self.url,
            "headers": {"Authorization": f"Bearer {key}"} if key else {},
            "timeout": timeout,
            # Servers end idle connections, uvicorn after 5 s, httpx's own default: one reused at that moment is reset.
            "limits": httpx.Limits(keepalive_expiry=2.0),
        }

    def _batches(self, images: list[Image]) -> Iterator[Batch]:
        start = size = 0
        for index, image in enumerate(images):
            length = len(image) if isinstance(image, bytes) else Path(image).stat().st_size
            if index > start and (index - start == self.batch or size + length > BATCH_BYTES):
                yield Batch(start, images[start:index])
                start, size = index, 0
            size += length
        if images:
            yield Batch(start, images[start:])

    def _talk(self, batch: Batch, params: dict[str, str]) -> Talk:
        """One batch's conversation: yields a request to send (and is sent the answer), or seconds to sleep."""
        files = [
            ("images", (str(i), image if isinstance(image, bytes) else Path(image).read_bytes()))
            for i, image in enumerate(batch.images)
        ]
        request = self._http.build_request(
            "POST",
            "/embed",
            files=files,
            params=params,
            headers={"Accept": "application/x-npy"},
        )
        response = yield from self._answered(request)
        if response.is_success:
            try:
                encoder = response.headers["X-Model"], response.headers["X-Revision"]
                return Part(np.load(io.BytesIO(response.content), allow_pickle=False), encoder)
            except (LookupError, ValueError, EOFError) as error:  # not ours: a proxy's, perhaps
                message = f"{self.url} answered {response.status_code}, and no embeddings; is it a fullrank service?"
                raise EmbeddingError("http", message, status=response.status_code) from error
        refusal = self._refusal(response, batch)
        if refusal.code not in TOO_MUCH or len(batch.images) == 1:
            raise refusal
        parts = []
        for half in batch.halves():
            parts.append((yield from self._talk(half, params)))
        return Part(np.concatenate([part.rows for part in parts]), same_encoder(parts))

    def _answered(self, request: httpx.Request) -> Generator[httpx.Request | float, Any, httpx.Response]:
        """A request's answer; it is sent again while the service is full or starting."""
        for attempt in itertools.count():
            response: httpx.Response = yield request
            if response.status_code not in BUSY or attempt >= self.retries:
                break
            yield self._wait(response, attempt)
        return response

    def _wait(self, response: httpx.Response, attempt: int) -> float:
        asked = response.headers.get("Retry-After", "")
        seconds = float(asked) if asked.isdecimal() else 0.5 * 2**attempt
        return min(seconds, self.longest_wait) * random.uniform(1.0, 1.25)  # so that not all come back at once

    def _refusal(self, response: httpx.Response, batch: Batch) -> EmbeddingError:
        try:
            detail = response.json()["error"]
            code, message, field = detail["code"], detail["message"], detail["field"] or ""
        except (ValueError, LookupError, TypeError):  # not ours: a proxy's, perhaps
            code, message, field = "http", f"{self.url} answered {response.status_code}: {response.text[:200]}", ""
        if (blamed := re.fullmatch(r"images\[(\d+)\]", field)) is None:
            return EmbeddingError(code, message, status=response.status_code)
        image = batch.images[int(blamed[1])]
        index = batch.start + int(blamed[1])
        name = f"image {index}" if isinstance(image, bytes) else os.fspath(image)
        return EmbeddingError(code, f"{name}: {message}", status=response.status_code, image=index)

    def _unreachable(self, error: httpx.HTTPError) -> EmbeddingError:
        reason = words_of(error)
        return EmbeddingError("unreachable", f"no answer from {self.url} ({reason}); is the service running there?")

    def _finish(self, parts: list[Part]) -> Rows:
        if not parts:
            return np.empty((0, 0), np.float32)
        self.model, self.revision = same_encoder(parts)
        return np.concatenate([part.rows for part in parts])

    @contextmanager
    def _bar(self, images: int) -> Iterator[Callable[[Part], None]]:
        if not self.progress:
            yield lambda part: None
            return
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress

        with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=Console(stderr=True)) as bar:
            task = bar.add_task("images", total=images)
            yield lambda part: bar.advance(task, len(part.rows))

    def _report(
        self, model: str, rows: Rows | None, keys: Sequence[Any] | None, inputs: Rows | None, canary: Rows | None
    ) -> Iterator[httpx.Request]:
        """The requests that hand rows over, each with at most BATCH_BYTES of them."""
        arrays = {
            name: _floats(value, name) for name, value in (("rows", rows), ("inputs", inputs)) if value is not None
        }
        n = len(arrays["rows"]) if "rows" in arrays else 0
        if keys is not None:
            arrays["keys"] = np.array([_hashed(key) for key in keys], np.int64)
        for name, value in arrays.items():
            if len(value) != n:
                raise ValueError(f"{name}: expected {n}, one a row, got {len(value)}")
        size = sum(value[:1].nbytes for value in arrays.values())
        step = max(1, BATCH_BYTES // max(1, size))
        for start in range(0, n, step):
            part = {name: np.ascontiguousarray(value[start : start + step]) for name, value in arrays.items()}
            yield self._handed(model, part)
        if canary is not None:
            yield self._handed(model, {"canary": _floats(canary, "canary")})

    def _handed(self, model: str, arrays: dict[str, NDArray[Any]]) -> httpx.Request:
        return self._http.build_request(
            "POST",
            "/observe",
            content=save(arrays),
            params={"model": model},
            headers={"Content-Type": "application/x-safetensors"},
        )

    def _told(self, request: httpx.Request) -> Generator[httpx.Request | float, Any, None]:
        """One request's conversation, as `_talk`."""
        response = yield from self._answered(request)
        if not response.is_success:
            raise self._refusal(response, Batch(0, []))


def _floats(rows: Any, name: str) -> Rows:
    """A float32 array (n, d). ValueError for another shape or values that are no numbers."""
    array = np.asarray(rows)
    if array.ndim != 2 or array.dtype.kind not in "fiu":
        raise ValueError(f"{name}: expected numbers of shape (n, d), got {array.dtype} of shape {array.shape}")
    return array.astype(np.float32)


def _hashed(key: Any) -> int:
    """A key as 64 bits, the same in every process."""
    if isinstance(key, int | np.integer):
        return int(key) % 2**64 - 2**63
    data = key.encode() if isinstance(key, str) else bytes(key)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def listed(images: Image | Iterable[Image]) -> list[Image]:
    return [images] if isinstance(images, bytes | str | os.PathLike) else list(images)


def params_of(normalize: bool, model: str | None) -> dict[str, str]:
    return {"normalize": str(normalize).lower()} | ({} if model is None else {"model": model})


def same_encoder(parts: list[Part]) -> tuple[str, str]:
    encoders = sorted({part.encoder for part in parts})
    if len(encoders) > 1:
        names = " and ".join("@".join(encoder) for encoder in encoders)
        message = f"the encoder was swapped meanwhile; rows of {names} do not compare: embed again"
        raise EmbeddingError("encoder_changed", message)
    return encoders[0]
