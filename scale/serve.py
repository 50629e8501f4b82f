"""Ray Serve: the service's HTTP API over many replicas, watched as one.

Each replica runs the app of service/http, with its own queue, and Ray sends requests to replicas. A collector actor
(scale/ray_actors.py), which the first replica starts, merges what replicas report. `app` builds the application, for
`serve run` and for `serve.run(app(Arguments()))`.
"""

import asyncio
import hashlib
import json
import logging
import math
from collections.abc import Iterable
from typing import Any

from prometheus_client import Metric
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.types import Message, Receive, Scope, Send

try:
    import ray
    from ray import serve
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
except ImportError as error:
    raise ImportError("Ray Serve is missing: pip install 'fullrank-server[ray]'") from error

from fullrank import __version__ as VERSION
from fullrank.wording import words_of
from scale.ray_actors import NAMESPACE, PENDING, CollectorActor, PendingImages
from scale.reports import SILENT, Report, Wanted, metrics_of, not_heard_of, serving, watched_by
from service.encoders.registry import Service
from service.failures import ConflictError, ServiceError, UnreadyError
from service.http.app import create_app
from service.settings import Gate, Settings

log = logging.getLogger("fullrank.service")
ANSWER = 20.0  # seconds for the collector to answer
AWAY = (ray.exceptions.RayError, ValueError, TimeoutError)  # what calls raise while it does not run


class Arguments(BaseModel):
    """Arguments of the application: `args` in the configuration file, or name=value after `serve run`."""

    model_config = ConfigDict(extra="forbid")

    replicas: int | None = Field(None, ge=1, description="Fixed number of replicas; without it Ray scales.")
    min_replicas: int = Field(1, ge=1, description="Fewest replicas. A fleet of none could not be watched.")
    max_replicas: int = Field(4, ge=1, description="Most replicas.")
    pending_images: float = Field(64, gt=0, description="Pending images that a replica should have on average.")
    upscale_delay: float = Field(15, ge=0, description="Seconds for which more replicas must be wanted.")
    downscale_delay: float = Field(300, ge=0, description="Seconds for which fewer replicas must be wanted.")
    cpus: float = Field(1, gt=0, description="CPUs of a replica; also its threads, unless settings say otherwise.")
    gpus: float = Field(0, ge=0, description="GPUs of a replica; 0.25 lets four share one.")
    period: float = Field(2, gt=0, le=60, description="Seconds between two reports of a replica.")
    settings: dict[str, Any] = Field({}, description="Settings of the service, such as encoder, as for fullrank serve.")


