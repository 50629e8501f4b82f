"""The last 24 hours of every model watched, and of the replica that watches them, in bounded memory.

A point holds the figures that the page draws. The latest points are kept as they came. Of older ones the worst of each
two minutes is kept, so that a short fault stays visible. Changes of the verdict and swaps are kept as events.
"""

import json
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fullrank import SpectrumMonitor
from fullrank.monitor.snapshot import Snapshot
from fullrank.rules import STATES
from service.watching.sidecar import REVISION

PERIOD = 15.0  # seconds between two points, less where the shortest window is short
KEPT = 24 * 3600.0
FINE = 360  # latest points that are kept as they came
COARSE = 720  # older points, one for each STEP seconds
STEP = KEPT / COARSE
TRACKS = 256  # models of which a history is kept
EVENTS = 100  # events kept for each model
WORDS = 300  # characters of a verdict's reason that an event keeps
SCHEMA = 1

# Ranks of which a point keeps the eigenvalue, and the energy of the band of the reference's directions that holds them:
# two to an octave. They do not change where a swap brings another reference with other bands.
RANKS = (1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 128, 181, 256, 362, 512, 724, 1024, 1448, 2048, 2896, 4096)
SMALLEST = 1e-12  # what an eigenvalue or an energy of zero is drawn as
FIGURES = (
    "effective_rank",
    "reference_effective_rank",
    "participation_ratio",
    "participation_ratio_lower",
    "participation_ratio_upper",
    "total_variance",
    "canary_cosine",
    "input_participation_ratio",
    "rows",
    "rows_per_second",
    "duplicate_share",
)
TRAFFIC = ("images_per_second", "refused_per_second", "p50", "p95", "p99", "decode", "queue", "forward", "pending")
POINT = np.dtype(
    [
        ("time", "<f8"),
        ("state", "u1"),
        ("figures", "<f4", (len(FIGURES),)),
        ("spectrum", "<f2", (len(RANKS),)),
        ("bands", "<f2", (len(RANKS),)),
    ]
)
SAMPLE = np.dtype([("time", "<f8"), ("figures", "<f4", (len(TRAFFIC),))])
Points = NDArray[Any]
Watched = tuple[str, str, SpectrumMonitor]  # model, revision, monitor


def severity(point: Points) -> float:
    """How bad the verdict of a point is."""
    return float(point["state"][0])


def delay(point: Points) -> float:
    """The slowest answers of a sample of the replica's traffic."""
    return float(np.nan_to_num(point["figures"][0, TRAFFIC.index("p99")], nan=-1.0))


class Ring:
    """Points of one kind, by time: FINE as they came, and COARSE older ones, each the worst of its step."""

    def __init__(self, dtype: np.dtype[Any], badness: Callable[[Points], float]) -> None:
        self._dtype = dtype
        self._badness = badness
        self._fine: deque[bytes] = deque(maxlen=FINE)
        self._coarse: deque[bytes] = deque(maxlen=COARSE)
        self._worst = b""  # of the step that is not over yet

    def add(self, point: Points) -> None:
        """Add one point, an array of one record. Points after its time, from before the clock was set back, go."""
        now = point["time"][0]
        for points in (self._fine, self._coarse):
            while points and self._read(points[-1])["time"][0] >= now:
                points.pop()
        self._weigh(point)
        self._fine.append(point.tobytes())

    def _weigh(self, point: Points) -> None:
        """Keep the worst of the step that is not over; the first point of another step ends it."""
        now = point["time"][0]
        if self._worst:
            worst = self._read(self._worst)
            if worst["time"][0] // STEP == now // STEP:
                if self._badness(point) < self._badness(worst):
                    return
            elif worst["time"][0] < now:
                self._coarse.append(self._worst)
        self._worst = point.tobytes()

    def since(self, start: float) -> Points:
        """The points after `start` and no older than KEPT, by time."""
        fine = self._read(b"".join(self._fine))
        if not len(fine):
            return fine
        coarse = self._read(b"".join(self._coarse))
        points = np.concatenate([coarse[coarse["time"] < fine["time"][0]], fine])
        kept: Points = points[points["time"] > max(start, fine["time"][-1] - KEPT)]
        return kept

    @property
    def latest(self) -> float:
        """The time of the latest point; minus infinity if there is none."""
        return float(self._read(self._fine[-1])["time"][0]) if self._fine else -math.inf

    def state(self) -> tuple[bytes, bytes]:
        """The fine and the coarse points."""
        return b"".join(self._fine), b"".join(self._coarse)

    def restore(self, fine: bytes, coarse: bytes) -> None:
        """Take the points of a state. Raises ValueError for bytes that are no points in order of time."""
        for data, kept in ((fine, self._fine), (coarse, self._coarse)):
            points = self._read(data)
            if not (np.isfinite(points["time"]).all() and (np.diff(points["time"]) > 0).all()):
                raise ValueError("the points are not in order of time")
            if "state" in (self._dtype.names or ()) and (points["state"] >= len(STATES)).any():
                raise ValueError("a point has a state that there is not")
            kept.clear()
            kept.extend(point.tobytes() for point in points)
        self._worst = b""
        for data in self._fine:  # the step that was not over goes on with what it had
            if (point := self._read(data))["time"][0] // STEP == self.latest // STEP:
                self._weigh(point)

    def _read(self, data: bytes) -> Points:
        return np.frombuffer(data, self._dtype)


