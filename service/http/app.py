"""The app factory, and the server process that runs the app."""

import asyncio
import errno
import functools
import gc
import logging
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import FrameType

import torch
import uvicorn
from starlette.middleware.cors import CORSMiddleware

from fullrank import __version__ as VERSION
from fullrank.exposition import SpectrumCollector
from service import logs
from service.encoders.registry import Service
from service.http import errors, limits, openapi
from service.http.context import Bodies, Front
from service.http.direct import DirectAPI
from service.http.middleware import Edge
from service.http.routes import admin, embed, history, inference, neighbours, openai, operations, page, statistics
from service.metrics import Metrics
from service.pushing import Pushing
from service.settings import Settings
from service.tracing import Tracing

try:
    import resource
except ImportError:  # Windows has no such limit
    resource = None  # type: ignore[assignment]

log = logging.getLogger("fullrank.service")
SPARE_FILES = 128  # for encoders, logs, threads and what else a process opens

EXPOSED = ("Retry-After", "Server-Timing", "X-Model", "X-Request-ID", "X-Revision", "X-Shape")


def create_app(
    settings: Settings,
    on_failure: Callable[[], None] = lambda: None,
    tracing: Tracing | None = None,
    on_ready: Callable[[], object] = lambda: None,
) -> DirectAPI:
    """Create the ASGI app of one replica, with its own metrics registry.

    It answers /healthz at once, while its encoder is being loaded. Then `on_ready` is called. If loading fails,
    `on_failure` is called instead; the reason is in the log, on /readyz and in `app.state.service.failure`. Raises
    RuntimeError if OpenTelemetry is asked for but not installed.
    """
    tracing = Tracing() if settings.tracing and tracing is None else tracing
    metrics = Metrics(VERSION, torch.__version__, settings.device)
    service = Service(settings, metrics)
    metrics.registry.register(SpectrumCollector(service.monitors))
    pushing = Pushing(metrics.registry) if settings.otlp_metrics else None

    @asynccontextmanager
    async def lifespan(_: object) -> AsyncIterator[None]:
        loading = asyncio.create_task(service.load())

        def report(task: asyncio.Task[None]) -> None:
            if task.cancelled():
                return
            if (error := task.exception()) is not None:
                log.error("cannot serve: %s", error)
                on_failure()
            else:
                on_ready()

        loading.add_done_callback(report)
        if pushing is not None:
            pushing.start()
        yield
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
        if pushing is not None:  # while the encoders, and so their series, are still there
            await asyncio.to_thread(pushing.close)
        await service.close()
        if tracing is not None:
            await asyncio.to_thread(tracing.close)

    front = Front(service, Bodies(settings.max_pending_bytes), settings.grants)
    metrics.watch_bodies(lambda: front.bodies.held, settings.max_pending_bytes)
    app = DirectAPI(
        front,
        title="fullrank",
        version=VERSION,
        summary="Image embeddings that say when they collapse.",
        lifespan=lifespan,
        docs_url=None,  # operations.docs needs no CDN
        redoc_url=None,
        generate_unique_id_function=openapi.operation_id,
    )
    app.state.service = service
    app.add_middleware(Edge, service=service, tracing=tracing)
    if settings.cors_origins:  # outermost, so that a browser may read every refusal too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=EXPOSED,
        )
    app.answer_directly([*embed.router.routes, *openai.router.routes])
    errors.install(app)
    for module in (embed, openai, inference, statistics, history, neighbours, operations, admin, page):
        app.include_router(module.router)
    app.openapi = functools.partial(openapi.document, app)  # type: ignore[method-assign]
    return app


class Server(uvicorn.Server):
    """The uvicorn server with two signals of ours.

    SIGTERM turns readiness off at once, and ends listening after `drain_seconds`. SIGHUP reads the configured encoders
    again and swaps to those that changed, if they load and pass the gate.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service
        self._reloading: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        # Only the main thread may set handlers, and Windows has no SIGHUP. uvicorn does the same with its signals.
        if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGHUP"):
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self.reload)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.listeners.end()  # before connections are waited for: a stream ends by itself never
        await super().shutdown(sockets)

    def reload(self) -> None:
        """Start to read the configured encoders again. Ignored while a reload runs or the service is not ready."""
        if self.service.phase != "ready" or (self._reloading is not None and not self._reloading.done()):
            log.warning("SIGHUP is ignored: the service is %s, or still busy with the last one", self.service.phase)
            return
        self._reloading = asyncio.create_task(self.service.reload())

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        grace = self.service.settings.drain_seconds
        first = self.service.phase not in ("draining", "stopped")
        self.service.drain()
        stop = functools.partial(super().handle_exit, sig, frame)
        if grace and first and self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.call_later, grace, stop)
        else:
            stop()


def build_server(settings: Settings) -> Server:
    """The server of one replica, not yet running. It stops by itself if its encoder cannot be loaded."""
    # Objects made until then live on. Garbage collection of them would halt requests for 0.1 s again and again.
    app = create_app(settings, on_failure=lambda: setattr(server, "should_exit", True), on_ready=gc.freeze)
    config = uvicorn.Config(
        app,
        http=limits.bounded(app.front),
        ws="none",
        timeout_keep_alive=75,  # longer than clients and load balancers use, so that they close idle connections first
        host=settings.host,
        port=settings.port,
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(settings.request_timeout) + 5,
    )
    server = Server(config, app.state.service)
    connections = server.server_state.connections
    app.state.service.metrics.watch_connections(lambda: len(connections), settings.max_connections)
    _allow_files(settings.max_connections)
    return server


def _allow_files(connections: int) -> None:
    """Raise this process's limit of open files to one a connection and some more, as far as the system allows."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + connections // 4 + SPARE_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < wanted:
        log.warning("max_connections is %d, but this process may have %d files open (ulimit -n)", connections, allowed)


def unheard(settings: Settings) -> str | None:
    """Why the server could not listen on its host and port, with the remedy; None if it can."""

    async def listen() -> None:
        loop = asyncio.get_running_loop()
        (await loop.create_server(asyncio.Protocol, settings.host, settings.port, start_serving=False)).close()

    try:
        asyncio.run(listen())
    except OSError as error:
        number = error.errno or 0  # below 0 it is one of names and addresses
        reason = os.strerror(number) if number > 0 else error.strerror or str(error)
        taken = number in (errno.EADDRINUSE, errno.EACCES)
        remedy = "set FULLRANK_PORT, or end who listens there" if taken else "set FULLRANK_HOST to one of this machine"
        return f"{settings.host}:{settings.port}: {reason}; {remedy}"
    return None


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then answer every accepted request. Raises RuntimeError if it cannot start."""
    logs.configure(settings.log_format)
    if reason := unheard(settings):  # before the encoder is loaded
        raise RuntimeError(reason)
    server = build_server(settings)
    server.run()
    if server.service.failure is not None:
        raise RuntimeError(server.service.failure)