class Peers:
    """A replica's side of the fleet: it reports to the collector, carries out its orders and asks it for figures.

    started_with: names the settings that the application gave it.
    """

    def __init__(self, service: Service, replica: str, period: float, started_with: str) -> None:
        self._service = service
        self._replica = replica
        self._started_with = started_with
        self._period = period
        self._wanted = Wanted()
        self._done = 0
        self._failed: dict[int, str] = {}
        self._reported = -math.inf
        self._reporting = asyncio.Lock()
        self._collector: Any = None

    async def run(self) -> None:
        """Run for ever: report, and carry out orders."""
        while True:
            await asyncio.sleep(self._period)
            await self.catch_up()

    async def catch_up(self) -> None:
        """Report, and carry out orders. Raises nothing: the service goes on without its collector."""
        try:
            await self.report()
            await self._obey()
        except Exception as error:
            log.warning("no report to the collector: %s", words_of(error))

    async def report(self, *, whole: bool = False, last: bool = False) -> None:
        """Send a report; moments go with it thirty times a window, or if `whole`. Raises an error of AWAY.

        A collector that this replica had to look for may have been started again, and gets moments too.
        """
        async with self._reporting:
            now = asyncio.get_running_loop().time()
            service = self._service
            whole = (
                whole or last or self._collector is None or now - self._reported >= min(service.settings.windows) / 30
            )
            wanted = self._wanted
            watched = await asyncio.to_thread(watched_by, service, wanted.groups, wanted.references) if whole else None
            metrics = await asyncio.to_thread(metrics_of, service)
            report = Report(
                self._replica,
                metrics,
                serving(service),
                watched,
                wanted.orders,
                self._done,
                dict(self._failed),
                last,
                max(SILENT, 5 * self._period),
                self._started_with,
            )
            self._wanted = await self._call("push", report)
            self._reported = now if whole else self._reported
        if whole and self._wanted.references and not wanted.references and not last:
            await self.report(whole=True)

    async def metrics(self) -> Iterable[Metric]:
        """One scrape of the whole fleet. Raises UnreadyError while the collector is away.

        It also raises UnreadyError while counters would fall: until all replicas have reported to a new collector.
        """
        awaited, families = await self._ask("metrics")
        if awaited:
            raise UnreadyError("no_collector", not_heard_of(awaited), retry_after=5)
        return families  # type: ignore[no-any-return]

    async def spectrum(self, model: str | None) -> dict[str, Any]:
        """The figures of the whole fleet. Raises UnreadyError while the collector is away."""
        return await self._ask("spectrum", model)  # type: ignore[no-any-return]

    async def _ask(self, method: str, *arguments: object) -> Any:
        try:
            await self.report()
            return await self._call(method, *arguments)
        except AWAY as error:
            message = f"the collector of the fleet does not answer ({type(error).__name__}); it is started again"
            raise UnreadyError("no_collector", message, retry_after=5) from error

    async def _call(self, method: str, *arguments: object) -> Any:
        """Call a method of the collector. Raises an error of AWAY; the next call then looks for it, or starts it."""
        try:
            if self._collector is None:
                self._collector = collector_of(serve.get_replica_context())
            return await asyncio.wait_for(getattr(self._collector, method).remote(*arguments), ANSWER)
        except AWAY:
            self._collector = None
            raise

    async def swapped(self, name: str, gate: Gate, replaces: str | None) -> None:
        """Have all other replicas swap as this one did, and wait for them.

        Raises ConflictError that names the replicas which did not, and UnreadyError without a collector.
        """
        try:
            await self.report()  # a collector that was started again then knows the orders before this one
            order = await self._call("order", name, gate, replaces, self._started_with)
            self._done = order.number
            await self.report(whole=True)
            deadline = asyncio.get_running_loop().time() + self._service.settings.request_timeout - self._period
            asked = order.number, self._started_with
            waiting, failed = await self._call("progress", *asked)
            while waiting and asyncio.get_running_loop().time() < deadline:
                await asyncio.sleep(min(0.2, self._period))
                waiting, failed = await self._call("progress", *asked)
        except AWAY as error:
            message = f"only {self._replica} swapped: the collector of the fleet does not answer; swap again"
            raise UnreadyError("no_collector", message, retry_after=5) from error
        if waiting or failed:
            said = [f"{replica} did not ({reason})" for replica, reason in failed.items()]
            said += [f"{replica} has not yet" for replica in waiting]
            message = f"{self._replica} swapped to {name}, but {'; '.join(said)}. GET /spectrum?fleet=1 lists revisions"
            raise ConflictError("swap_incomplete", message, field="name")

    async def _obey(self) -> None:
        for order in self._wanted.orders[self._done :]:
            try:
                gate: Any = order.gate
                await self._service.roster.swap(order.name, gate, order.replaces)
            except ServiceError as error:
                if error.code == "swap_in_progress":
                    return
                self._failed[order.number] = error.message
                log.error("order %d, to swap to %s, failed: %s", order.number, order.name, error.message)
            self._done = order.number
            await self.report(whole=True)


