"""What `fullrank embed` does with --out DIR: embed a whole source into files, and report on all of it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cli.common import Dtype, Engine, errors, fail, show, usable_folder, usable_output, worded

if TYPE_CHECKING:
    from scale.bulk import Written
    from scale.places import Place


@dataclass(frozen=True)
class How:
    """Where a source is embedded: `ray` is a cluster's address, or None for `processes` on this machine."""

    device: str
    engine: Engine
    dtype: Dtype
    processes: int | None
    ray: str | None


def embed_folder(
    source: str,
    encoder: Path,
    out: str,
    how: How,
    file_format: Literal["parquet", "npy"],
    reference: Path | None,
    as_json: bool,
) -> None:
    """Embed the shards of a source into files, with a progress bar, then print the spectrum of all rows."""
    from fullrank.monitor.snapshot import to_json
    from models.artifact import ArtifactError

    if file_format == "parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            fail(f"Parquet files need pyarrow ({error}): pip install 'fullrank-server[bulk]', or --format npy")
    from scale import bulk, ray_bulk
    from scale.places import PlaceError, place
    from scale.sources import SourceError, shards

    unread: list[str] = []
    try:
        folder = place(out)
        if isinstance(folder, Path):
            usable_folder(folder, "--out")
        if reference is not None:
            _usable(reference)
        found = shards(source)
        _fits(encoder, how)
        inputs = reference is not None
        left = bulk.begin(folder, encoder, found, file_format=file_format, inputs=inputs, dtype=how.dtype)
        with _Bar(len(found), len(found) - len(left)) as bar:
            options: dict[str, Any] = {"device": how.device, "engine": how.engine}
            options |= {"done": bar.done, "failed": unread.append}
            if how.ray is None:
                bulk.run_local(left, encoder, folder, processes=how.processes or 1, progress=bar.count, **options)
            elif left:
                ray_bulk.run_ray(left, encoder, folder, address=how.ray, processes=how.processes, **options)
        report = asdict(bulk.report(folder))
        if reference is not None and not unread:
            report |= _reference(folder, encoder, how, reference)
    except (bulk.BulkError, PlaceError, SourceError, ArtifactError) as error:
        fail("\n".join([*unread, str(error)]))
    show(to_json(report), f"{source} in {out}", as_json)
    if report["rows"] and report["errors"] == report["rows"]:
        fail(f"no image of {source} has an embedding; the errors in {out} say why. Mend the source and remove {out}")
    for reason in unread:
        errors.print(f"fullrank: {reason}", style="red", soft_wrap=True)
    if unread:
        fail(f"{len(unread)} of {len(found)} shards could not be read; the same command tries them again")


def _usable(reference: Path) -> None:
    """End the command, before anything is embedded, if the reference could not be written."""
    if reference.suffix == ".safetensors":
        usable_output(reference, "--reference")
        return
    usable_folder(reference, "--reference")
    if reference.exists() and not (reference / "encoder.json").is_file():
        fail(f"--reference: {reference} exists and is no encoder; name another folder", 2)


def _fits(encoder: Path, how: How) -> None:
    """Raise ArtifactError, before anything is written, if the encoder's rows in bfloat16 are not those in float32."""
    if how.dtype == "float32":
        return
    import torch

    from models.artifact import load
    from models.embedder import Embedder
    from models.gate import hold_to_float32

    artifact = load(encoder)
    hold_to_float32(Embedder(artifact, how.device, getattr(torch, how.dtype), engine=how.engine), artifact)


def _reference(out: "Place", encoder: Path, how: How, target: Path) -> dict[str, object]:
    """Build the reference of the whole output and save it. Returns what to tell of it."""
    from safetensors.torch import save as to_bytes

    from cli.common import write
    from models.artifact import save
    from scale.corpus import referenced

    made = referenced(out, encoder, device=how.device, engine=how.engine)
    assert made.reference is not None
    try:
        if target.suffix == ".safetensors":
            write(target, to_bytes(made.reference.tensors()), "--reference")
        else:
            save(made, target)
    except OSError as error:
        fail(f"--reference: {worded(error)}")
    return {
        "reference": str(target),
        "reference_rows": made.reference.rows,
        "calibrated": made.reference.calibration is not None,
    }


class _Bar:
    """A progress bar over shards, with images a second and the time left; plain lines if there is no terminal."""

    def __init__(self, shards: int, complete: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=errors, disable=not errors.is_terminal)
        self._task = self._bar.add_task("embedding", total=shards, completed=complete)
        self._shards = shards
        self._before = complete
        self._complete = complete
        self._rows = 0
        self._images = 0

    def __enter__(self) -> "_Bar":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def count(self, images: int) -> None:
        """Show that so many more images are embedded."""
        self._images += images
        self._bar.update(self._task, description=f"{self._images:,} images, {self._rate():,.0f}/s")

    def done(self, written: "Written") -> None:
        """Show that a shard is written."""
        self._complete += 1
        self._rows += written.rows
        self.count(max(0, self._rows - self._images))
        self._bar.update(self._task, completed=self._complete)
        if not errors.is_terminal:
            bad = f", {written.errors} bad" if written.errors else ""
            left = self._elapsed() * (self._shards - self._complete) / (self._complete - self._before)
            errors.print(
                f"{written.name}: {written.rows} images{bad}, shard {self._complete} of {self._shards}, "
                f"{self._rate():,.0f} images/s, about {duration(left)} left",
                soft_wrap=True,
            )

    def _elapsed(self) -> float:
        return max(self._bar.tasks[0].elapsed or 0.0, 1e-9)

    def _rate(self) -> float:
        return self._images / self._elapsed()


def duration(seconds: float) -> str:
    """3725.0 -> "1 h 2 min", 59.0 -> "59 s"."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