@dataclass(eq=False)
class Track:
    """The history of one model. `identity` is NAME@REVISION of what served last under it."""

    model: str
    observed: bool
    identity: str
    ring: Ring = field(default_factory=lambda: Ring(POINT, severity))
    events: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=EVENTS))
    state: str = ""
    counted: tuple[float, int, int] | None = None  # time, rows and duplicates at the last point


class History:
    """Tracks of the models watched and samples of the replica's traffic. For the event loop alone."""

    def __init__(self) -> None:
        self._tracks: dict[tuple[str, bool], Track] = {}
        self._places: list[str] = []  # names of the encoders in service, when they were last recorded
        self._traffic = Ring(SAMPLE, delay)

    def record(self, watched: Sequence[Watched], traffic: Mapping[str, float], now: float) -> None:
        """Add a point for every model, and a sample of the traffic. `watched`: encoders in service come in order."""
        served = [model for model, revision, _ in watched if revision != REVISION]
        self._move(served)
        self._places = served
        for model, revision, monitor in watched:
            track = self._track(model, revision)
            if track is not None:
                self._note(track, f"{model}@{revision}", monitor.snapshot(), now)
        sample = np.zeros(1, SAMPLE)
        sample["time"] = now
        sample["figures"] = [traffic.get(name, math.nan) for name in TRAFFIC]
        self._traffic.add(sample)
        self._forget(now)

    def _move(self, served: Sequence[str]) -> None:
        """The history of an encoder goes to the one that replaced it."""
        for before, after in zip(self._places, served, strict=False):
            if before != after and before not in served and (before, False) in self._tracks:
                track = self._tracks.pop((before, False))
                track.model = after
                self._tracks.setdefault((after, False), track)

    def _track(self, model: str, revision: str) -> Track | None:
        """The model's track; None for one more than TRACKS."""
        key = model, revision == REVISION
        if key not in self._tracks and len(self._tracks) < TRACKS:
            self._tracks[key] = Track(*key, identity=f"{model}@{revision}")
        return self._tracks.get(key)

    def _note(self, track: Track, identity: str, snapshot: Snapshot, now: float) -> None:
        verdict = snapshot.verdict
        if track.identity != identity:
            track.events.append({"time": now, "kind": "swap", "from": track.identity, "to": identity})
            track.identity = identity
            track.counted = None
        if track.state != verdict.state:
            if track.state:
                change = {"kind": "verdict", "from": track.state, "to": verdict.state}
                track.events.append({"time": now, **change, "reason": verdict.reason[:WORDS]})
            track.state = verdict.state
        rows = sum(snapshot.counters.rows.values())
        duplicates = snapshot.counters.rows["duplicate"]
        if track.counted is not None and (rows < track.counted[1] or duplicates < track.counted[2]):
            track.counted = None  # of a monitor that began anew, as with another reference under the same name
        before, track.counted = track.counted, (now, rows, duplicates)
        track.ring.add(_point(snapshot, now, before))

    def _forget(self, now: float) -> None:
        """Remove the tracks and events that are older than KEPT."""
        for key, track in list(self._tracks.items()):
            while track.events and track.events[0]["time"] < now - KEPT:
                track.events.popleft()
            if track.ring.latest < now - KEPT:
                del self._tracks[key]

    def models(self) -> list[Track]:
        """All tracks, also of models that are watched no more."""
        return list(self._tracks.values())

    def of(self, model: str, observed: bool, since: float) -> dict[str, Any] | None:
        """What happened to a model after `since` (Unix seconds), for JSON; None if nothing is kept of it."""
        if (track := self._tracks.get((model, observed))) is None:
            return None
        points = track.ring.since(since)
        return {
            "states": STATES,
            "fields": FIGURES,
            "ranks": RANKS,
            "time": np.ascontiguousarray(points["time"]),
            "state": np.ascontiguousarray(points["state"]),
            "figures": np.ascontiguousarray(points["figures"]),
            "spectrum": np.ascontiguousarray(points["spectrum"]),
            "bands": np.ascontiguousarray(points["bands"]),
            "events": [it for it in track.events if it["time"] > since],
        }

    @property
    def latest(self) -> float:
        """The time of the latest points; minus infinity before the first."""
        return self._traffic.latest

    def traffic(self, since: float) -> dict[str, Any]:
        """The replica's traffic after `since`, for JSON."""
        points = self._traffic.since(since)
        times, figures = (np.ascontiguousarray(points[name]) for name in ("time", "figures"))
        return {"fields": TRAFFIC, "time": times, "figures": figures}

    # ---- over a restart

    def state(self) -> tuple[dict[str, Tensor], str]:
        """All of it as tensors and a line of JSON, for `restore`."""
        tensors: dict[str, Tensor] = {}
        tracks = []
        for number, track in enumerate(self._tracks.values()):
            _pack(tensors, str(number), track.ring)
            entry = {"model": track.model, "observed": track.observed, "identity": track.identity}
            tracks.append(entry | {"state": track.state, "events": list(track.events)})
        _pack(tensors, "traffic", self._traffic)
        layout = {"schema": SCHEMA, "states": STATES, "point": str(POINT), "sample": str(SAMPLE)}
        return tensors, json.dumps({"layout": layout, "places": self._places, "tracks": tracks})

    def restore(self, tensors: Mapping[str, Tensor], index: str) -> None:
        """Resume a state. Raises ValueError, and changes nothing, if it is damaged or of another layout."""
        restored = History()
        try:
            known = json.loads(index)
            layout = {"schema": SCHEMA, "states": list(STATES), "point": str(POINT), "sample": str(SAMPLE)}
            if known["layout"] != layout:
                raise ValueError("its points are of another version")
            for number, entry in enumerate(known["tracks"][:TRACKS]):
                track = Track(str(entry["model"]), bool(entry["observed"]), str(entry["identity"]))
                track.state = str(entry["state"])
                track.events.extend(dict(it) | {"time": float(it["time"])} for it in entry["events"])
                track.ring.restore(*_unpacked(tensors, str(number)))
                restored._tracks[track.model, track.observed] = track
            restored._traffic.restore(*_unpacked(tensors, "traffic"))
            restored._places = [str(name) for name in known["places"]]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"it lacks {error}") from error
        restored._forget(time.time())
        self._tracks, self._traffic, self._places = restored._tracks, restored._traffic, restored._places


