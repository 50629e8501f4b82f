"""What a report is about: an encoder, a file of rows or a running service, measured."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fullrank.bounds import Interval
from fullrank.calibration.inputs import describe_as
from fullrank.reference import Reference
from fullrank.rows import unit
from fullrank.verdict import MINIMUM_ROWS
from models.artifact import Artifact, Canary
from models.embedder import Embedder
from models.gate import Judgement, judge
from models.references import ImageFolder
from models.report.album import Album, Arrays, shrunk
from models.report.measuring import Tally, choose, sampled
from models.report.rows import Rows, RowsError
from models.report.words import extras, service_figures

SAMPLE = 1024
"""Rows that neighbours are searched among: all pairs of them are compared."""
REFERENCE_ROWS = 4096
LEAST_COMPARED = 12

Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class Subject:
    """One encoder, file or service, measured.

    judged: whether the reference's thresholds apply to these rows, so that the snapshot's verdict counts.
    window: the window of the snapshot that the figures are of.
    sample: unit rows (m, d), with names and an album where there are any; `where` they lie among all images.
    canary: fixed images, and what they should embed to.
    """

    name: str
    kind: str
    facts: dict[str, str]
    snapshot: dict[str, Any]
    window: str
    figures: dict[str, Interval]
    judged: bool
    reference: Reference | None = None
    sample: Tensor = field(default_factory=lambda: torch.zeros(0, 2))
    ids: list[str] | None = None
    album: Album | None = None
    gate: Judgement | None = None
    canary: Canary | None = None
    where: Tensor | None = None
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> tuple[str, str]:
        """State and reason: of the traffic where there is some to judge, else of the gate."""
        said = self.snapshot["verdict"]
        if self.judged or self.gate is None or said["state"] == "model_fault":
            return said["state"], said["reason"]
        return ("pass" if self.gate.passed else "refused"), self.gate.reason


def of_rows(
    opened: Rows, reference: Reference | None, compared_with: str, progress: Progress, album: Album | None = None
) -> Subject:
    """Measure a file of rows in one pass. RowsError if the reference has another width, or no row is usable."""
    d = opened.dimension
    if reference is not None and reference.dimension != d:
        raise RowsError(f"{opened.path}: rows of width {d}; {compared_with} has {reference.dimension} dimensions")
    tally = Tally(d, reference, opened.count)
    positions = choose(opened.count, SAMPLE)
    picked: list[Tensor] = []
    ids: list[str] = []
    start = 0
    for chunk in opened.chunks():
        tally.add(chunk.rows)
        inside = positions[(positions >= start) & (positions < start + len(chunk.rows))] - start
        picked.append(chunk.rows[inside])
        ids += [chunk.ids[i] for i in inside.tolist()] if chunk.ids else []
        start += len(chunk.rows)
        progress("measuring", len(chunk.rows))
    rows = torch.cat(picked)
    good = usable(rows)
    counted = tally.counters.rows
    if not counted["sampled"]:
        raise RowsError(f"{opened.path}: none of its {opened.count} rows is finite and not zero")
    notes = [
        f"{counted[fate]:,} of {opened.count:,} rows {words}, and count in nothing else."
        for fate, words in (("nonfinite", "are not finite"), ("zero", "are all zero"))
        if counted[fate]
    ]
    facts = {"rows": f"{opened.count:,}", "dimensions": f"{d:,}", "file": str(opened.path)}
    if reference is not None:
        facts["judged by"] = compared_with
    sample = unit(rows[good])
    names = [it for it, kept in zip(ids, good.tolist(), strict=True) if kept] if ids else None
    shown = album if album is not None and bool(good.all()) else None
    subject = _measured(opened.path.name, "rows", facts, tally, reference, sample, notes)
    return replace(subject, ids=names, album=shown)


def of_encoder(
    artifact: Artifact,
    embedder: Embedder,
    against: Artifact | None,
    images: ImageFolder | None,
    progress: Progress,
    canary: Tensor | None = None,
) -> Subject:
    """Measure an encoder: on a folder's images, else on `canary` images (m, c, h, w), else on its own canary's.

    ValueError if there are no images, or none can be read.
    """
    reference = artifact.reference
    gate = judge(embedder, artifact, against)
    fixed = canary if canary is not None or artifact.canary is None else artifact.canary.images
    judged = reference if images is not None else None  # a canary is no traffic: thresholds say nothing about it
    if images is not None:
        seen, pictures, tally = _embedded(artifact, embedder, images, progress)
        skipped = f"{len(images.skipped)} files could not be read: {images.reasons()}."
        notes = [skipped] if images.skipped else []
    elif fixed is not None:
        seen, pictures = embedder.embed_arrays(fixed), fixed
        tally = Tally(artifact.card.dimension, None, len(seen))
        tally.add(seen)
        remedy = "--data DIR measures images of yours, and judges them by the reference"
        notes = [f"Measured on {len(seen)} canary images, which are not traffic: {remedy}."]
    else:
        raise ValueError(
            f"{artifact.card.name} has no canary images: give images with --data DIR, or run `fullrank reference`"
        )
    fixed_rows = None
    if judged is not None and judged.canary is not None and artifact.canary is not None:
        fixed_rows = embedder.embed_arrays(artifact.canary.images)
    where = usable(seen).nonzero().flatten()
    where = where[choose(len(where), SAMPLE)]
    subject = _measured(
        artifact.card.name,
        "encoder",
        _facts(artifact, len(seen)),
        tally,
        judged,
        unit(seen[where]),
        notes,
        canary_rows=fixed_rows,
        healthy=reference,
    )
    return replace(
        subject, gate=gate, canary=artifact.canary, reference=reference, where=where, album=Arrays(pictures[where])
    )


def _embedded(
    artifact: Artifact, embedder: Embedder, images: ImageFolder, progress: Progress
) -> tuple[Tensor, Tensor, Tally]:
    """Rows and small pictures of a folder's images, and their tally. ValueError if none can be read."""
    tally = Tally(artifact.card.dimension, artifact.reference, len(images))
    known = None if artifact.reference is None else artifact.reference.inputs
    rows, small = [], []
    for pixels in images.pixels(artifact.card.preprocessing):
        rows.append(embedder.embed(pixels))
        tally.add(rows[-1], torch.from_numpy(describe_as(known, pixels)))
        small.append(shrunk(torch.from_numpy(pixels)))
        progress("embedding", len(pixels))
    if not rows:
        raise ValueError(f"none of the {len(images)} images could be read: {images.reasons()}")
    return torch.cat(rows), torch.cat(small), tally


