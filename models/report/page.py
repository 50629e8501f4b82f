"""Builds the page of a report: what its template shows, from what was measured."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from torch import Tensor

from fullrank import __version__
from fullrank.neighbours import nearest, squared_distances
from fullrank.thresholds import BAND_GONE, TAIL_LOW
from models.report import figures
from models.report.album import Album, Arrays
from models.report.compare import Comparison, differ_only_in
from models.report.subject import LEAST_COMPARED, Subject
from models.report.words import lines, show

QUERIES = 6
SHOWN = 5
MOVED = 8
SCATTER = 3000
TONES = {"healthy": "ok", "pass": "ok", "insufficient_data": "plain", "traffic_narrowed": "warn"}
TONES |= {"traffic_shifted": "warn"}
Picture = dict[str, Any]


def render(title: str, **content: Any) -> str:
    """The page as HTML: `content` fills the template's blocks. Everything but pictures is escaped."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["show"] = show
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    empty: dict[str, Any] = {"subjects": [], "comparison": None, "parts": [], "training": []}
    return environment.get_template("page.html").render(
        empty | content, title=title, version=__version__, made=made, command=content.get("command", "")
    )


def build(
    subjects: Sequence[Subject],
    comparison: Comparison | None,
    names: list[str] | None,
    album: Album | None,
    notes: Sequence[str],
    command: str,
    training: Sequence[Markup] = (),
) -> str:
    """The page on one subject, or on two where the second is what the first is compared with.

    training: the parts of a page on the run that made the first.
    """
    first = subjects[0]
    title = first.name if len(subjects) == 1 else f"{first.name} against {subjects[1].name}"
    shown = [_subject(first, subjects[1] if len(subjects) > 1 else None)]
    shown += [_subject(it, None) for it in subjects[1:]]
    compared = None
    if comparison is not None:
        compared = _comparison(comparison, (first.name, subjects[1].name), names, album)
    return render(title, subjects=shown, comparison=compared, notes=list(notes), command=command, training=training)


def _subject(it: Subject, against: Subject | None) -> dict[str, Any]:
    state, reason = it.verdict
    window = it.snapshot["windows"][it.window]
    curves = {"now": window["eigenvalues"]}
    if (reference := it.snapshot.get("reference")) is not None:
        curves["reference"] = reference["eigenvalues"]
    if against is not None:
        curves[against.name] = against.snapshot["windows"][against.window]["eigenvalues"]
    drawn = []
    if any(curves.values()):
        drawn.append(figures.spectrum({name: of for name, of in curves.items() if of}, "Spectrum"))
    if it.judged and window["bands"] and window["bands"][0]["ratio"]["estimate"] is not None:
        drawn.append(figures.bands(window["bands"], it.snapshot["thresholds"], "Bands of directions"))
    return {
        "name": it.name,
        "kind": it.kind,
        "facts": it.facts,
        "state": state.replace("_", " "),
        "tone": TONES.get(state, "bad"),
        "reason": reason,
        "gate": None if it.gate is None or it.verdict[1] == it.gate.reason else it.gate,
        "notes": it.notes,
        "lines": lines(it.figures, it.snapshot, judge=it.judged, against=against.figures if against else None),
        "against": against.name if against else "",
        "figures": [Markup(figure) for figure in drawn],
        "directions": _directions(it),
        "sheets": _sheets(it),
    }


def _directions(it: Subject) -> dict[str, Any]:
    """Which directions are dead or weak, in words; and images that only such directions tell apart."""
    window = it.snapshot["windows"][it.window]
    d = it.snapshot["dimension"]
    rank = it.figures["numerical_rank"].estimate if "numerical_rank" in it.figures else math.nan
    rows = int(window.get("rows") or 0)
    said = []
    if rows > d:
        dead = d - int(rank)
        said.append(f"{dead} of {d} directions vary no more than rounding: they are dead." if dead else
                    f"All {d} directions vary more than rounding does.")  # fmt: skip
    else:
        said.append(f"{rows} rows span at most {rows - 1} of {d} directions: more rows are needed to call one dead.")
    weak = _weak(it, window)
    said += [
        f"Directions {first} to {last} hold {show(share)} of their reference variance: "
        + ("they are gone." if share < BAND_GONE else "they are weak.")
        for first, last, share in weak
    ]
    pairs: list[dict[str, Any]] = []
    words = ""
    if it.reference is not None and it.canary is not None and len(it.canary.images) >= LEAST_COMPARED:
        bands = it.reference.bands
        gone = [(first, last) for first, last, _ in weak] or [(bands[-2] + 1 if len(bands) > 1 else 1, bands[-1])]
        columns = torch.cat([torch.arange(first - 1, last) for first, last in gone])
        pairs = _pairs(it.canary.embeddings, it.reference.basis[:, columns], Arrays(it.canary.images))
        ranges = " and ".join(f"{first} to {last}" for first, last in gone)
        words = (
            f"Pairs of images whose difference lies most in directions {ranges}"
            + (", which are dead or weak now: a search can hardly tell them apart any more." if weak else
               ", the weakest that live. If these died, a search could tell these pairs apart least.")
        )  # fmt: skip
    return {"said": said, "pairs": pairs, "words": words}


def _weak(it: Subject, window: Mapping[str, Any]) -> list[tuple[int, int, float]]:
    """(first, last, share) of directions that hold less than half of what they should."""
    if it.judged:
        found = [(band["first"], band["last"], band["ratio"]["estimate"]) for band in window["bands"]]
        return [(first, last, share) for first, last, share in found if share is not None and share < TAIL_LOW]
    return [(dead.first, dead.last, dead.share) for dead in it.gate.dead] if it.gate is not None else []


