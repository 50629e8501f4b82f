"""Prometheus metrics of serving, on one registry per app. GET /metrics also has the monitor's (fullrank.exposition)."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, PlatformCollector, ProcessCollector

from service.durations import Durations, Series

PHASES = ("decode", "queue", "forward", "encode")
WINDOWS = ("saved", "unsaved", "restored", "refused")
CANARY = ("finite", "nonfinite", "failed")
REJECTIONS = ("overloaded", "unready", "deadline", "client_deadline", "disconnected", "invalid", "nonfinite")
# The routes that alerts and dashboards watch, and the statuses of each. Their series start at zero: a rate needs that.
EMBEDDING_ROUTES = (
    "/embed",
    "/v1/embeddings",
    "/v2/models/{name}/infer",
    "/v2/models/{name}/versions/{version}/infer",
)
EMBEDDING_CODES = (200, 400, 401, 403, 404, 406, 408, 413, 415, 422, 429, 499, 500, 503, 504)
CODES = dict.fromkeys(EMBEDDING_ROUTES, EMBEDDING_CODES) | {
    "/observe": (202, 400, 401, 403, 408, 409, 413, 415, 422, 429, 499, 500, 503),
    "/admin/encoders": (200, 400, 401, 403, 404, 408, 409, 413, 415, 422, 499, 500, 503),
    "/moments": (200, 401, 403, 404, 422, 500, 503),
    "/metrics": (200, 401, 403, 500, 503),
    "/spectrum": (200, 404, 422, 500, 503),
    "/neighbours": (200, 400, 401, 403, 404, 408, 413, 415, 422, 429, 499, 500, 503),
    "/readyz": (200, 500, 503),
    "/healthz": (200, 500, 503),
    "other": (400, 404, 405, 408, 431, 499, 500, 503),
}
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
POWERS_OF_TWO = tuple(float(2**k) for k in range(11))


class Metrics:
    """Counters of the HTTP process. Every series with a known label exists from the start, at zero."""

    def __init__(self, version: str, torch_version: str, device: str) -> None:
        self.registry = r = CollectorRegistry()
        ProcessCollector(registry=r)
        PlatformCollector(registry=r)
        self.requests = Counter(
            "fullrank_requests", "Requests answered, by route and status.", ["route", "code"], registry=r
        )
        self.request_seconds = Durations(
            "fullrank_request_seconds",
            "From a request's first byte to its answer's last; of requests that were not refused (4xx).",
            "route",
            SECONDS,
            r,
        )
        phase = Durations(
            "fullrank_phase_seconds",
            "Where an answered request's time went; forward is its last batch's.",
            "phase",
            SECONDS,
            r,
        )
        self.phase = {name: phase.labels(name) for name in PHASES}
        self.batch_size = Histogram(
            "fullrank_batch_size", "Images in a forward pass.", buckets=POWERS_OF_TWO, registry=r
        )
        self.images = Counter("fullrank_images", "Images embedded and answered.", registry=r)
        self.encoder_images = Counter(
            "fullrank_encoder_images", "Images answered, by encoder in service.", ["model", "revision"], registry=r
        )
        self.batches = Counter("fullrank_batches", "Forward passes for requests.", registry=r)
        self.failed_batches = Counter(
            "fullrank_failed_batches", "Batches whose forward pass raised, requests' and canary images'.", registry=r
        )
        self.unfit = Gauge(
            "fullrank_unfit",
            "1 while this replica cannot embed: its threads ended, nothing ends, or every forward pass fails.",
            registry=r,
        )
        self.stalled = Gauge(
            "fullrank_stalled_seconds", "Seconds for which work has waited while none of it ended.", registry=r
        )
        self.dead_threads = Gauge(
            "fullrank_dead_threads", "Threads of the engine and of the monitors that ended by themselves.", registry=r
        )
        self.killed_decoders = Counter(
            "fullrank_killed_decoders",
            "Processes that ended, or were killed, before their image was decoded.",
            registry=r,
        )
        self.pending = Gauge("fullrank_pending_images", "Images admitted and not yet answered.", registry=r)
        self.limit = Gauge("fullrank_pending_images_limit", "Images admitted at most.", registry=r)
        self.pending_bytes = Gauge("fullrank_pending_bytes", "Bytes of request bodies that are held.", registry=r)
        self.pending_bytes_limit = Gauge(
            "fullrank_pending_bytes_limit", "Bytes held at most; beyond it large bodies are refused.", registry=r
        )
        self.connections = Gauge("fullrank_connections", "Connections that are open.", registry=r)
        self.connections_limit = Gauge("fullrank_connections_limit", "Connections open at most.", registry=r)
        rejected = Counter("fullrank_rejected_images", "Images not embedded, by reason.", ["reason"], registry=r)
        self.rejected = {reason: rejected.labels(reason) for reason in REJECTIONS}
        canary = Counter(
            "fullrank_canary_images",
            "Canary images embedded again since their encoder was loaded.",
            ["result"],
            registry=r,
        )
        self.canary = {result: canary.labels(result) for result in CANARY}
        windows = Counter(
            "fullrank_persisted_windows", "What became of a monitor's windows in state_dir.", ["result"], registry=r
        )
        self.windows = {result: windows.labels(result) for result in WINDOWS}
        self.unobserved = Counter(
            "fullrank_unobserved_images",
            "Embedded images that never reached the monitor: its queue was full, or it refused them.",
            registry=r,
        )
        self.unsampled = Counter(
            "fullrank_unsampled_images",
            "Embedded images left out at random, so that the monitor sees no more a second than monitor_rate; and rows "
            "of POST /observe left out of what one of several keys sent.",
            registry=r,
        )
        Info("fullrank_build", "Versions that made these figures.", registry=r).info(
            {"version": version, "torch": torch_version, "device": device}
        )

        for route, codes in CODES.items():
            self.request_seconds.labels(route)
            for code in codes:
                self.requests.labels(route, str(code))
        self._answered: dict[tuple[str, int], tuple[Counter, Series]] = {}

    def count_request(self, route: str, status: int, seconds: float) -> None:
        """Count an answered request."""
        known = self._answered.get((route, status))
        if known is None:  # cached: finding a series by its labels costs ten times as much as counting
            known = self.requests.labels(route, str(status)), self.request_seconds.labels(route)
            self._answered[route, status] = known
        known[0].inc()
        if not 400 <= status < 500:  # refusals are quick; included, they would hide that answers are slow
            known[1].observe(seconds)

    def watch_bodies(self, held: Callable[[], int], limit: int) -> None:
        """At each scrape, read the number of bytes of request bodies that are held."""
        self.pending_bytes.set_function(held)
        self.pending_bytes_limit.set(limit)

    def watch_connections(self, connections: Callable[[], int], limit: int) -> None:
        """At each scrape, read the number of open connections."""
        self.connections.set_function(connections)
        self.connections_limit.set(limit)

    def watch_pending(self, pending: Callable[[], int], limit: int) -> None:
        """At each scrape, read the number of pending images, rather than count them a second time."""
        self.pending.set_function(pending)
        self.limit.set(limit)