def _facts(artifact: Artifact, images: int) -> dict[str, str]:
    card = artifact.card
    facts = {"revision": card.revision, "architecture": card.architecture.named() if card.architecture else "ONNX"}
    facts |= {"dimensions": str(card.dimension), "images": f"{images:,}"}
    if card.source is not None:
        facts["weights"] = f"{card.source.family}, {card.source.licence or 'licence not stated'}"
    knn = card.quality.get("knn")
    return facts | ({"measured kNN accuracy": f"{knn:.1%}"} if isinstance(knn, float) else {})


def of_service(url: str, answer: Mapping[str, Any]) -> Subject:
    """A running service by its answer to GET /spectrum. ValueError if that is no such answer."""
    windows = answer.get("windows")
    if not isinstance(windows, Mapping) or not windows or "verdict" not in answer:
        raise ValueError(f"{url}: its answer is no spectrum; is this a fullrank service?")
    by_length = sorted(windows, key=float)
    window = next((it for it in by_length if int(windows[it].get("rows") or 0) >= MINIMUM_ROWS), by_length[-1])
    facts = {it: str(answer[it]) for it in ("model", "revision") if answer.get(it)}
    facts |= {"window": f"the last {float(window):g} s", "rows": f"{windows[window].get('rows', 0):,}", "service": url}
    figures = service_figures(answer, windows[window])
    name = str(answer.get("model", url))
    return Subject(name, "service", facts, dict(answer), window, figures, judged=answer.get("reference") is not None)


def _measured(
    name: str,
    kind: str,
    facts: dict[str, str],
    tally: Tally,
    reference: Reference | None,
    sample: Tensor,
    notes: Sequence[str],
    *,
    canary_rows: Tensor | None = None,
    healthy: Reference | None = None,
) -> Subject:
    """The subject from its tally. reference: what judges the rows; healthy: what is shown beside them."""
    taken = tally.snapshot(canary_rows)
    snapshot = taken.to_dict()
    ((seconds, statistics),) = taken.windows.items()
    window = f"{seconds:g}"
    figures = tally.bounded(statistics)
    figures |= sampled(sample, figures) if len(sample) >= LEAST_COMPARED else {}
    if reference is None:  # nothing to compare with
        figures = {it: value for it, value in figures.items() if it not in COMPARING}
    figures |= extras(snapshot, snapshot["windows"][window])
    if snapshot["reference"] is None and healthy is not None:
        snapshot["reference"] = _described(healthy)
    judged = reference is not None
    return Subject(name, kind, facts, snapshot, window, figures, judged, reference, sample, notes=tuple(notes))


