"""A client of the service: images in, one array of embeddings out, in order. It needs httpx and no torch.

    from fullrank.client import Client
    with Client("http://127.0.0.1:8000") as client:
        rows = client.embed(["a.jpg", "b.png"])     # (2, d) float32, unit rows, all from client.revision

`AsyncClient` is the same with `async with` and `await`.
"""

import asyncio
import time
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self, TypeVar

from fullrank.conversation import Batch, Conversation, EmbeddingError, Image, Part, Rows, httpx, listed, params_of

__all__ = ["EmbeddingError", "Client", "AsyncClient"]  # noqa: RUF022  (the order of the documentation)
T = TypeVar("T")


class Client(Conversation):
    """The client, to be used in a `with` or closed; may be used from several threads.

    options: `key`, the service's; `batch` (32) images in a request, `concurrency` (4) requests at a time; `retries`
    (8), how often each is sent again while the service is full or starting (429, 503), after the seconds that it asks
    for but at most `longest_wait` (30); `timeout` (60), seconds for one request; `progress` draws a bar on standard
    error (needs rich). `model` and `revision` are those of the last rows.
    """

    def __init__(self, url: str = "http://127.0.0.1:8000", **options: Any) -> None:
        super().__init__(url, **options)
        self._http: httpx.Client = httpx.Client(**self._options)

    def embed(self, images: Image | Iterable[Image], *, normalize: bool = True, model: str | None = None) -> Rows:
        """Encoded images or their paths -> (n, d) float32 in the same order, of unit norm unless asked otherwise.

        `model` is NAME or NAME@REVISION, where several encoders are served. Raises EmbeddingError naming the file or
        the index of a bad image, or if the encoder was swapped meanwhile; OSError for a file that cannot be read. No
        images give (0, 0).
        """
        asked, params = listed(images), params_of(normalize, model)
        with self._bar(len(asked)) as advance, ThreadPoolExecutor(self.concurrency) as pool:

            def one(batch: Batch) -> Part:
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
            raise self._refusal(response, Batch(0, []))
        found: dict[str, Any] = response.json()
        return found

    def close(self) -> None:
        """End the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClient(Conversation):
    """Client, on an event loop, with the same options."""

    def __init__(self, url: str = "http://127.0.0.1:8000", **options: Any) -> None:
        super().__init__(url, **options)
        self._http: httpx.AsyncClient = httpx.AsyncClient(**self._options)

    async def embed(self, images: Image | Iterable[Image], *, normalize: bool = True, model: str | None = None) -> Rows:
        """As Client.embed."""
        asked, params = listed(images), params_of(normalize, model)
        places = asyncio.Semaphore(self.concurrency)
        with self._bar(len(asked)) as advance:

            async def one(batch: Batch) -> Part:
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
            raise self._refusal(response, Batch(0, []))
        found: dict[str, Any] = response.json()
        return found

    async def close(self) -> None:
        """As Client.close."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
