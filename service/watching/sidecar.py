"""Monitors of embeddings made elsewhere: POST /observe turns a replica into a sidecar of any embedding service."""

import asyncio
import logging
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fullrank import Reference, SpectrumMonitor
from fullrank.stored import tensors_in
from service.failures import ConflictError, InvalidError, NotFoundError
from service.settings import Settings
from service.watching.observation import Observation
from service.watching.persistence import WindowStore
from service.watching.sampling import Clients

log = logging.getLogger("fullrank.service")
Stamp = tuple[int, int, int]
REVISION = "observed"
MAX_DIMENSION = 8192


# Upper bound on the memory of a monitor: MATRICES float64 matrices of dimension x dimension, as many of its inputs,
# and BESIDES bytes.
MATRICES = 24
BESIDES = 8 * 2**20
LOOK = 30.0  # seconds between two checks for idle models
# Seconds of its share of the rate that one of several senders may post at once: they collect rows before they post.
COLLECTED = 60.0


def memory_of(dimension: int, inputs: int = 0) -> int:
    """Bytes of memory that a monitor of rows of this dimension, and of inputs of this width, takes at most."""
    return MATRICES * 8 * (dimension**2 + inputs**2) + BESIDES


@dataclass(eq=False)
class Observed:
    """A model whose rows come by POST /observe: its monitor, those who send them, and the time.monotonic() of its
    latest rows.

    stamp: tells one state of its reference's file from another; None without a file.
    """

    monitor: SpectrumMonitor
    senders: Clients
    last: float
    stamp: Stamp | None = None

    def share(self, observation: Observation, sender: int) -> Observation:
        """What the monitor may have of rows from this sender: all, or where there are others, a random part."""
        rows = observation.rows
        left = None if rows is None else self.senders.left([sender], time.monotonic())
        if rows is None or left is None:
            return observation
        kept = min(len(rows), left[sender])
        self.senders.spend(sender, kept)
        return observation if kept == len(rows) else observation.some(kept)


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

    async def observe(self, model: str, observation: Observation, sender: int = 0) -> tuple[SpectrumMonitor, int]:
        """Give rows to the model's monitor; return it, and how many rows it got. A new model gets a monitor, its
        reference and stored windows.

        sender: tells apart who posts. Where several did within the shortest window, the monitor gets at most a quarter
        of `monitor_rate` from each, so that one that floods cannot make up most of it.
        Raises InvalidError if the width of rows, inputs or canary is not the model's, if there are too many models, if
        there is no memory left, or if the reference is damaged or of another dimension.
        """
        dimension = observation.dimension
        if model not in self._models:
            # At d = 2048 the reference takes a while to read. So it is read off the loop, once for concurrent requests.
            async with self._opening:
                if model not in self._models:
                    await self._end(self._idle())
                    await asyncio.to_thread(self._open, model, dimension)
        observed = self._models[model]
        monitor = observed.monitor
        if dimension != monitor.dimension:
            message = f"rows of {model} have {monitor.dimension} dimensions, not {dimension}; give another model name"
            raise InvalidError("invalid_field", message, field="canary" if observation.rows is None else "rows")
        self._check_inputs(model, monitor, observation)
        observed.last = time.monotonic()
        observation = observed.share(observation, sender)
        got = 0 if observation.rows is None else len(observation.rows)
        try:
            if observation.canary is not None:
                monitor.record_canary(observation.canary)
            if observation.rows is not None and got:
                monitor.observe(observation.rows, observation.keys, observation.inputs)
        except ValueError as error:  # it begins with the argument to blame
            raise InvalidError("invalid_field", str(error), field=str(error).partition(":")[0]) from error
        return monitor, got

    async def keep(self) -> None:
        """Run for ever: remove models that got no rows for the longest window, and read references that changed."""
        while True:
            await asyncio.sleep(LOOK)
            try:
                async with self._opening:
                    await self._end(self._idle())
                await self.reload()
            except Exception:
                log.exception("idle models were not removed, or references not read again")

    async def reload(self) -> None:
        """Read references whose files changed. Their models begin with empty windows: nothing spans two references."""
        async with self._opening:
            for model, observed in list(self._models.items()):
                if self._stamp(model) != observed.stamp:
                    await asyncio.to_thread(self._reopen, model, observed)

    def _reopen(self, model: str, observed: Observed) -> None:
        stamp = self._stamp(model)
        try:
            reference = self._reference(model, observed.monitor.dimension)
        except InvalidError as error:
            observed.stamp = stamp  # say it once
            log.error("%s keeps its reference: %s", model, error.message)
            return
        monitor = self._monitor(observed.monitor.dimension, reference)
        self._models[model] = Observed(monitor, observed.senders, observed.last, stamp)
        observed.monitor.close()
        log.info("%s is compared with another reference; its windows begin anew", model)

    async def put_reference(self, model: str, body: bytes) -> Reference:
        """Store a reference, as Reference.tensors() gives it in safetensors, and compare the model with it from now on.

        Raises InvalidError if it is damaged or of another dimension than the model's rows, and ConflictError if there
        is no folder to store it in.
        """
        folder = self._settings.references_dir
        if folder is None:
            message = "there is no folder for references; start the service with FULLRANK_REFERENCES_DIR"
            raise ConflictError("no_references_dir", message)
        reference = await asyncio.to_thread(_parsed, body)
        known = self._models.get(model)
        if known is not None and known.monitor.dimension != reference.dimension:
            message = f"rows of {model} have {known.monitor.dimension} dimensions, the reference {reference.dimension}"
            raise InvalidError("bad_reference", message, field="body")
        try:
            await asyncio.to_thread(_store, folder / f"{model}.safetensors", body)
        except OSError as error:
            raise ConflictError("references_dir", f"{folder} cannot be written: {error.strerror}") from error
        await self.reload()
        return reference

    def _idle(self) -> list[str]:
        since = time.monotonic() - max(self._settings.windows)
        return [model for model, observed in self._models.items() if observed.last < since]

    async def _end(self, models: Iterable[str]) -> None:
        ending = [self._models.pop(model) for model in models]
        await asyncio.gather(*(asyncio.to_thread(observed.monitor.close) for observed in ending))

    def _open(self, model: str, dimension: int) -> None:
        self._check_room(dimension)
        stamp = self._stamp(model)
        monitor = self._monitor(dimension, self._reference(model, dimension))
        self._store.restore(model, REVISION, monitor)
        # Here, not after the await: if the caller were cancelled meanwhile, nothing would ever close the monitor.
        rate = self._settings.monitor_rate
        senders = Clients(rate, COLLECTED * rate, self._settings.windows[0])
        self._models[model] = Observed(monitor, senders, time.monotonic(), stamp)

    def _monitor(self, dimension: int, reference: Reference | None) -> SpectrumMonitor:
        settings = self._settings
        return SpectrumMonitor(dimension, reference, windows=settings.windows, block_rows=settings.block_rows)

    def _stamp(self, model: str) -> Stamp | None:
        """What tells one state of a reference's file from another."""
        folder = self._settings.references_dir
        try:
            found = None if folder is None else (folder / f"{model}.safetensors").stat()
        except OSError:
            return None
        return None if found is None else (found.st_mtime_ns, found.st_size, found.st_ino)

    def _check_room(self, dimension: int) -> None:
        """Raise InvalidError if one more model, or its memory, would exceed the limits."""
        limit = self._settings.max_observed_models
        if len(self._models) >= limit:
            message = f"{limit} models are observed already, the limit; use one of {', '.join(self._models)}"
            raise InvalidError("too_many_models", message, field="model")
        self._check_memory(memory_of(dimension), f"a monitor of {dimension} dimensions takes", "rows")

    def _check_inputs(self, model: str, monitor: SpectrumMonitor, observation: Observation) -> None:
        """Raise InvalidError for inputs that cannot be compared with the reference's, since they would vouch for
        nothing, and for a model's first ones if there is no memory for them."""
        if observation.inputs is None:
            return
        width = observation.inputs.shape[1]
        known = None if monitor.reference is None else monitor.reference.inputs
        if known is not None and not known.fits(width):
            message = f"the inputs of {model}'s reference have {known.width} values each, these {width}"
            raise InvalidError("invalid_field", message, field="inputs")
        if width != monitor.input_width:
            needed = memory_of(0, width) - BESIDES
            self._check_memory(needed, f"the statistics of inputs of {width} values take", "inputs")

    def _check_memory(self, needed: int, what: str, field: str) -> None:
        """Raise InvalidError if so many more bytes would exceed the limit."""
        # A copy: another thread may add a model meanwhile.
        models = self._models.copy().values()
        held = (memory_of(it.monitor.dimension, it.monitor.input_width or 0) for it in models)
        room = self._settings.max_observed_bytes - sum(held)
        if needed > room:
            message = (
                f"{what} up to {needed / 2**20:.0f} MiB and "
                f"{max(0, room) / 2**20:.0f} are left of max_observed_bytes; observed are: "
                f"{', '.join(self._models) or 'none'}"
            )
            raise InvalidError("too_many_models", message, field=field)

    def _reference(self, model: str, dimension: int) -> Reference | None:
        folder = self._settings.references_dir
        if folder is None or not (path := folder / f"{model}.safetensors").exists():
            return None
        try:
            # Read, not mapped: the file may be overwritten, and a mapped one would end the process (SIGBUS).
            reference = Reference.from_tensors(tensors_in(path.read_bytes()))
        except (ValueError, OSError) as error:
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

    def only(self) -> tuple[str, SpectrumMonitor]:
        """The one model that is observed, and its monitor. Raises NotFoundError unless there is exactly one."""
        if len(self._models) == 1:
            ((name, observed),) = self._models.items()
            return name, observed.monitor
        there = ", ".join(self._models) or "none yet; POST /observe brings them"
        message = f"this service serves no encoder; name an observed model, ?model=NAME; observed are: {there}"
        raise NotFoundError("no_such_model", message, field="model")

    def __iter__(self) -> Iterator[tuple[str, str, SpectrumMonitor]]:
        # A copy: a scrape iterates on another thread.
        return iter([(model, REVISION, observed.monitor) for model, observed in self._models.copy().items()])

    async def close(self) -> None:
        """Close all monitors, also one that is being opened. Their windows can still be read."""
        async with self._opening:
            await asyncio.gather(*(asyncio.to_thread(it.monitor.close) for it in self._models.values()))


def _parsed(body: bytes) -> Reference:
    try:
        return Reference.from_tensors(tensors_in(body))
    except ValueError as error:
        raise InvalidError("bad_reference", f"the body is no reference: {error}", field="body") from error


def _store(path: Path, body: bytes) -> None:
    """Replace a file as a whole, so that nobody reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".reference-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
