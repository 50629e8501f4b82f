"""A client of the service: images in, one array of embeddings out, in order. It needs httpx and no torch.

    from fullrank.client import Client
    with Client("http://127.0.0.1:8000") as client:
        rows = client.embed(["a.jpg", "b.png"])     # (2, d) float32, unit rows, all from client.revision

`AsyncClient` is the same with `async with` and `await`.
"""

import asyncio
import hashlib
import io
import itertools
import os
import random
import re
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

try:
    import httpx
except ImportError as error:
    raise ImportError("fullrank.client needs httpx: pip install 'fullrank[client]'") from error

Image = bytes | str | os.PathLike[str]  # an encoded image, or the path of one
Rows = NDArray[np.float32]
T = TypeVar("T")
BATCH_BYTES = 16 * 2**20  # half of what a service accepts unless told otherwise
BUSY = (429, 503)
TOO_MUCH = ("body_too_large", "too_many_images")


class EmbeddingError(Exception):
    """What the service refused, in its words; `image` is the index of the image to blame, if one is."""

    def __init__(self, code: str, message: str, *, status: int | None = None, image: int | None = None) -> None:
        super().__init__(message)
        self.code, self.status, self.image = code, status, image


@dataclass(frozen=True)
class _Batch:
    """Images [start, start + n) of what was asked for."""

    start: int
    images: list[Image]

    def halves(self) -> "tuple[_Batch, _Batch]":
        middle = len(self.images) // 2
        return _Batch(self.start, self.images[:middle]), _Batch(self.start + middle, self.images[middle:])


@dataclass(frozen=True)
class _Part:
    rows: Rows
    encoder: tuple[str, str]


_Talk = Generator[httpx.Request | float, Any, _Part]


class _Base:
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
        """`batch` images in a request, `concurrency` requests at a time; each is sent again up to `retries` times

        while the service is full or starting (429, 503), after the seconds it asks for but at most `longest_wait`.
        `timeout` is in seconds, for one request. `progress` draws a bar on standard error (needs rich).
        """
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

    def _batches(self, images: list[Image]) -> Iterator[_Batch]:
        start = size = 0
        for index, image in enumerate(images):
            length = len(image) if isinstance(image, bytes) else Path(image).stat().st_size
            if index > start and (index - start == self.batch or size + length > BATCH_BYTES):
                yield _Batch(start, images[start:index])
                start, size = index, 0
            size += length
        if images:
            yield _Batch(start, images[start:])

    def _talk(self, batch: _Batch, params: dict[str, str]) -> _Talk:
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
        for attempt in itertools.count():
            response: httpx.Response = yield request
            if response.status_code not in BUSY or attempt >= self.retries:
                break
            yield self._wait(response, attempt)
        if response.is_success:
            rows = np.load(io.BytesIO(response.content), allow_pickle=False)
            return _Part(rows, (response.headers["X-Model"], response.headers["X-Revision"]))
        refusal = self._refusal(response, batch)
        if refusal.code not in TOO_MUCH or len(batch.images) == 1:
            raise refusal
        parts = []
        for half in batch.halves():
            parts.append((yield from self._talk(half, params)))
        return _Part(np.concatenate([part.rows for part in parts]), _same_encoder(parts))

    def _wait(self, response: httpx.Response, attempt: int) -> float:
        asked = response.headers.get("Retry-After", "")
        seconds = float(asked) if asked.isdecimal() else 0.5 * 2**attempt
        return min(seconds, self.longest_wait) * random.uniform(1.0, 1.25)  # so that not all come back at once

    def _refusal(self, response: httpx.Response, batch: _Batch) -> EmbeddingError:
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
        reason = str(error) or type(error).__name__
        return EmbeddingError("unreachable", f"no answer from {self.url} ({reason}); is the service running there?")

    def _finish(self, parts: list[_Part]) -> Rows:
        if not parts:
            return np.empty((0, 0), np.float32)
        self.model, self.revision = _same_encoder(parts)
        return np.concatenate([part.rows for part in parts])

    @contextmanager
    def _bar(self, images: int) -> Iterator[Callable[[_Part], None]]:
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
        for attempt in itertools.count():
            response: httpx.Response = yield request
            if response.status_code not in BUSY or attempt >= self.retries:
                break
            yield self._wait(response, attempt)
        if not response.is_success:
            raise self._refusal(response, _Batch(0, []))