def _pairs(rows: Tensor, directions: Tensor, album: Album) -> list[dict[str, Any]]:
    pairs, shares = differ_only_in(rows, directions, 6)
    squares = squared_distances(rows)
    return [
        {
            "images": [album.uri(a), album.uri(b)],
            "caption": f"{share:.0%} of their difference; cosine {cosine(squares, a, b)}",
        }
        for (a, b), share in zip(pairs.tolist(), shares.tolist(), strict=True)
    ]


def _sheets(it: Subject) -> list[dict[str, Any]]:
    """A few rows, each with its nearest neighbours."""
    if len(it.sample) < LEAST_COMPARED or (it.album is None and it.ids is None):
        return []
    squares = squared_distances(it.sample)
    near = nearest(squares, SHOWN)
    chosen = torch.linspace(0, len(it.sample) - 1, QUERIES).round().long().tolist()
    return [
        {"query": _item(it.album, it.ids, i, ""), "lists": [("", _neighbours(it.album, it.ids, i, near, squares))]}
        for i in chosen
    ]


def _neighbours(
    album: Album | None, ids: list[str] | None, i: int, near: Tensor, squares: Tensor, other: Tensor | None = None
) -> list[Picture]:
    found = []
    for j in near[i][:SHOWN].tolist():
        item = _item(album, ids, j, cosine(squares, i, j))
        item["changed"] = other is not None and j not in other[i].tolist()
        found.append(item)
    return found


def cosine(squares: Tensor, a: int, b: int) -> str:
    """The cosine of two rows, from the squared distances of unit rows."""
    return f"{1 - float(squares[a, b]) / 2:.3f}"


def _item(album: Album | None, ids: list[str] | None, index: int, caption: str) -> Picture:
    return {
        "uri": album.uri(index) if album is not None else None,
        "name": ids[index] if ids is not None else "",
        "caption": caption,
        "changed": False,
    }


def _comparison(it: Comparison, names: tuple[str, str], ids: list[str] | None, album: Album | None) -> dict[str, Any]:
    stay = it.overlaps[it.depth]
    few = float((it.kept < 0.5).double().mean())
    stays = f"{show(stay.estimate * it.depth)} stay on average ({stay.estimate:.0%}{_bounds(stay)})"
    agree = f"{show(it.distances.estimate)} (Spearman's correlation{_bounds(it.distances, False)}; 1 is the same order)"
    stale = "A stored index holds rows of one encoder: embed it again before queries come from the other"
    said = [
        f"Of the {it.depth} nearest images of an image, {stays}, if {names[0]} replaces {names[1]}.",
        f"{few:.0%} of the images lose more than half of them.",
        f"The order of all distances agrees to {agree}.",
        f"{stale}, unless both agree entirely.",
    ]
    m = it.images
    upper = torch.triu_indices(m, m, 1)
    keep = torch.linspace(0, upper.shape[1] - 1, min(SCATTER, upper.shape[1])).long()
    a, b = upper[:, keep]
    drawn = [
        figures.overlaps(it.overlaps, "Neighbours that stay"),
        figures.distances(
            (1 - it.squares[0][a, b] / 2).tolist(), (1 - it.squares[1][a, b] / 2).tolist(), names, "The same pairs"
        ),
    ]
    moved = []
    if album is not None or ids is not None:
        for i in it.moved[:MOVED].tolist():
            both = [
                (names[1], _neighbours(album, ids, i, it.near[1], it.squares[1])),
                (names[0], _neighbours(album, ids, i, it.near[0], it.squares[0], it.near[1])),
            ]
            query = _item(album, ids, i, f"{float(it.kept[i]):.0%} stay")
            moved.append({"query": query, "lists": both})
    told = [
        {
            "images": [album.uri(a) if album else None, album.uri(b) if album else None],
            "names": [ids[a], ids[b]] if ids else [],
            "caption": f"cosine {cosine(it.squares[1], a, b)} in {names[1]}, {cosine(it.squares[0], a, b)} in "
            f"{names[0]}",
        }
        for a, b in it.told.tolist()
        if album is not None or ids is not None
    ]
    return {
        "names": names,
        "images": m,
        "said": said,
        "figures": [Markup(figure) for figure in drawn],
        "moved": moved,
        "told": told,
        "told_words": f"Pairs that {names[1]} keeps apart and {names[0]} moves together.",
    }


def _bounds(value: Any, percent: bool = True) -> str:
    if math.isnan(value.lower):
        return ""
    if percent:
        return f", 95 % bounds {value.lower:.0%} to {value.upper:.0%}"
    return f", 95 % bounds {show(value.lower)} to {show(value.upper)}"


def described(subjects: Sequence[Subject], comparison: Comparison | None) -> dict[str, Any]:
    """The report's figures as JSON-ready values."""
    from fullrank.monitor.snapshot import to_json

    found: dict[str, Any] = {"subjects": [], "comparison": None}
    for it in subjects:
        state, reason = it.verdict
        found["subjects"].append(
            {
                "name": it.name,
                "kind": it.kind,
                "facts": it.facts,
                "verdict": {"state": state, "reason": reason},
                "gate": None if it.gate is None else {"passed": it.gate.passed, "reason": it.gate.reason},
                "measures": {name: asdict(value) for name, value in it.figures.items()},
                "notes": list(it.notes),
            }
        )
    if comparison is not None:
        found["comparison"] = {
            "images": comparison.images,
            "overlap": {str(k): asdict(value) for k, value in comparison.overlaps.items()},
            "distance_spearman": asdict(comparison.distances),
            "moved_most": comparison.moved[:MOVED].tolist(),
        }
    clean: dict[str, Any] = to_json(found)
    return clean