COMPARING = {"mean_shift_ratio", "head", "basis_effective_rank"}


def _described(reference: Reference) -> dict[str, Any]:
    """A reference as the snapshot describes it."""
    return {
        "participation_ratio": reference.participation_ratio,
        "effective_rank": reference.effective_rank,
        "total_variance": reference.total_variance,
        "numerical_rank": reference.numerical_rank,
        "rows": reference.rows,
        "dtype": reference.dtype,
        "eigenvalues": reference.eigenvalues.tolist(),
        "band_energy": {},
    }


def usable(rows: Tensor) -> Tensor:
    """A mask (n,) of rows that are finite and not zero."""
    squares = rows.double().square().sum(1)
    return squares.isfinite() & (squares > 0)


def reference_of(opened: Rows, progress: Progress) -> Reference | None:
    """A reference of a file's rows, from a sample of them; None if they are too few for their width, or one point."""
    wanted = min(opened.count, max(REFERENCE_ROWS, 4 * opened.dimension))
    positions = choose(opened.count, wanted, seed=1)
    picked = []
    start = 0
    for chunk in opened.chunks():
        inside = positions[(positions >= start) & (positions < start + len(chunk.rows))] - start
        picked.append(chunk.rows[inside])
        start += len(chunk.rows)
        progress("reading", len(chunk.rows))
    rows = torch.cat(picked)
    rows = rows[usable(rows)]
    if len(rows) < 2 * max(64, opened.dimension):
        return None
    # Halves at random: consecutive rows of a sorted file are not alike.
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    try:
        return Reference.build(rows[::2], rows[1::2])
    except ValueError:
        return None


def same_rows(opened: tuple[Rows, Rows], progress: Progress) -> tuple[Tensor, Tensor, list[str] | None]:
    """Unit rows (m, d) and (m, e) of two files for the same images, by name if both have names, else by position.

    RowsError if the files cannot be matched.
    """
    a, b = opened
    named = all(next(it.chunks(1)).ids for it in opened)
    if not named and a.count != b.count:
        raise RowsError(
            f"{a.path} has {a.count} rows and {b.path} has {b.count}, and not both have names: they cannot be matched"
        )
    wanted = choose(a.count, SAMPLE)
    left = _at(a, wanted, progress)
    if named:
        right = _called(b, left[1], progress)
        there = torch.tensor([it in right for it in left[1]])
        if int(there.sum()) < LEAST_COMPARED:
            raise RowsError(f"{a.path} and {b.path} have fewer than {LEAST_COMPARED} names in common")
        rows_a = left[0][there]
        ids = [it for it in left[1] if it in right]
        rows_b = torch.stack([right[it] for it in ids])
    else:
        rows_a, ids = left
        rows_b = _at(b, wanted, progress)[0]
    good = usable(rows_a) & usable(rows_b)
    names = [it for it, kept in zip(ids, good.tolist(), strict=True) if kept] if ids else None
    return unit(rows_a[good]), unit(rows_b[good]), names


def _at(opened: Rows, positions: Tensor, progress: Progress) -> tuple[Tensor, list[str]]:
    rows, ids = [], list[str]()
    start = 0
    for chunk in opened.chunks():
        inside = positions[(positions >= start) & (positions < start + len(chunk.rows))] - start
        rows.append(chunk.rows[inside])
        ids += [chunk.ids[i] for i in inside.tolist()] if chunk.ids else []
        start += len(chunk.rows)
        progress("comparing", len(chunk.rows))
    return torch.cat(rows), ids


def _called(opened: Rows, names: list[str], progress: Progress) -> dict[str, Tensor]:
    wanted = set(names)
    found = {}
    for chunk in opened.chunks():
        for i, name in enumerate(chunk.ids or ()):
            if name in wanted:
                found[name] = chunk.rows[i]
        progress("comparing", len(chunk.rows))
    return found
