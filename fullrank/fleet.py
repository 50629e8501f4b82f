"""The exact figures of a fleet: moments read from its replicas over HTTP and merged."""

import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPException
from typing import IO, Any, Self

from safetensors import SafetensorError
from safetensors.torch import load

from fullrank import measures
from fullrank.measures import minimum_rows
from fullrank.moments import Moments, merge

_LARGEST_ANSWER = 1 << 30


class FleetError(ValueError):
    """A replica that cannot be read, or replicas that do not belong together; the message names them."""


@dataclass(frozen=True)
class Replica:
    """What one replica answered: whose moments, over which window (seconds, as text), and the moments."""

    url: str
    model: str
    revision: str
    window: str
    moments: Moments


@dataclass(frozen=True)
class Figures:
    """What moments say; NaN where the rows are too few, `minimum_rows` being about how many the rank needs."""

    rows: int
    effective_rank: float
    participation_ratio: float
    total_variance: float
    minimum_rows: int

    @classmethod
    def of(cls, moments: Moments) -> Self:
        """Measure, by one eigendecomposition."""
        if moments.count < 2:
            nan = float("nan")
            return cls(moments.count, nan, nan, nan, minimum_rows([]))
        eigenvalues = measures.spectrum(moments.covariance())
        traces = moments.traces(eigenvalues)
        return cls(
            moments.count,
            moments.effective_rank(eigenvalues),
            traces.participation_ratio,
            float(eigenvalues.sum()),
            minimum_rows(eigenvalues, traces.kurtosis if traces.count >= 4 else 1.0),
        )


@dataclass(frozen=True)
class Fleet:
    """The fleet's own figures, each replica's, and what summing the counters over replicas would have said.

    summed_participation_ratio is `sum(rate(trace_product)) / sum(rate(frobenius_product))`: the replicas' participation
    ratios weighted by rows and variance squared, each about its own mean. It does not see a replica whose variance is
    gone, and it does not see that replicas with unlike traffic are more diverse together than apart.
    """

    model: str
    revision: str
    window: str
    whole: Figures
    replicas: dict[str, Figures]
    summed_participation_ratio: float


def read(
    url: str, *, window: float | None = None, model: str | None = None, key: str | None = None, timeout: float = 10.0
) -> Replica:
    """GET /moments of the replica at `url`, with or without a scheme or the path. FleetError says what went wrong."""
    base = url if "://" in url else f"http://{url}"
    parts = urllib.parse.urlsplit(base)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise FleetError(f"{url}: expected an address such as http://10.0.0.7:8000")
    given = {"window": None if window is None else f"{window:g}", "model": model}
    query = urllib.parse.urlencode({name: value for name, value in given.items() if value is not None})
    path = parts.path.rstrip("/").removesuffix("/moments") + "/moments"
    request = urllib.request.Request(urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, query, "")))
    if key is not None:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with _opener.open(request, timeout=timeout) as response:
            body = response.read(_LARGEST_ANSWER)
    except urllib.error.HTTPError as error:
        raise FleetError(f"{url}: {_refusal(error)}") from error
    except (OSError, ValueError, HTTPException) as error:
        raise FleetError(f"{url}: unreachable: {getattr(error, 'reason', error)}") from error
    try:
        length = int.from_bytes(body[:8], "little")
        metadata = json.loads(body[8 : 8 + length]).get("__metadata__", {})
        moments = Moments.from_tensors(load(body))
    except (SafetensorError, ValueError, AttributeError) as error:
        raise FleetError(f"{url}: answered something that is not moments: {error}") from error
    identity = {name: str(metadata.get(name, "unknown")) for name in ("model", "revision", "window")}
    return Replica(url, moments=moments, **identity)


def read_all(urls: Sequence[str], **options: Any) -> list[Replica]:
    """`read` each, at once. FleetError names every replica that failed: a fleet's figure is of all or of nothing."""
    if len(set(urls)) < len(urls):
        raise FleetError("a replica is named twice; its rows would count twice")
    with ThreadPoolExecutor(max_workers=max(1, min(16, len(urls)))) as pool:
        futures = [pool.submit(read, url, **options) for url in urls]
        errors = [str(error) for future in futures if isinstance(error := future.exception(), FleetError)]
    if errors:
        raise FleetError("; ".join(errors))
    return [future.result() for future in futures]


def combine(replicas: Sequence[Replica]) -> Fleet:
    """Merge replicas of one encoder. FleetError for none and where model, revision, window or dimension differ."""
    if not replicas:
        raise FleetError("name at least one replica")
    for name, values in {
        "model": [it.model for it in replicas],
        "revision": [it.revision for it in replicas],
        "window": [it.window for it in replicas],
        "dimension": [str(it.moments.dimension) for it in replicas],
    }.items():
        if len(set(values)) > 1:
            held = ", ".join(f"{it.url} {value}" for it, value in zip(replicas, values, strict=True))
            raise FleetError(f"the replicas differ in {name} and cannot be merged: {held}")
    traces = [it.moments.traces() for it in replicas if it.moments.count >= 4]
    squared = sum(it.count * it.trace_squared for it in traces)
    product = sum(it.count * it.square_trace for it in traces)
    first = replicas[0]
    return Fleet(
        first.model,
        first.revision,
        first.window,
        Figures.of(merge(it.moments for it in replicas)),
        {it.url: Figures.of(it.moments) for it in replicas},
        squared / product if product > 0 else float("nan"),
    )


def _refusal(error: urllib.error.HTTPError) -> str:
    try:
        said = json.loads(error.read(65536))["error"]["message"]
    except (ValueError, KeyError, TypeError, OSError):
        said = error.reason
    if error.code in (401, 403):
        return f"the key was refused ({error.code}): {said}"
    return f"answered {error.code}: {said}"


class _StayHere(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: it would carry the key to another host."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        return None


_opener = urllib.request.build_opener(_StayHere)
