"""The exact figures of a fleet: moments read from its replicas over HTTP and merged, each encoder's by itself."""

import json
import math
import statistics
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from email.message import Message
from http.client import HTTPException
from typing import IO, Any, Self

from fullrank import measures
from fullrank.measures import minimum_rows
from fullrank.moments import Moments, merge
from fullrank.monitor.snapshot import to_json
from fullrank.stored import tensors_in
from fullrank.thresholds import PARTICIPATION_COLLAPSE_SHARE, VARIANCE_SHARE

UNKNOWN = "unknown"
BROKEN = ("dimensional_collapse", "complete_collapse", "model_fault")
_LARGEST_ANSWER = 1 << 30


class FleetError(ValueError):
    """A replica that cannot be read, or replicas that do not belong together; the message names them."""


@dataclass(frozen=True)
class Replica:
    """What one replica answered: whose moments, over which window (seconds, as text), and the moments.

    verdict, reason: the replica's own; seen: rows its monitor has been shown since it started. Replicas of an earlier
    version do not tell.
    """

    url: str
    model: str
    revision: str
    window: str
    moments: Moments
    verdict: str = UNKNOWN
    reason: str = ""
    seen: int | None = None


@dataclass(frozen=True)
class Figures:
    """What moments say; NaN where the rows are too few, `minimum_rows` being about how many the rank needs."""

    rows: int
    effective_rank: float
    participation_ratio: float
    total_variance: float
    minimum_rows: int

    @classmethod
    def of(cls, moments: Moments, *, ranked: bool = True) -> Self:
        """Measure, by one eigendecomposition; without it, which costs d times as much as the rest, unless `ranked`."""
        if moments.count < 2:
            return cls(moments.count, math.nan, math.nan, math.nan, minimum_rows([]))
        if not ranked:
            traces = moments.traces()
            variance = float(moments.covariance().trace())
            return cls(moments.count, math.nan, traces.participation_ratio, variance, minimum_rows([]))
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


@dataclass(frozen=True)
class Member:
    """One replica in a survey: its own verdict, its figures, and why it stands out among its like; else ""."""

    url: str
    verdict: str
    reason: str
    seen: int | None
    figures: Figures
    stands_out: str = ""


@dataclass(frozen=True)
class Group:
    """Replicas that belong together: of one encoder, revision, window and dimension. `whole`: their rows merged."""

    model: str
    revision: str
    window: str
    dimension: int
    whole: Figures
    summed_participation_ratio: float
    members: list[Member]


@dataclass(frozen=True)
class Survey:
    """All replicas of a fleet, in groups that are never averaged with each other.

    unread: address -> why it could not be read. problems: in words, what somebody should look at; empty if nothing.
    """

    groups: list[Group]
    unread: dict[str, str]
    problems: list[str]


def read(
    url: str, *, window: float | None = None, model: str | None = None, key: str | None = None, timeout: float = 10.0
) -> Replica:
    """GET /moments of the replica at `url`, with or without a scheme or the path. FleetError says what went wrong."""
    base = url if "://" in url else f"http://{url}"
    try:
        parts = urllib.parse.urlsplit(base)
    except ValueError:  # such as half an IPv6 address
        parts = None
    if parts is None or parts.scheme not in ("http", "https") or not parts.netloc:
        raise FleetError(f"{url}: expected an address such as http://10.0.0.7:8000")
    given = {"window": None if window is None else f"{window:g}", "model": model, "packed": "true"}
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
        moments = Moments.from_tensors(tensors_in(body))
    except (ValueError, AttributeError) as error:
        raise FleetError(f"{url}: answered something that is not moments: {error}") from error
    identity = {name: str(metadata.get(name, UNKNOWN)) for name in ("model", "revision", "window", "verdict")}
    seen = str(metadata.get("seen", ""))
    return Replica(
        url,
        moments=moments,
        reason=str(metadata.get("reason", "")),
        seen=int(seen) if seen.isdecimal() else None,
        **identity,
    )


def read_all(urls: Sequence[str], **options: Any) -> list[Replica]:
    """`read` each, at once. FleetError names every replica that failed: a fleet's figure is of all or of nothing."""
    found, unread = try_all(urls, **options)
    if unread:
        raise FleetError("; ".join(unread.values()))
    return found


