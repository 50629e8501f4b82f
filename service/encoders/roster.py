"""The list of encoders in service. It finds them by name, swaps them, and retires one without losing a request."""

import asyncio
import logging
from dataclasses import dataclass, replace
from pathlib import Path

from fullrank import SpectrumMonitor
from fullrank.thresholds import canary_angle
from models import artifact as artifacts
from models import gate as gates
from models.artifact import Artifact, ArtifactError
from service.encoders import prepare
from service.encoders.changes import COMPARED, changes
from service.encoders.prepare import Prepared
from service.encoders.served import Served
from service.engine.engine import Engine
from service.failures import ConflictError, InvalidError, NotFoundError, ServiceError
from service.metrics import Metrics
from service.settings import NONE, Gate, Settings
from service.watching.canary import CanaryWatch
from service.watching.observer import Observer

log = logging.getLogger("fullrank.service")


@dataclass(frozen=True)
class Swap:
    """The result of a swap: what it replaced, and why it was allowed."""

    served: Served
    previous: Served
    judgement: gates.Judgement | None


class ServedEncoders:
    """The encoders in service, the default first, and their canaries. All public methods run on the event loop."""

    def __init__(self, settings: Settings, engine: Engine, metrics: Metrics, observer: Observer) -> None:
        self._settings = settings
        self._engine = engine
        self._metrics = metrics
        self._observer = observer
        self._serving: list[Served] = []
        self._trickles: dict[Served, asyncio.Task[None]] = {}
        self._swapping = asyncio.Lock()
        self._retiring: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._serving)

    def all(self) -> list[Served]:
        """The encoders in service, the default first."""
        return self._serving.copy()

    def find(self, model: str | None) -> Served:
        """The encoder called `model`, NAME or NAME@REVISION, or the default. Raises NotFoundError."""
        if model is None:
            return self._serving[0]
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
        name, at, revision = model.partition("@")
        name = self._settings.aliases.get(name, name)
        return (self._serving[0].name if name == "default" else name) + at + revision

    async def load(self) -> None:
        """Load, warm up and check the configured encoders; ArtifactError if one cannot be trusted."""
        for folder in self._configured():
            artifact = await asyncio.to_thread(artifacts.load, folder)
            if artifact.card.name in {served.name for served in self._serving}:
                raise ArtifactError(f"{folder}: another encoder in service is called {artifact.card.name}")
            prepared = await prepare.prepare(artifact, folder, self._engine, self._settings)
            await prepare.judge_alone(prepared, self._engine, self._settings)
            # Warm up whole batches too: no request is waiting yet.
            await self._engine.call(prepared.candidate.embedder.warm_up, (self._settings.max_batch,))
            self._serving.append(self._put_in_service(prepared, artifact))

    async def swap(self, name: str, gate: Gate, replaces: str | None = None) -> Swap:
        """Replace an encoder in service by the one in folder `name`, once that is loaded, warm and judged.

        It replaces the encoder that `replaces` names, else the one with its own name, else the default. On any error
        the old encoder stays.

        Raises NotFoundError for an unknown name, InvalidError for an artifact that cannot be loaded or whose canary
        fails, and ConflictError if the gate is "enforce" and the candidate is judged collapsed, or while another swap
        runs.
        """
        self.find(replaces)
        folder = self._folder(name)
        return await self._swap(await prepare.read(folder), folder, gate, replaces)

    async def reload(self) -> None:
        """Read the folders of the encoders in service again, and swap, as swap() does, to those that changed.

        The log says what was compared, what differs and what was refused.
        """
        for previous, configured in zip(self.all(), self._configured(), strict=False):
            if previous.folder.resolve() != configured.resolve():
                log.warning(
                    "%s came by a swap, from %s; it stays, though %s is configured: swap to it, or restart",
                    *(previous, previous.folder, configured),
                )
            try:
                artifact = await prepare.read(previous.folder)
                different = changes(previous.artifact, artifact)
                if not different:
                    log.info("%s is unchanged in %s: %s", previous, previous.folder, ", ".join(COMPARED))
                    continue
                log.info("%s has new %s in %s", previous, ", ".join(different), previous.folder)
                await self._swap(artifact, previous.folder, self._settings.gate, str(previous))
            except ServiceError as problem:
                log.error("kept %s: %s", previous, problem.message)
            except Exception:
                log.exception("kept %s: %s could not be read", previous, previous.folder)

    async def _swap(self, artifact: Artifact, folder: Path, gate: Gate, replaces: str | None) -> Swap:
        name = artifact.card.name
        if self._swapping.locked():
            raise ConflictError("swap_in_progress", "another swap is going on; wait for it to finish", retry_after=5)
        async with self._swapping:
            previous = self._place(name, replaces)
            settings = self._settings.model_copy(update={"gate": gate})
            try:
                prepared = await prepare.prepare(artifact, folder, self._engine, settings)
            except ArtifactError as error:
                raise InvalidError("bad_artifact", str(error), field="name") from error
            judgement = None
            if gate != "off":
                judgement = await prepare.judge(prepared, previous.baseline, self._engine)
            if judgement is not None and gate == "enforce" and not judgement.passed:
                raise ConflictError("collapsed", f"{name} was not put in service: {judgement.reason}", field="name")
            served = self._put_in_service(prepared, previous.baseline if gate == "warn" else artifact)
            self._serving[self._serving.index(previous)] = served
            task = asyncio.create_task(self._retire(previous))
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)  # a reference to the task would keep its encoder in memory
        log.info("swapped %s for %s", previous, served)
        return Swap(served, previous, judgement)

    def _place(self, name: str, replaces: str | None) -> Served:
        """The encoder that a new one replaces. Raises NotFoundError; ConflictError if a name would be in use twice."""
        namesake = next((served for served in self._serving if served.name == name), None)
        previous = self.find(replaces) if replaces is not None or namesake is None else namesake
        if namesake not in (None, previous):
            raise ConflictError("name_in_service", f"{namesake} is in service already; swap it instead", field="name")
        return previous

    def _configured(self) -> list[Path]:
        """The folders of the configured encoders, the default first. A setting is a name in encoders_dir or a path."""
        beside = []
        for encoder in self._settings.encoders:
            named = self._settings.encoders_dir / encoder
            beside.append(named if named.is_dir() else Path(encoder))
        return beside if self._settings.encoder == NONE else [self._settings.encoder, *beside]

    def _folder(self, name: str) -> Path:
        """The folder of an encoder by name; names with separators or dots never get this far (routes.admin)."""
        root = self._settings.encoders_dir.resolve()
        folder = (root / name).resolve()
        if folder.parent != root or not folder.is_dir():
            there = ", ".join(sorted(path.parent.name for path in root.glob(f"*/{artifacts.CARD}"))) or "none"
            raise NotFoundError("no_such_encoder", f"no encoder called {name!r}; there are: {there}", field="name")
        return folder

    def _put_in_service(self, prepared: Prepared, baseline: Artifact) -> Served:
        """Give an encoder its monitor, which compares recent traffic with `baseline`, and start its canary."""
        settings, artifact = self._settings, prepared.candidate.artifact
        if not settings.monitor:
            return Served.of(prepared.candidate, baseline, self._observer, None)
        reference = gates.comparison(artifact, baseline)
        if reference is not None:
            reference = replace(reference, canary_noise=prepared.noise)
        monitor = SpectrumMonitor(
            artifact.card.dimension,
            reference=reference,
            windows=settings.windows,
            block_rows=settings.block_rows,
        )
        served = Served.of(prepared.candidate, baseline, self._observer, monitor)
        if artifact.canary is not None and prepared.rows is not None:
            monitor.record_canary(prepared.rows)
            degrees = canary_angle(reference)
            watch = CanaryWatch(
                artifact.canary, prepared.rows, prepared.seconds, self._metrics, settings.canary_period, degrees
            )
            # Several times a window: a canary older than the rows says nothing of the model that made them.
            every = min(settings.canary_period, settings.windows[0] / 5)
            trickle = watch.trickle(self._engine, served, monitor.record_canary, every)
            self._trickles[served] = asyncio.create_task(trickle, name=f"canary of {served}")
        return served

    async def _retire(self, served: Served) -> None:
        """Stop an encoder's canary at once, and its monitor after the requests admitted for it are answered."""
        if (trickle := self._trickles.pop(served, None)) is not None:
            trickle.cancel()
        while served.in_flight:
            await asyncio.sleep(0.02)
        if all(str(it) != str(served) for it in self._serving):
            self._metrics.encoder_images.remove(served.name, served.revision)
        if served.monitor is not None:
            await asyncio.to_thread(served.monitor.close)

    def end_canaries(self) -> None:
        """Stop embedding canary images."""
        for trickle in self._trickles.values():
            trickle.cancel()

    async def close(self) -> None:
        """End the monitors, after those of the encoders that are being retired."""
        self.end_canaries()
        await asyncio.gather(*self._retiring)
        for served in self._serving:
            if served.monitor is not None:
                await asyncio.to_thread(served.monitor.close)
