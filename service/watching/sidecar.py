"""Monitors of embeddings made elsewhere: POST /observe turns a replica into a sidecar of any embedding service."""

import asyncio
from collections.abc import Iterator

from safetensors import SafetensorError
from safetensors.torch import load_file

from fullrank import Reference, SpectrumMonitor
from service.engine.queue import Rows
from service.failures import InvalidError, NotFoundError
from service.settings import Settings
from service.watching.persistence import WindowStore

REVISION = "observed"


class Sidecar:
    """One monitor for each model name seen, never the served encoder's: rows from outside must not mute its alerts."""

    def __init__(self, settings: Settings, store: WindowStore) -> None:
        self._settings, self._store = settings, store
        self._monitors: dict[str, SpectrumMonitor] = {}
        self._opening = asyncio.Lock()

    async def observe(self, model: str, rows: Rows) -> None:
        """Hand rows (n, d) to the model's monitor, the first time one with its reference and the windows of before.

        Raises InvalidError for another width, a model too many or a reference that is damaged or of another width.
        """
        if model not in self._monitors:
            # At d = 2048 the reference takes a while to read: off the loop, and once for all who ask meanwhile.
            async with self._opening:
                if model not in self._monitors:
                    await asyncio.to_thread(self._open, model, rows.shape[1])
        monitor = self._monitors[model]
        if rows.shape[1] != monitor.dimension:
            message = (
                f"rows of {model} have {monitor.dimension} dimensions, not {rows.shape[1]}; give another model name"
            )
            raise InvalidError("invalid_field", message, field="rows")
        monitor.observe(rows)

    def _open(self, model: str, dimension: int) -> None:
        limit = self._settings.max_observed_models
        if len(self._monitors) >= limit:
            message = f"{limit} models are observed already, the limit; use one of {', '.join(self._monitors)}"
            raise InvalidError("too_many_models", message, field="model")
        monitor = SpectrumMonitor(
            dimension,
            self._reference(model, dimension),
            windows=self._settings.windows,
            block_rows=self._settings.block_rows,
        )
        self._store.restore(model, REVISION, monitor)
        # Here, not after the thread is awaited: a caller that is gone by then would leave a monitor that nobody ends.
        self._monitors[model] = monitor

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
            return self._monitors[model]
        except KeyError:
            there = ", ".join(self._monitors) or "none"
            message = f"no embeddings of {model!r} were observed; observed are: {there}"
            raise NotFoundError("no_such_model", message, field="model") from None

    def __iter__(self) -> Iterator[tuple[str, str, SpectrumMonitor]]:
        # A copy: a scrape iterates on another thread.
        return iter([(model, REVISION, monitor) for model, monitor in self._monitors.copy().items()])

    async def close(self) -> None:
        """End the monitors, one that is being opened included."""
        async with self._opening:
            await asyncio.gather(*(asyncio.to_thread(monitor.close) for monitor in self._monitors.values()))
