"""Monitors of embeddings made elsewhere: POST /observe turns a replica into a sidecar of any embedding service."""

import asyncio
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from safetensors import SafetensorError
from safetensors.torch import load_file

from fullrank import Reference, SpectrumMonitor
from service.engine.queue import Rows
from service.failures import InvalidError, NotFoundError
from service.settings import Settings
from service.watching.persistence import WindowStore

REVISION = "observed"


# Upper bound on the memory of a monitor: MATRICES float64 matrices of dimension x dimension, and BESIDES bytes.
MATRICES = 24
BESIDES = 8 * 2**20
LOOK = 30.0  # seconds between two checks for idle models


def memory_of(dimension: int) -> int:
    """Bytes of memory that a monitor of rows of this dimension takes at most."""
    return MATRICES * 8 * dimension**2 + BESIDES


@dataclass(eq=False)
class Observed:
    """A model whose rows come by POST /observe: its monitor, and the time.monotonic() of its latest rows."""

    monitor: SpectrumMonitor
    last: float


class Sidecar:
    """Keeps one monitor for each model name that POST /observe sent.

    Monitors of served encoders are separate: rows from outside must not mute their alerts. A model that got no rows for
    the longest window is removed, which frees its place and its memory.
    """

    def __init__(self, settings: Settings, store: WindowStore) -> None:
        self._settings = settings
        self._store = store
        self._models: dict[str, Observed] = {}
        self._opening = asyncio.Lock()

    async def observe(self, model: str, rows: Rows) -> None:
        """Give rows (n, d) to the model's monitor. A new model gets a monitor, its reference and its stored windows.

        Raises InvalidError if d is not the model's dimension, if there are too many models, if there is no memory left,
        or if the reference is damaged or of another dimension.
        """
        if model not in self._models:
            # At d = 2048 the reference takes a while to read. So it is read off the loop, once for concurrent requests.
            async with self._opening:
                if model not in self._models:
                    await self._end(self._idle())
                    await asyncio.to_thread(self._open, model, rows.shape[1])
        observed = self._models[model]
        dimension = observed.monitor.dimension
        if rows.shape[1] != dimension:
            message = f"rows of {model} have {dimension} dimensions, not {rows.shape[1]}; give another model name"
            raise InvalidError("invalid_field", message, field="rows")
        observed.last = time.monotonic()
        observed.monitor.observe(rows)

    async def forget_idle(self) -> None:
        """Run for ever: remove models that got no rows for the longest window."""
        while True:
            await asyncio.sleep(LOOK)
            async with self._opening:
                await self._end(self._idle())

    def _idle(self) -> list[str]:
        since = time.monotonic() - max(self._settings.windows)
        return [model for model, observed in self._models.items() if observed.last < since]

    async def _end(self, models: Iterable[str]) -> None:
        ending = [self._models.pop(model) for model in models]
        await asyncio.gather(*(asyncio.to_thread(observed.monitor.close) for observed in ending))

    def _open(self, model: str, dimension: int) -> None:
        self._check_room(dimension)
        monitor = SpectrumMonitor(
            dimension,
            self._reference(model, dimension),
            windows=self._settings.windows,
            block_rows=self._settings.block_rows,
        )
        self._store.restore(model, REVISION, monitor)
        # Here, not after the await: if the caller were cancelled meanwhile, nothing would ever close the monitor.
        self._models[model] = Observed(monitor, time.monotonic())

    def _check_room(self, dimension: int) -> None:
        """Raise InvalidError if one more model, or its memory, would exceed the limits."""
        limit = self._settings.max_observed_models
        known = ", ".join(self._models) or "none"
        if len(self._models) >= limit:
            message = f"{limit} models are observed already, the limit; use one of {known}"
            raise InvalidError("too_many_models", message, field="model")
        room = self._settings.max_observed_bytes - sum(
            memory_of(observed.monitor.dimension) for observed in self._models.values()
        )
        if (needed := memory_of(dimension)) > room:
            message = (
                f"a monitor of {dimension} dimensions takes up to {needed / 2**20:.0f} MiB and "
                f"{max(0, room) / 2**20:.0f} are left of max_observed_bytes; observed are: {known}"
            )
            raise InvalidError("too_many_models", message, field="rows")

    def _reference(self, model: str, dimension: int) -> Reference | None:
        folder = self._settings.references_dir
        if folder is None or not (path := folder / f"{model}.safetensors").exists():
            return None
        try:
            reference = Reference.from_tensors(load_file(path))
        except (ValueError, SafetensorError, OSError) as error:
            raise InvalidError("bad_reference", f"{path.name}: {error}", field="model") from error
        if reference.dimension != dimension:
            message = f"{path.name} describes {reference.dimension} dimensions, the rows have {dimension}"
            raise InvalidError("bad_reference", message, field="rows")
        return reference

    def get(self, model: str) -> SpectrumMonitor:
        """The model's monitor. Raises NotFoundError."""
        try:
            return self._models[model].monitor
        except KeyError:
            there = ", ".join(self._models) or "none"
            message = f"no embeddings of {model!r} were observed; observed are: {there}"
            raise NotFoundError("no_such_model", message, field="model") from None

    def __iter__(self) -> Iterator[tuple[str, str, SpectrumMonitor]]:
        # A copy: a scrape iterates on another thread.
        return iter([(model, REVISION, observed.monitor) for model, observed in self._models.copy().items()])

    async def close(self) -> None:
        """Close all monitors, also one that is being opened. Their windows can still be read."""
        async with self._opening:
            await asyncio.gather(*(asyncio.to_thread(it.monitor.close) for it in self._models.values()))