class Client(_Base):
    """See the module; may be used from several threads."""

    def __init__(self, url: str = "http://127.0.0.1:8000", **options: Any) -> None:
        super().__init__(url, **options)
        self._http: httpx.Client = httpx.Client(**self._options)

    def embed(self, images: Image | Iterable[Image], *, normalize: bool = True, model: str | None = None) -> Rows:
        """Encoded images or their paths -> (n, d) float32 in the same order, of unit norm unless asked otherwise.

        `model` is NAME or NAME@REVISION, where several encoders are served. Raises EmbeddingError naming the file or
        the index of a bad image, or if the encoder was swapped meanwhile; OSError for a file that cannot be read. No
        images give (0, 0).
        """
        asked, params = _listed(images), _params(normalize, model)
        with self._bar(len(asked)) as advance, ThreadPoolExecutor(self.concurrency) as pool:

            def one(batch: _Batch) -> _Part:
                part = self._converse(self._talk(batch, params))
                advance(part)
                return part

            return self._finish(list(pool.map(one, self._batches(asked))))

    def observe(
        self,
        model: str,
        rows: Rows | None = None,
        *,
        keys: Sequence[Any] | None = None,
        inputs: Rows | None = None,
        canary: Rows | None = None,
    ) -> None:
        """Hand over embeddings (n, d) made elsewhere, under the name `model`, to be watched: POST /observe.

        keys: n content hashes (integers, strings or bytes), so that a hot item counts once; inputs: (n, k) small
        descriptors of what was embedded; canary: (m, d), what the reference's canary images embed to now. Raises
        EmbeddingError for what the service refuses, ValueError that names an array of the wrong shape.
        """
        for request in self._report(model, rows, keys, inputs, canary):
            self._converse(self._told(request))

    def _converse(self, talk: Generator[httpx.Request | float, Any, T]) -> T:
        response = None
        try:
            while True:
                step = talk.send(response)
                response = None
                if isinstance(step, float):
                    time.sleep(step)
                else:
                    response = self._http.send(step)
        except StopIteration as end:
            value: T = end.value
            return value
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def info(self) -> dict[str, Any]:
        """The encoder in service and the limits that hold. Raises EmbeddingError."""
        try:
            response = self._http.get("/info")
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if not response.is_success:
            raise self._refusal(response, _Batch(0, []))
        found: dict[str, Any] = response.json()
        return found

    def close(self) -> None:
        """End the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClient(_Base):
    """Client, on an event loop."""

    def __init__(self, url: str = "http://127.0.0.1:8000", **options: Any) -> None:
        super().__init__(url, **options)
        self._http: httpx.AsyncClient = httpx.AsyncClient(**self._options)

    async def embed(self, images: Image | Iterable[Image], *, normalize: bool = True, model: str | None = None) -> Rows:
        """As Client.embed."""
        asked, params = _listed(images), _params(normalize, model)
        places = asyncio.Semaphore(self.concurrency)
        with self._bar(len(asked)) as advance:

            async def one(batch: _Batch) -> _Part:
                async with places:
                    part = await self._converse(self._talk(batch, params))
                advance(part)
                return part

            tasks = [asyncio.create_task(one(batch)) for batch in self._batches(asked)]
            try:
                return self._finish(await asyncio.gather(*tasks))
            finally:
                for task in tasks:
                    task.cancel()

    async def observe(
        self,
        model: str,
        rows: Rows | None = None,
        *,
        keys: Sequence[Any] | None = None,
        inputs: Rows | None = None,
        canary: Rows | None = None,
    ) -> None:
        """As Client.observe."""
        for request in self._report(model, rows, keys, inputs, canary):
            await self._converse(self._told(request))

    async def _converse(self, talk: Generator[httpx.Request | float, Any, T]) -> T:
        response = None
        try:
            while True:
                step = talk.send(response)
                response = None
                if isinstance(step, float):
                    await asyncio.sleep(step)
                else:
                    response = await self._http.send(step)
        except StopIteration as end:
            value: T = end.value
            return value
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    async def info(self) -> dict[str, Any]:
        """As Client.info."""
        try:
            response = await self._http.get("/info")
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if not response.is_success:
            raise self._refusal(response, _Batch(0, []))
        found: dict[str, Any] = response.json()
        return found

    async def close(self) -> None:
        """As Client.close."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


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


def _listed(images: Image | Iterable[Image]) -> list[Image]:
    return [images] if isinstance(images, bytes | str | os.PathLike) else list(images)


def _params(normalize: bool, model: str | None) -> dict[str, str]:
    return {"normalize": str(normalize).lower()} | ({} if model is None else {"model": model})


def _same_encoder(parts: list[_Part]) -> tuple[str, str]:
    encoders = sorted({part.encoder for part in parts})
    if len(encoders) > 1:
        names = " and ".join("@".join(encoder) for encoder in encoders)
        message = f"the encoder was swapped meanwhile; rows of {names} do not compare: embed again"
        raise EmbeddingError("encoder_changed", message)
    return encoders[0]