def try_all(urls: Sequence[str], **options: Any) -> tuple[list[Replica], dict[str, str]]:
    """`read` each, at once: the replicas that answered, and address -> reason for the others.

    FleetError only for an address that is named twice.
    """
    if len(set(urls)) < len(urls):
        raise FleetError("a replica is named twice; its rows would count twice")
    with ThreadPoolExecutor(max_workers=max(1, min(16, len(urls)))) as pool:
        futures = {url: pool.submit(read, url, **options) for url in urls}
        unread = {url: str(error) for url, it in futures.items() if isinstance(error := it.exception(), FleetError)}
    return [it.result() for url, it in futures.items() if url not in unread], unread


def survey(replicas: Sequence[Replica], unread: Mapping[str, str] | None = None, *, ranked: bool = True) -> Survey:
    """Group replicas by encoder, revision, window and dimension, merge each group, and name who stands out.

    Nothing is merged across groups. A replica stands out if its own verdict says that its embeddings are broken, or if
    its variance or participation ratio is far below the median of two or more others: by the shares that the verdict
    itself uses. Unless `ranked`, effective ranks are NaN, and nothing is decomposed.
    """
    together: dict[tuple[str, str, str, int], list[Replica]] = {}
    for it in replicas:
        together.setdefault((it.model, it.revision, it.window, it.moments.dimension), []).append(it)
    groups = [_group(key, together[key], ranked) for key in sorted(together)]
    problems = [f"{url} gives no figures: {reason.removeprefix(f'{url}: ')}" for url, reason in (unread or {}).items()]
    for model in dict.fromkeys(it.model for it in groups):
        held = {it.revision: [member.url for member in it.members] for it in groups if it.model == model}
        if len(held) > 1:
            said = "; ".join(f"{revision} on {', '.join(urls)}" for revision, urls in held.items())
            problems.append(f"the replicas of {model} serve {len(held)} revisions, which are not averaged: {said}")
    for group in groups:
        problems += _who_stands_out(group)
    return Survey(groups, dict(unread or {}), problems)


def to_dict(found: Survey) -> dict[str, Any]:
    """JSON-able: NaN as None. A fleet of one group also has that group's fields at the top, as earlier versions did."""
    value = asdict(found)
    if len(found.groups) == 1:
        only = value["groups"][0]
        value |= {name: only[name] for name in ("model", "revision", "window", "whole", "summed_participation_ratio")}
        value["replicas"] = {it["url"]: it["figures"] for it in only["members"]}
    json_able: dict[str, Any] = to_json(value)
    return json_able


def _group(key: tuple[str, str, str, int], replicas: list[Replica], ranked: bool) -> Group:
    whole = combine(replicas, ranked=ranked)
    members = [
        Member(it.url, it.verdict, it.reason, it.seen, figures, _stands_out(it, whole.replicas))
        for it, figures in zip(replicas, whole.replicas.values(), strict=True)
    ]
    return Group(*key, whole.whole, whole.summed_participation_ratio, members)


def _stands_out(replica: Replica, figures: Mapping[str, Figures]) -> str:
    if replica.verdict in BROKEN:
        return f"{replica.verdict}: {replica.reason}"
    for name, share in (("total_variance", VARIANCE_SHARE), ("participation_ratio", PARTICIPATION_COLLAPSE_SHARE)):
        values = {url: value for url, it in figures.items() if math.isfinite(value := getattr(it, name))}
        own = values.pop(replica.url, math.inf)
        if len(values) >= 2 and own < share * (usual := statistics.median(values.values())):
            return f"{name.replace('_', ' ')} {own:.3g}, where the others' median is {usual:.3g}"
    return ""


def _who_stands_out(group: Group) -> list[str]:
    odd = [it for it in group.members if it.stands_out]
    of = f"{group.model}@{group.revision}"
    if len(odd) == len(group.members) > 1:
        return [f"all {len(odd)} replicas of {of} say that it is broken, so look at the encoder: {odd[0].stands_out}"]
    alone = "" if len(odd) != 1 or len(group.members) == 1 else " alone"
    return [f"{it.url} stands out{alone} among {len(group.members)} replicas of {of}: {it.stands_out}" for it in odd]


def combine(replicas: Sequence[Replica], *, ranked: bool = True) -> Fleet:
    """Merge replicas of one encoder. FleetError for none and where model, revision, window or dimension differ.

    Unless `ranked`, effective ranks are NaN, and nothing is decomposed.
    """
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
        Figures.of(merge(it.moments for it in replicas), ranked=ranked),
        {it.url: Figures.of(it.moments, ranked=ranked) for it in replicas},
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