class Started:
    """ASGI app that completes its start when the encoder serves, so that Ray sends no request before.

    With it, `peers` reports from then on, and once more after the last request was answered.
    """

    def __init__(self, settings: Settings, replica: str, period: float, started_with: str) -> None:
        self._loaded = asyncio.Event()
        self._app = create_app(settings, on_failure=self._loaded.set, on_ready=self._loaded.set)
        self.service: Service = self._app.state.service
        self.peers = Peers(self.service, replica, period, started_with)
        self._reporting: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return

        async def send_when_loaded(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                await self._loaded.wait()
                if self.service.failure is not None:
                    raise RuntimeError(self.service.failure)
                self.service.peers = self.peers
                await self.peers.catch_up()
                self._reporting = asyncio.create_task(self.peers.run())
            elif message["type"] == "lifespan.shutdown.complete":
                await self._leave()
            await send(message)

        await self._app(scope, receive, send_when_loaded)

    async def _leave(self) -> None:
        if self._reporting is not None:
            self._reporting.cancel()
        try:
            await asyncio.wait_for(self.peers.report(last=True), 5)
        except Exception as error:
            log.warning("no last report to the collector: %s", words_of(error))


class ReplicaDeployment:
    """One replica: what Ray starts, asks for its health and its pending images, and stops."""

    def __init__(self, settings: dict[str, Any], cpus: float, period: float) -> None:
        context = serve.get_replica_context()
        self._settings = settings_of(settings, cpus)
        if self._settings.state_dir is not None:  # two replicas cannot share one; a rank is given again after a restart
            folder = self._settings.state_dir / f"replica-{context.rank.rank}"
            self._settings = self._settings.model_copy(update={"state_dir": folder})
        self._replica = context.replica_id.unique_id
        self._period = period
        self._started_with = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
        self._started: Started | None = None

    async def __serve_build_asgi_app__(self) -> Started:
        self._started = Started(self._settings, self._replica, self._period, self._started_with)
        return self._started

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """The metric that PendingImages reads."""
        return {PENDING: float(self._started.service.admission.pending if self._started else 0)}

    async def check_health(self) -> None:
        """Raise RuntimeError once only a restart can help: Ray then starts another replica."""
        if self._started is not None and not self._started.service.health.alive():
            raise RuntimeError(self._started.service.health.fault() or "it cannot embed")


def collector_of(context: Any) -> Any:
    """The collector of a replica's deployment, which is started unless it runs. Raises an error of AWAY.

    It is detached and not one of Ray's deployment actors, because those belong to one version of the application. Its
    name holds the version of this package, because reports of another need not fit.
    """
    return (
        ray.remote(CollectorActor)
        .options(
            name=f"fullrank::{context.app_name}::{context.deployment}::collector::{VERSION}",
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
        )
        .remote()
    )


def settings_of(given: dict[str, Any], cpus: float) -> Settings:
    """The service's settings. A replica uses the CPUs that Ray gives it, unless settings say otherwise.

    Raises ValueError that names the setting.
    """
    threads = max(1, int(cpus))
    try:
        return Settings(**({"threads": threads, "decode_threads": threads} | given))
    except ValidationError as error:
        said = "; ".join(f"{'.'.join(map(str, it['loc']))}: {it['msg']}" for it in error.errors())
        raise ValueError(f"settings: {said}") from error


def app(arguments: Arguments) -> Any:
    """The Ray Serve application. Raises ValueError for wrong settings."""
    settings = settings_of(arguments.settings, arguments.cpus)
    scaling: dict[str, Any] = {"num_replicas": arguments.replicas}
    if arguments.replicas is None:
        policy = AutoscalingPolicy(policy_function=PendingImages, policy_kwargs={"target": arguments.pending_images})
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=arguments.min_replicas,
                max_replicas=arguments.max_replicas,
                upscale_delay_s=arguments.upscale_delay,
                downscale_delay_s=arguments.downscale_delay,
                policy=policy,
            )
        }
    deployment = serve.deployment(
        name="fullrank",
        # Our queue makes the batches, so every request has to reach it.
        max_ongoing_requests=settings.max_pending_images,
        ray_actor_options={"num_cpus": arguments.cpus, "num_gpus": arguments.gpus},
        graceful_shutdown_timeout_s=settings.request_timeout + 10,
        **scaling,
    )
    served = deployment(serve.ingress()(ReplicaDeployment))
    return served.bind(arguments.settings, arguments.cpus, arguments.period)
