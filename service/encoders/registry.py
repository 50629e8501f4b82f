"""The service without HTTP: it admits requests, has its encoders embed their images, and drains at shutdown."""

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Literal, NoReturn

import torch

from fullrank import SpectrumMonitor
from service.encoders.health import Health, Limits
from service.encoders.roster import ServedEncoders, Swap
from service.encoders.served import Answer, Served, Source
from service.engine.engine import Engine
from service.engine.queue import Admission, Job, OverloadError
from service.failures import (
    DeadlineError,
    EmbeddingError,
    NotFoundError,
    OverloadedError,
    ServiceError,
    UnreadyError,
)
from service.metrics import Metrics
from service.settings import NONE, Gate, Settings
from service.watching import history
from service.watching.history import History
from service.watching.listeners import Listeners
from service.watching.observer import Observer
from service.watching.peers import Peers
from service.watching.persistence import WindowStore
from service.watching.sidecar import Sidecar
from service.watching.traffic import Meter

log = logging.getLogger("fullrank.service")
Phase = Literal["starting", "ready", "draining", "stopped"]


class Service:
    """One replica of the service. All public methods run on the event loop that load() runs on."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self.phase: Phase = "starting"
        self.failure: str | None = None
        self.admission = Admission(settings.max_pending_images)
        metrics.watch_pending(lambda: self.admission.pending, settings.max_pending_images)
        self.engine = Engine(
            settings.max_batch,
            settings.threads,
            metrics,
            settings.decode_threads,
            decode_seconds=settings.decode_seconds,
            decode_memory=settings.decode_memory_bytes,
            pinned=torch.device(settings.device).type == "cuda",
            lanes=settings.lanes,
        )
        self.roster = ServedEncoders(settings, self.engine, metrics, Observer(metrics, settings.monitor_rate))
        limits = Limits(settings.request_timeout, settings.liveness_seconds)
        self.health = Health(self.engine, self.roster.all, metrics, limits)
        self.store = WindowStore(settings.state_dir, metrics, max(settings.windows))
        self.sidecar = Sidecar(settings, self.store)
        self.peers: Peers | None = None  # the other replicas, if this is one of a fleet
        self.history = History()
        self.listeners = Listeners()
        self._meter = Meter(metrics)
        self._tasks: list[asyncio.Task[None]] = []

    async def load(self) -> None:
        """Load, warm up and check the configured encoders; ArtifactError if one cannot be trusted."""
        try:
            await self.roster.load()
        except Exception as error:
            self.failure = str(error)
            raise
        for served in self.in_service():
            if served.monitor is not None:
                await asyncio.to_thread(self.store.restore, served.name, served.revision, served.monitor)
        await asyncio.to_thread(self.store.restore_history, self.history.restore)
        self._tasks = [
            asyncio.create_task(self.store.keep(self.monitors, self.settings.state_period, self.history.state)),
            asyncio.create_task(self._remember()),
            asyncio.create_task(self.health.watch()),
            asyncio.create_task(self.sidecar.keep()),
        ]
        self.phase = "ready"
        serving = [f"{it} in {it.embedder.runs_in}" for it in self.in_service()]
        log.info("serving %s", "; ".join(serving) or "no encoder: a sidecar for POST /observe")
        names = {"default", *(served.name for served in self.in_service())}
        for alias, name in self.settings.aliases.items():
            if name not in names:
                log.warning("the alias %s means %s, which is not in service: requests for it get 404", alias, name)

    async def _remember(self) -> None:
        """Run for ever: add points to the history."""
        period = min(history.PERIOD, max(1.0, min(self.settings.windows) / 20))
        while True:
            try:
                self.history.record(self.monitors(), self._meter.read(time.monotonic()), time.time())
            except Exception:
                log.exception("no point was added to the history")
            await asyncio.sleep(period)

    # ---- encoders

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop that all public methods run on, known once load() was called."""
        return self.engine.loop

    @property
    def current(self) -> Served:
        """The default encoder, which serves requests that name none. Raises UnreadyError while there is none."""
        return self.served()

    def served(self, model: str | None = None) -> Served:
        """The encoder called `model`, NAME or NAME@REVISION, or the default. Raises NotFoundError or UnreadyError."""
        if not len(self.roster) and self.settings.encoder == NONE and self.phase != "starting":
            message = "this service serves no encoder (FULLRANK_ENCODER=none); it takes embeddings at POST /observe"
            raise NotFoundError("no_encoder", message, field=None if model is None else "model")
        if not len(self.roster):
            message = self.failure or "the encoder is still loading; GET /readyz says when it serves"
            raise UnreadyError("failed" if self.failure else "starting", message, retry_after=1)
        return self.roster.find(model)

    def in_service(self) -> list[Served]:
        """The encoders in service, the default first; none while starting."""
        return self.roster.all()

    def monitors(self) -> list[tuple[str, str, SpectrumMonitor]]:
        """(model, revision, monitor) of every model watched. Scrapes call this on any thread."""
        served = [(it.name, it.revision, it.monitor) for it in self.in_service() if it.monitor is not None]
        return [*served, *self.sidecar]

    def unready(self) -> str | None:
        """Why this replica should get no requests now; None if it is ready."""
        if self.phase != "ready":
            return self.failure or f"the service is {self.phase}"
        return self.health.fault()

    async def swap(self, name: str, gate: Gate, replaces: str | None = None) -> Swap:
        """Swap an encoder as ServedEncoders.swap does, and then in all peers. Raises UnreadyError too."""
        try:
            self.served(replaces)
        except NotFoundError as error:
            raise NotFoundError(error.code, error.message, field=error.field and "replaces") from None
        swap = await self.roster.swap(name, gate, replaces)
        if self.peers is not None:
            await self.peers.swapped(name, gate, replaces)
        return swap

    async def reload(self) -> None:
        """Read the encoders' folders again, as ServedEncoders.reload does."""
        await self.roster.reload()
        await self.sidecar.reload()

    # ---- requests

    async def embed(
        self,
        sources: Sequence[Source],
        deadline: float,
        model: str | None = None,
        *,
        client_deadline: bool = False,
        client: int = 0,
    ) -> Answer:
        """Decode and embed images. All rows come from one encoder; see served().

        deadline: in time.monotonic() seconds. client_deadline: the client set it, so missing it is counted apart.
        client: tells clients apart in the monitor's sample.
        Raises NotFoundError for a model that is not in service, InvalidError for a bad image, OverloadedError when
        full, UnreadyError while starting or stopped, DeadlineError, EmbeddingError for a row that is no embedding.
        """
        served = self._admitting(len(sources), model)
        try:
            self.admission.enter(len(sources))
        except OverloadError as full:
            await self._refuse(full, len(sources))
        served.in_flight += 1
        try:
            job = await self._embedded(served, sources, deadline, client_deadline, client)
        finally:
            served.in_flight -= 1
            self.admission.leave(len(sources))
        self.metrics.images.inc(len(sources))
        served.images.inc(len(sources))
        queued = max(0.0, job.started - job.queued - job.decode_seconds)
        answer = Answer(served, job.rows, job.unit, job.decode_seconds, queued, job.forward_seconds)
        self.metrics.phase["decode"].observe(answer.decode_seconds)
        self.metrics.phase["queue"].observe(answer.queue_seconds)
        self.metrics.phase["forward"].observe(answer.forward_seconds)
        return answer

    def _admitting(self, images: int, model: str | None) -> Served:
        """The encoder that a request goes to. Raises NotFoundError or UnreadyError."""
        try:
            served = self.served(model)
            if self.phase == "stopped":
                raise UnreadyError("draining", "this replica is shutting down; send the request again", retry_after=1)
        except UnreadyError:
            self.metrics.rejected["unready"].inc(images)
            raise
        return served

    async def _refuse(self, full: OverloadError, images: int) -> NoReturn:
        """Raise OverloadedError, after a pause if many requests are refused."""
        self.metrics.rejected["overloaded"].inc(images)
        await asyncio.sleep(self.admission.hold())
        raise OverloadedError(
            "overloaded",
            f"{full.pending} images are pending and at most {full.limit} may be; "
            f"send these {images} again in {full.retry_after} s",
            retry_after=full.retry_after,
        ) from None

    async def _embedded(
        self, served: Served, sources: Sequence[Source], deadline: float, client_deadline: bool, client: int
    ) -> Job:
        """The finished job, with a valid embedding in every row. Counts refusals, and raises as embed() does."""
        try:
            job = await self.engine.embed(served, sources, deadline, client=client)
        except TimeoutError:
            self.metrics.rejected["client_deadline" if client_deadline else "deadline"].inc(len(sources))
            raise DeadlineError(
                "deadline_exceeded",
                "the request's deadline passed before its images were embedded; "
                f"send fewer images or allow more time (at most {self.settings.request_timeout:g} s)",
            ) from None
        except ServiceError:
            self.metrics.rejected["invalid"].inc(len(sources))
            raise
        except asyncio.CancelledError:
            self.metrics.rejected["disconnected"].inc(len(sources))
            raise
        if job.faulty is not None:
            self.metrics.rejected["nonfinite"].inc(len(sources))
            raise EmbeddingError(
                "nonfinite_embedding",
                f"{served} gave a row that is no embedding for this image: not finite, or all zero; "
                "the encoder or its precision is at fault",
                field=sources[job.faulty].field,
            )
        return job

    # ---- shutdown

    def drain(self) -> None:
        """Stop being ready. Requests are still answered until close()."""
        self.phase = "draining"

    async def close(self) -> None:
        """Admit no new request, answer those admitted, then stop, even if the engine is stuck."""
        loaded = bool(self._tasks)
        self.phase = "stopped"
        self.listeners.end()
        self.roster.end_canaries()
        for task in self._tasks:
            task.cancel()
        while self.admission.pending:
            await asyncio.sleep(0.01)
        await self.engine.close()
        await self.sidecar.close()
        await self.roster.close()
        if loaded:  # otherwise nothing was resumed yet, and saving would overwrite the stored windows
            await asyncio.to_thread(self.store.save_all, self.monitors(), self.history.state())
        self.store.close()