def _point(snapshot: Snapshot, now: float, before: tuple[float, int, int] | None) -> Points:
    """One record of a snapshot's shortest window."""
    window = snapshot.windows[min(snapshot.windows)]
    ratio = window.participation_ratio
    rows = sum(snapshot.counters.rows.values())
    duplicates = snapshot.counters.rows["duplicate"]
    since = before or (now, rows, duplicates)
    more = rows - since[1]
    values = {
        "effective_rank": window.effective_rank,
        "reference_effective_rank": math.nan if snapshot.reference is None else snapshot.reference.effective_rank,
        "participation_ratio": ratio.estimate,
        "participation_ratio_lower": ratio.lower,
        "participation_ratio_upper": ratio.upper,
        "total_variance": window.total_variance,
        "canary_cosine": math.nan if snapshot.canary is None else snapshot.canary.cosine_min,
        "input_participation_ratio": snapshot.input_participation_ratio,
        "rows": window.rows,
        "rows_per_second": more / (now - since[0]) if now > since[0] else math.nan,
        "duplicate_share": (duplicates - since[2]) / more if more > 0 else math.nan,
    }
    point = np.zeros(1, POINT)
    point["time"] = now
    point["state"] = STATES.index(snapshot.verdict.state)
    point["figures"] = [values[name] for name in FIGURES]
    point["spectrum"] = np.nan
    # Too few rows leave eigenvalues at zero that are not: nothing is drawn then.
    if not math.isnan(window.effective_rank):
        eigenvalues = window.eigenvalues.numpy()
        ranks = [rank for rank in RANKS if rank <= len(eigenvalues)]
        logs = np.log10(np.maximum(eigenvalues[np.array(ranks) - 1], SMALLEST))
        point["spectrum"][0, : len(ranks)] = logs
    point["bands"] = np.nan
    for band in window.bands:
        if not math.isnan(band.ratio.lower):  # without bounds, too few rows say too little
            held = (band.first <= np.array(RANKS)) & (np.array(RANKS) <= band.last)
            point["bands"][0, held] = math.log10(max(band.ratio.estimate, SMALLEST))
    return point


def _pack(tensors: dict[str, Tensor], name: str, ring: Ring) -> None:
    for part, data in zip(("fine", "coarse"), ring.state(), strict=True):
        tensors[f"{name}.{part}"] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0)


def _unpacked(tensors: Mapping[str, Tensor], name: str) -> tuple[bytes, bytes]:
    fine, coarse = (tensors[f"{name}.{part}"].to(torch.uint8).numpy().tobytes() for part in ("fine", "coarse"))
    return fine, coarse
