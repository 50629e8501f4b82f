"""Monitors of embeddings made elsewhere: POST /observe turns a replica into a sidecar of any embedding service."""

import asyncio
from collections.abc import Iterator

from fullrank import SpectrumMonitor
from service.batching import Rows
from service.errors import Problem
from service.settings import Settings

REVISION = "observed"


class Sidecar:
    """One monitor for each model name seen, never the served encoder's: rows from outside must not mute its alerts."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._monitors: dict[str, SpectrumMonitor] = {}

    def observe(self, model: str, rows: Rows) -> None:
        """Hand rows (n, d) to the model's monitor. Raises Problem 422 for another width or a model too many."""
        limit = self._settings.max_observed_models
        monitor = self._monitors.get(model)
        if monitor is None:
            if len(self._monitors) >= limit:
                message = f"{limit} models are observed already, the limit; use one of {', '.join(self._monitors)}"
                raise Problem(422, "too_many_models", message, field="model")
            monitor = SpectrumMonitor(
                rows.shape[1], windows=self._settings.windows, block_rows=self._settings.block_rows
            )
            self._monitors[model] = monitor
        if rows.shape[1] != monitor.dimension:
            message = (
                f"rows of {model} have {monitor.dimension} dimensions, not {rows.shape[1]}; give another model name"
            )
            raise Problem(422, "invalid_field", message, field="rows")
        monitor.observe(rows)

    def get(self, model: str) -> SpectrumMonitor:
        """The model's monitor. Raises Problem 404."""
        try:
            return self._monitors[model]
        except KeyError:
            there = ", ".join(self._monitors) or "none"
            message = f"no embeddings of {model!r} were observed; observed are: {there}"
            raise Problem(404, "no_such_model", message, field="model") from None

    def __iter__(self) -> Iterator[tuple[str, str, SpectrumMonitor]]:
        # A copy: a scrape iterates on another thread.
        return iter([(model, REVISION, monitor) for model, monitor in self._monitors.copy().items()])

    async def close(self) -> None:
        """End the monitors."""
        await asyncio.gather(*(asyncio.to_thread(monitor.close) for monitor in self._monitors.values()))
