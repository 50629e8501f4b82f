"""The service itself, without HTTP: the encoder in service, admission, decoding, the canary, swapping, draining."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from fullrank import SpectrumMonitor
from models import artifact as artifacts
from models import gate as gates
from models.artifact import Artifact
from models.embedder import Embedder
from service.encoders.served import Answer, Served, Source
from service.engine.engine import Engine
from service.engine.queue import Admission, OverloadError
from service.failures import (
    ConflictError,
    DeadlineError,
    EmbeddingError,
    InvalidError,
    NotFoundError,
    OverloadedError,
    ServiceError,
    UnreadyError,
)
from service.metrics import Metrics
from service.settings import Gate, Settings
from service.watching.canary import CanaryWatch
from service.watching.observer import Observer
from service.watching.persistence import WindowStore
from service.watching.sidecar import Sidecar

log = logging.getLogger("fullrank.service")
Phase = Literal["starting", "ready", "draining", "stopped"]


@dataclass(frozen=True)
class Swap:
    """What a swap did and why it was allowed."""

    served: Served
    previous: Served
    judgement: gates.Judgement | None


class Service:
    """One replica. Everything public runs on the event loop that start() ran on."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings, self.metrics = settings, metrics
        self.phase: Phase = "starting"
        self.failure: str | None = None
        self.admission = Admission(settings.max_pending_images)
        metrics.watch_pending(lambda: self.admission.pending, settings.max_pending_images)
        self._saving: asyncio.Task[None] | None = None
        self._serving: list[Served] = []  # the default first
        self._swapping = asyncio.Lock()
        self._retiring: set[asyncio.Task[None]] = set()

    def open(self) -> None:
        """Start the threads; called on the event loop that everything else then runs on."""
        self.loop = asyncio.get_running_loop()
        settings, pinned = self.settings, torch.device(self.settings.device).type == "cuda"
        self.engine = Engine(
            settings.max_batch,
            settings.threads,
            self.metrics,
            settings.decode_threads,
            decode_seconds=settings.decode_seconds,
            decode_memory=settings.decode_memory_bytes,
            pinned=pinned,
        )
        self.observer = Observer(self.metrics, settings.monitor_rate)
        self.store = WindowStore(self.settings.state_dir, self.metrics)
        self.sidecar = Sidecar(self.settings, self.store)

    async def load(self) -> None:
        """Load, warm up and check the configured encoders; ArtifactError if one cannot be trusted."""
        try:
            for folder in (self.settings.encoder, *map(self._beside, self.settings.encoders)):
                artifact = await asyncio.to_thread(artifacts.load, folder)
                if artifact.card.name in {served.name for served in self._serving}:
                    raise artifacts.ArtifactError(
                        f"{folder}: another encoder in service is called {artifact.card.name}"
                    )
                served = await self._prepare(artifact)
                await self._judge_alone(served)
                self._put_in_service(served, artifact)
        except Exception as error:
            self.failure = str(error)
            raise
        for served in self._serving:
            if served.monitor is not None:
                await asyncio.to_thread(self.store.restore, served.name, served.revision, served.monitor)
        self._saving = asyncio.create_task(self.store.keep(self.monitors, self.settings.state_period))
        self.phase = "ready"
        log.info("serving %s", ", ".join(map(str, self._serving)))

    @property
    def current(self) -> Served:
        """The encoder that serves requests which name none; raises UnreadyError while there is none."""
        if not self._serving:
            message = self.failure or "the encoder is still loading; GET /readyz says when it serves"
            raise UnreadyError("failed" if self.failure else "starting", message, retry_after=1)
        return self._serving[0]

    def served(self, model: str | None = None) -> Served:
        """The encoder called `model`, NAME or NAME@REVISION, or the default. Raises NotFoundError or UnreadyError."""
        default = self.current
        if model is None:
            return default
        model = self._unaliased(model)
        for served in self._serving:
            if model in (served.name, str(served)):
                return served
        there = ", ".join(map(str, self._serving))
        raise NotFoundError("model_not_found", f"no encoder {model!r} is in service; there are: {there}", field="model")

    def _unaliased(self, model: str) -> str:
        """The encoder's own name where `model` is an alias. The default encoder is called "default" too."""
        if any(model in (served.name, str(served)) for served in self._serving):
            return model
        name = self.settings.aliases.get(model, model)
        return self._serving[0].name if name == "default" else name

    def monitors(self) -> list[tuple[str, str, SpectrumMonitor]]:
        """(model, revision, monitor) of everything watched; called by scrapes, on any thread."""
        served = [(it.name, it.revision, it.monitor) for it in self.in_service() if it.monitor is not None]
        return [*served, *self.sidecar] if self.phase != "starting" else served

    def in_service(self) -> list[Served]:
        """The encoders in service, the default first; none while starting."""
        return self._serving.copy()

    # ---- requests

    async def embed(
        self, sources: Sequence[Source], deadline: float, model: str | None = None, *, hurried: bool = False
    ) -> Answer:
        """Decode and embed; all rows come from one encoder, see served(). `deadline` is in time.monotonic() seconds.

        hurried: it is the client's own, and counted apart.

        Raises NotFoundError for a model that is not in service, InvalidError for a bad image, OverloadedError when
        full, UnreadyError while starting or stopped, DeadlineError, EmbeddingError for a row that is not finite.
        """
        if not self._serving or self.phase == "stopped":
            self.metrics.rejected["unready"].inc(len(sources))
        served = self.served(model)
        if self.phase == "stopped":
            raise UnreadyError("draining", "this replica is shutting down; send the request again", retry_after=1)
        try:
            self.admission.enter(len(sources))
        except OverloadError as full:
            self.metrics.rejected["overloaded"].inc(len(sources))
            await asyncio.sleep(self.admission.hold())
            raise OverloadedError(
                "overloaded",
                f"{full.pending} images are pending and at most {full.limit} may be; "
                f"send these {len(sources)} again in {full.retry_after} s",
                retry_after=full.retry_after,
            ) from None
        served.in_flight += 1
        try:
            job = await self.engine.embed(served, sources, deadline)
        except TimeoutError:
            self.metrics.rejected["client_deadline" if hurried else "deadline"].inc(len(sources))
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
        finally:
            served.in_flight -= 1
            self.admission.leave(len(sources))
        if job.faulty is not None:
            self.metrics.rejected["nonfinite"].inc(len(sources))
            raise EmbeddingError(
                "nonfinite_embedding",
                f"{served.name}@{served.revision} gave an embedding that is not finite for this image; "
                "the encoder or its precision is at fault",
                field=sources[job.faulty].field,
            )
        self.metrics.images.inc(len(sources))
        served.images.inc(len(sources))
        queued = max(0.0, job.started - job.queued - job.decode_seconds)
        answer = Answer(served, job.rows, job.unit, job.decode_seconds, queued, job.forward_seconds)
        self.metrics.phase["decode"].observe(answer.decode_seconds)
        self.metrics.phase["queue"].observe(answer.queue_seconds)
        self.metrics.phase["forward"].observe(answer.forward_seconds)
        return answer

    # ---- encoders

    async def swap(self, name: str, gate: Gate, replaces: str | None = None) -> Swap:
        """Serve the encoder in folder `name` instead of another, once it is loaded, warm and judged, or not at all.

        It takes the place of the one that `replaces` names, else of the one with its own name, else of the default.

        Raises NotFoundError for a name that is not there, InvalidError for an artifact that cannot be loaded or whose
        canary fails, ConflictError when gate is "enforce" and the candidate is judged collapsed, or another swap is
        going on.
        """
        self.served(replaces)
        return await self._swap(await _read_artifact(self._folder(name)), gate, replaces)

    async def reload(self) -> None:
        """Read the configured folders again; swap to what is new in them, as swap() does, and log what it refuses."""
        folders = (self.settings.encoder, *map(self._beside, self.settings.encoders))
        for previous, folder in zip(self.in_service(), folders, strict=False):
            try:
                artifact = await _read_artifact(folder)
                if artifact.card.revision == previous.revision:
                    log.info("%s holds %s, which is in service", folder, previous)
                else:
                    await self._swap(artifact, self.settings.gate, str(previous))
            except ServiceError as problem:
                log.error("kept %s: %s", previous, problem.message)
            except Exception:
                log.exception("kept %s: %s could not be read", previous, folder)

    async def _swap(self, artifact: Artifact, gate: Gate, replaces: str | None) -> Swap:
        name = artifact.card.name
        if self._swapping.locked():
            raise ConflictError("swap_in_progress", "another swap is going on; wait for it to finish", retry_after=5)
        async with self._swapping:
            previous = self._place(name, replaces)
            try:
                candidate = await self._prepare(artifact)
            except artifacts.ArtifactError as error:
                raise InvalidError("bad_artifact", str(error), field="name") from error
            judgement = None
            if gate != "off":
                judgement = await self.engine.call(gates.judge, candidate.embedder, artifact, previous.baseline)
            if judgement is not None and gate == "enforce" and not judgement.passed:
                raise ConflictError("collapsed", f"{name} was not put in service: {judgement.reason}", field="name")
            self._put_in_service(candidate, previous.baseline if gate == "warn" else artifact, previous)
            self._retiring.add(asyncio.create_task(self._retire(previous)))
        log.info("swapped %s for %s", previous, candidate)
        return Swap(candidate, previous, judgement)

    def _place(self, name: str, replaces: str | None) -> Served:
        """Whom it replaces. Raises NotFoundError; ConflictError if its name would be there twice."""
        namesake = next((served for served in self._serving if served.name == name), None)
        previous = self.served(replaces) if replaces is not None or namesake is None else namesake
        if namesake not in (None, previous):
            raise ConflictError("name_in_service", f"{namesake} is in service already; swap it instead", field="name")
        return previous

    def _beside(self, encoder: str) -> Path:
        """The folder of an encoder named in settings.encoders: under encoders_dir, or a path."""
        named = self.settings.encoders_dir / encoder
        return named if named.is_dir() else Path(encoder)

    def _folder(self, name: str) -> Path:
        """The folder of an encoder by name; names with separators or dots never get this far (routes.admin)."""
        root = self.settings.encoders_dir.resolve()
        folder = (root / name).resolve()
        if folder.parent != root or not folder.is_dir():
            there = ", ".join(sorted(path.parent.name for path in root.glob(f"*/{artifacts.CARD}"))) or "none"
            raise NotFoundError("no_such_encoder", f"no encoder called {name!r}; there are: {there}", field="name")
        return folder

    async def _prepare(self, artifact: Artifact) -> Served:
        """An encoder ready to serve: on its device, warm, its canary as expected. Raises ArtifactError otherwise."""
        settings = self.settings
        dtype = getattr(torch, settings.dtype)
        options = settings.device, dtype, settings.max_batch, settings.engine, settings.threads
        embedder = await self.engine.call(Embedder, artifact, *options)
        for size in sorted({1, settings.max_batch}):
            await self.engine.call(embedder.warm_up, (size,))
        served = Served(artifact, embedder, artifact, self.observer, settings.max_pixels, settings.max_whole_pixels)
        if artifact.canary is None:
            return served
        served.watch = CanaryWatch(artifact, served, self.engine, self.metrics, settings.canary_period)
        if (cosine := await served.watch.embed_all()) < settings.canary_min_cosine:
            raise artifacts.ArtifactError(
                f"{artifact.card.name}: its canary images give embeddings of cosine {cosine:.4f} with the stored ones, "
                f"less than {settings.canary_min_cosine}: weights, preprocessing or precision are not what was exported"
            )
        return served

    async def _judge_alone(self, served: Served) -> None:
        """Refuse an encoder that is collapsed by any standard; without canary images nobody can tell, and it serves."""
        if self.settings.gate == "off" or served.artifact.canary is None:
            return
        judgement = await self.engine.call(gates.judge, served.embedder, served.artifact)
        if judgement.passed:
            return
        message = f"{served.name} is not fit to serve: {judgement.reason}"
        if self.settings.gate == "enforce":
            raise artifacts.ArtifactError(f"{message}. FULLRANK_GATE=warn serves it all the same")
        log.warning(message)

    def _put_in_service(self, served: Served, baseline: Artifact, previous: Served | None = None) -> None:
        """Add a prepared encoder, or switch to it from a previous one; recent traffic is compared with the baseline."""
        settings, served.baseline = self.settings, baseline
        if settings.monitor:
            served.monitor = SpectrumMonitor(
                served.artifact.card.dimension,
                reference=gates.comparison(served.artifact, baseline),
                windows=settings.windows,
                block_rows=settings.block_rows,
            )
            if served.watch is not None:
                served.monitor.record_canary(served.watch.rows)
                # Several times a window: a canary older than the rows cannot vouch for the model that made them.
                every = min(settings.canary_period, settings.windows[0] / 5)
                served.trickle = asyncio.create_task(served.watch.trickle(served.monitor.record_canary, every))
        if previous is None:
            self._serving.append(served)
        else:
            self._serving[self._serving.index(previous)] = served

    async def _retire(self, served: Served) -> None:
        """End an encoder's canary, and its monitor after the requests admitted for it."""
        if served.trickle is not None:
            served.trickle.cancel()
        while served.in_flight:
            await asyncio.sleep(0.02)
        if served.monitor is not None:
            await asyncio.to_thread(served.monitor.close)
        if all(str(it) != str(served) for it in self._serving):
            self.metrics.encoder_images.remove(served.name, served.revision)

    # ---- the end

    def drain(self) -> None:
        """Readiness goes off; requests are still answered until close()."""
        self.phase = "draining"

    async def close(self) -> None:
        """Answer what was admitted, then stop. Nothing new is admitted from here on."""
        self.phase = "stopped"
        for served in self.in_service():
            if served.trickle is not None:
                served.trickle.cancel()
        if self._saving is not None:
            self._saving.cancel()
        while self.admission.pending:
            await asyncio.sleep(0.01)
        await asyncio.gather(*self._retiring)
        await self.engine.close()
        await asyncio.to_thread(self.observer.close)
        await self.sidecar.close()
        for served in self.in_service():
            await self._retire(served)
        if self._saving is not None:  # else nothing was resumed yet, and saving would lose it
            await asyncio.to_thread(self.store.save_all, self.monitors())
        self.store.close()


async def _read_artifact(folder: Path) -> Artifact:
    """An encoder from its folder. Raises InvalidError if it cannot be trusted."""
    try:
        return await asyncio.to_thread(artifacts.load, folder)
    except artifacts.ArtifactError as error:
        raise InvalidError("bad_artifact", str(error), field="name") from error
