"""The front door, `fullrank COMMAND`; rooms are imported by their commands."""

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train encoders that do not collapse, serve them, and be paged the moment their embeddings do.",
)
errors = Console(stderr=True)
OPTIMIZERS, GUARDS = ("sgd", "lars", "adamw"), ("warn", "stop", "off")
# For commands whose arguments, --help among them, are read by the room they run in.
FORWARDED = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def usable(device: str) -> str:
    """A device that torch can compute on. Raises BadParameter."""
    if device != "cpu":
        import torch

        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            raise typer.BadParameter(f"{device!r} cannot be used here: {reason}; cpu always can") from error
    return device


AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
DataFolder = Annotated[Path | None, typer.Option("--data", help="Folder of the data set; its usual place if absent.")]
Device = Annotated[str, typer.Option(callback=usable, help="cpu, cuda, cuda:1, ...")]


def fail(message: object, code: int = 1) -> NoReturn:
    errors.print(f"fullrank: {message}", style="red", highlight=False, soft_wrap=True)
    raise typer.Exit(code)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe, DATA-METHOD; see --list.")] = "",
    data: DataFolder = None,
    out: Annotated[Path | None, typer.Option(help="Run folder: log, checkpoint, encoder/. [runs/RECIPE]")] = None,
    epochs: Annotated[int | None, typer.Option(min=1)] = None,
    batch_size: Annotated[int | None, typer.Option(min=2)] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0.0, help="The peak, for this batch size.")] = None,
    weight_decay: Annotated[float | None, typer.Option(min=0.0)] = None,
    optimizer: Annotated[str | None, typer.Option(help="sgd, lars or adamw.")] = None,
    clip: Annotated[float | None, typer.Option(min=0.0, help="Largest norm of the gradient.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only this many training images.")] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    option: Annotated[list[str] | None, typer.Option(help="NAME=VALUE for the method, e.g. d0=64. Repeatable.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the encoder. [the recipe's]")] = None,
    device: Device = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. [torch's choice]")] = None,
    init: Annotated[Path | None, typer.Option(help="Start from this encoder's weights.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run folder's checkpoint, if any.")] = False,
    checkpoint_minutes: Annotated[float, typer.Option(min=0.0, help="Save this often, and after each epoch.")] = 10.0,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode image files.")] = 8,
    compiled: Annotated[bool, typer.Option("--compile", help="Run the model through torch.compile.")] = False,
    guard: Annotated[str, typer.Option(help="On collapse: warn, stop or off.")] = "warn",
    guard_share: Annotated[float, typer.Option(help="Collapse: effective rank below this share of its best.")] = 0.5,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write OUT/tensorboard.")] = False,
    metrics_port: Annotated[int | None, typer.Option(min=1, max=65535, help="Serve Prometheus metrics.")] = None,
    as_json: AsJson = False,
    show: Annotated[bool, typer.Option("--list", help="List the recipes and stop.")] = False,
) -> None:
    """Train an encoder and write it as an artifact that `fullrank serve` takes.

    Example: fullrank train fashion-directclr --epochs 5 --out runs/first
    """
    from training.checkpoint import StoppedError
    from training.data import DataError
    from training.loop import Run, TrainingError
    from training.loop import train as run_training
    from training.recipes import RECIPES, describe
    from training.recipes import recipe as find

    if show or not recipe:
        typer.echo("\n".join(describe(name) for name in RECIPES))
        raise typer.Exit(0 if show else 2)
    try:
        chosen = find(recipe)
    except ValueError as error:
        fail(error, 2)
    for flag, value, allowed in (("optimizer", optimizer, OPTIMIZERS), ("guard", guard, GUARDS)):
        if value is not None and value not in allowed:
            fail(f"--{flag}: {value!r} is none of {', '.join(allowed)}", 2)
    flags: dict[str, Any] = {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed}
    flags |= {"weight_decay": weight_decay, "optimizer": optimizer, "clip": clip}
    chosen = replace(chosen, **{key: value for key, value in flags.items() if value is not None})
    chosen = replace(chosen, name=name or recipe, options=chosen.options | _options(option or []))
    run = Run(
        out=out or Path("runs", chosen.name),
        data=data,
        limit=limit,
        device=device,
        threads=threads,
        resume=resume,
        init=init,
        command=shlex.join(["fullrank", *sys.argv[1:]]),
        workers=workers,
        compile=compiled,
        checkpoint_minutes=checkpoint_minutes,
        guard=guard,  # type: ignore[arg-type]
        guard_share=guard_share,
        tensorboard=tensorboard,
        metrics_port=metrics_port,
    )
    try:
        artifact = run_training(chosen, run)
    except StoppedError as error:
        fail(error, 130)
    except (DataError, TrainingError, ValueError, OSError) as error:
        fail(error)
    if as_json:
        typer.echo(artifact.card.model_dump_json(indent=2))


@app.command()
def evaluate(
    encoder: Annotated[
        Path, typer.Argument(help="An encoder's folder, a run's folder, or `pixels` for the raw-pixel baseline.")
    ],
    data: DataFolder = None,
    dataset: Annotated[str | None, typer.Option(help="A data set by name. [what the encoder was trained on]")] = None,
    probes: Annotated[
        bool, typer.Option("--probes", help="Linear probes too, on all, 10 % and 1 % of labels.")
    ] = False,
    protocol: Annotated[
        bool, typer.Option("--sgd", help="The papers' SGD protocols too: linear evaluation, fine-tuning on few labels.")
    ] = False,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of --sgd. [the papers']")] = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Weighted kNN (k = 20, temperature 0.07) on the test set, the spectrum of its embeddings, and probes if asked.

    Example: fullrank evaluate models/pretrained/fashion-directclr
    """
    from models.artifact import ArtifactError, load
    from training import evaluate as room
    from training.data import SOURCES, DataError, load_data
    from training.distributed import device_of
    from training.finetune import sgd_table

    if protocol and str(encoder) == "pixels":
        fail("--sgd: pixels have no encoder to fine-tune; --probes measures them", 2)
    if epochs and not protocol:
        fail("--epochs: only --sgd trains for epochs; add it", 2)
    try:
        device_of(device)
        folder = encoder / "encoder" if (encoder / "encoder" / "encoder.json").is_file() else encoder
        artifact = None if str(encoder) == "pixels" else load(folder)
        trained_on = artifact.card.training.get("data") if artifact else "fashion"
        source = dataset or trained_on
        if source not in SOURCES:
            fail(f"--dataset: name one of {', '.join(SOURCES)}; the encoder's card says {trained_on!r}", 2)
        train_set, test_set = load_data(source, data)
        quality = (
            room.evaluate(artifact, train_set, test_set, device, probes)
            if artifact
            else room.evaluate_pixels(train_set, test_set, probes)
        )
        if artifact and protocol:
            quality |= sgd_table(artifact, train_set, test_set, device, epochs)
    except (ArtifactError, DataError, ValueError) as error:
        fail(error)
    _report(quality, f"{encoder} on {source}", as_json)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; several are compared.")],
    out: Annotated[Path, typer.Option(help="The HTML page to write.")] = Path("report.html"),
) -> None:
    """Write one self-contained HTML page on training runs: curves, spectra over epochs, comparison.

    Example: fullrank report runs/fashion-simclr runs/fashion-directclr --out report.html
    """
    from training.report import ReportError, write

    try:
        write(runs, out)
    except (ReportError, OSError) as error:
        fail(error)
    typer.echo(str(out))


@app.command()
def check(
    encoder: Annotated[Path, typer.Argument(help="The candidate's folder.")],
    against: Annotated[Path | None, typer.Option(help="The incumbent's folder; without it, absolute floors.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write the judgement as JUnit XML, for CI.")] = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Refuse a collapsed or damaged encoder before it is deployed, saying which of its directions died.

    Exit code 0: it may serve. 1: it is collapsed, damaged or cannot be read. 2: the command was not understood.

    Example: fullrank check models/pretrained/fashion-byol --against models/pretrained/fashion-directclr
    """
    from dataclasses import asdict

    from fullrank.snapshot import to_json
    from models.artifact import ArtifactError, load
    from models.embedder import Embedder
    from service.gate import Judgement, judge
    from service.junit import junit as report_of

    try:
        candidate, incumbent = load(encoder), load(against) if against else None
        judgement = judge(Embedder(candidate, device), candidate, incumbent)
    except (ArtifactError, ValueError) as error:
        judgement = Judgement(False, str(error))
    if junit:
        try:
            junit.write_bytes(report_of(encoder.name, judgement))
        except OSError as error:
            fail(f"--junit: {error}", 2)
    if as_json:
        typer.echo(json.dumps(to_json(asdict(judgement)), indent=2))
    elif not judgement.checks:
        fail(judgement.reason)
    else:
        typer.echo(f"{'pass' if judgement.passed else 'FAIL'}  {candidate.card.name}: {judgement.reason}")
    raise typer.Exit(0 if judgement.passed else 1)


@app.command()
def reference(
    encoder: Annotated[Path, typer.Argument(help="The encoder's folder.")],
    data: Annotated[Path | None, typer.Option(help="Folder of image files like those it will be sent.")] = None,
    dataset: Annotated[str | None, typer.Option(help="A data set by name, in --data or its usual place.")] = None,
    canary: Annotated[
        str, typer.Option(help="Folder of images that may be redistributed, or `synthetic`.")
    ] = "synthetic",
    licence: Annotated[str, typer.Option(help="Licence of the images of --canary DIR.")] = "unstated",
    limit: Annotated[int, typer.Option(min=128, help="Use at most so many images.")] = 40_000,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, as it will be served.")] = "float32",
    out: Annotated[Path | None, typer.Option(help="Write to this folder instead of the encoder's own.")] = None,
    replace_old: Annotated[
        bool, typer.Option("--replace", help="Even if the encoder has a reference already.")
    ] = False,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Give an encoder a reference: what its embeddings of healthy traffic look like, and canary images.

    Example: fullrank reference my-encoder --data photographs/ --canary synthetic
    """
    import torch
    from rich.progress import Progress

    from models.artifact import ArtifactError, load, save
    from models.embedder import Embedder
    from training import reference as room
    from training.data import SOURCES, DataError, load_data

    if dtype not in ("float32", "bfloat16"):
        fail(f"--dtype: {dtype!r} is neither float32 nor bfloat16", 2)
    if data is None and dataset is None:
        fail("--data: give a folder of image files, or --dataset one of " + ", ".join(SOURCES), 2)
    if dataset is not None and dataset not in SOURCES:
        fail(f"--dataset: {dataset!r} is none of {', '.join(SOURCES)}", 2)
    try:
        artifact = load(encoder)
        if artifact.reference is not None and not (out or replace_old):
            fail(f"{encoder} has a reference already; --replace it, or write elsewhere with --out", 2)
        preprocessing = artifact.card.preprocessing
        images = room.Folder.of(data, limit) if dataset is None and data else None
        if images is not None:
            count, pixels = len(images), images.pixels(preprocessing)
        else:
            # Not what it may have been trained on: training images are embedded a little too well.
            test = load_data(str(dataset), data)[1]
            count, pixels = min(limit, len(test)), room.of_data_set(test, preprocessing, limit)
        fixed = room.canary_images(None if canary == "synthetic" else Path(canary), preprocessing)
        with Progress(console=errors, transient=True) as bar:
            task = bar.add_task("embedding", total=count)
            done = room.build(
                artifact,
                pixels,
                fixed,
                "CC0-1.0 (synthetic)" if canary == "synthetic" else licence,
                embedder=Embedder(artifact, device, getattr(torch, dtype)),
                progress=lambda n: bar.advance(task, n),
            )
        save(done, out or encoder)
    except (ArtifactError, DataError, OSError) as error:
        fail(error)
    skipped = images.skipped if images is not None else []
    if skipped:
        errors.print(f"{len(skipped)} files skipped: {room.first_few(skipped)}", highlight=False, soft_wrap=True)
    made = done.reference
    assert made is not None
    if made.calibration is None:
        errors.print("too few images to calibrate thresholds on: general ones are used", highlight=False)
    values = {"encoder": str(out or encoder), "rows": made.rows, "skipped": len(skipped), "canary": len(fixed)}
    values |= {"participation_ratio": made.participation_ratio, "effective_rank": made.effective_rank}
    _report(values | {"calibrated": made.calibration is not None}, "reference", as_json)


@app.command(context_settings=FORWARDED)
def serve(context: typer.Context) -> None:
    """Serve an encoder over HTTP; `fullrank serve --help` lists every setting."""
    from pydantic import ValidationError
    from pydantic_settings import CliApp

    from service.app import serve as run_service
    from service.settings import Settings

    try:
        run_service(CliApp.run(Settings, context.args))
    except ValidationError as error:
        fail("; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()), 2)
    except RuntimeError as error:
        fail(error)


@app.command()
def fleet(
    urls: Annotated[list[str], typer.Argument(help="Replicas of one encoder, each with its own address.")],
    key: Annotated[str | None, typer.Option(envvar="FULLRANK_API_KEY", help="The services' key.")] = None,
    window: Annotated[float | None, typer.Option(help="Seconds. [the longest window kept]")] = None,
    model: Annotated[str | None, typer.Option(help="A model known from POST /observe. [the served one]")] = None,
    as_json: AsJson = False,
) -> None:
    """The exact effective rank of a fleet: moments of all replicas merged, beside what each alone and their sum say.

    Example: fullrank fleet http://10.0.0.7:8000 http://10.0.0.8:8000 --window 300
    """
    from dataclasses import asdict

    from fullrank.fleet import FleetError, combine, read_all
    from fullrank.snapshot import to_json

    try:
        found = combine(read_all(urls, window=window, model=model, key=key))
    except FleetError as error:
        fail(error)
    if as_json:
        typer.echo(json.dumps(to_json(asdict(found)), indent=2))
        return
    title = f"{found.model} {found.revision}, last {found.window} s"
    table = Table("", "rows", "effective rank", "participation ratio", "total variance", title=title)
    for name, it in [*found.replicas.items(), ("fleet, exact", found.whole)]:
        rank = f"{it.effective_rank:.1f}" if it.effective_rank >= 0 else f"needs about {it.minimum_rows} rows"
        table.add_row(name, str(it.rows), rank, f"{it.participation_ratio:.1f}", f"{it.total_variance:.4g}")
    table.add_row("sum of rates", "", "", f"{found.summed_participation_ratio:.1f}", "")
    Console().print(table)
    typer.echo(
        "The sum weighs each replica by its variance squared: a collapsed replica vanishes from it, and what differs "
        "between replicas is not in it. Alert on each replica; believe the exact line for the fleet."
    )


@app.command()
def embed(
    files: Annotated[list[Path], typer.Argument(help="Image files.")],
    encoder: Annotated[Path | None, typer.Option(help="Embed here, with the encoder in this folder.")] = None,
    url: Annotated[str | None, typer.Option(help="Embed there: the address of a running service.")] = None,
    key: Annotated[str | None, typer.Option(envvar="FULLRANK_API_KEY", help="The service's key.")] = None,
    device: Device = "cpu",
    out: Annotated[Path | None, typer.Option(help="Write an .npy file instead of JSON lines.")] = None,
) -> None:
    """Embed image files, here or by a running service, by the same path; rows are L2-normalised.

    Example: fullrank embed examples/ankle-boot.png --url http://127.0.0.1:8000
    """
    import numpy as np

    if url is not None and encoder is None:
        rows = _embed_there(files, url, key)
    elif encoder is not None and url is None:
        rows = _embed_here(files, encoder, device)
    else:
        fail("give either --encoder or --url", 2)
    if out:
        try:
            np.save(out, rows)
        except OSError as error:
            fail(f"--out: {error}")
        return
    for path, row in zip(files, rows, strict=True):
        typer.echo(json.dumps({"file": str(path), "embedding": row.tolist()}))


def _embed_there(files: list[Path], url: str, key: str | None) -> Any:
    try:
        from service.client import Client, EmbeddingError
    except ImportError as error:
        fail(error)
    try:
        with Client(url, key=key, progress=sys.stderr.isatty()) as client:
            return client.embed(files)
    except (EmbeddingError, OSError) as error:
        fail(error)


def _embed_here(files: list[Path], encoder: Path, device: str) -> Any:
    from models.artifact import ArtifactError, load
    from models.embedder import Embedder, ImageError, normalize

    try:
        return normalize(Embedder(load(encoder), device).embed_files(files)).numpy()
    except (ArtifactError, ImageError, OSError) as error:
        fail(error)


@app.command(context_settings=FORWARDED)
def lab(context: typer.Context) -> None:
    """Run a theory experiment and compare what is seen with what must be seen; `fullrank lab --list`."""
    from training.theory.command import main as run_lab

    raise typer.Exit(run_lab(context.args))


def _options(pairs: list[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key.isidentifier():
            fail(f"--option {pair!r}: write NAME=VALUE, for example d0=64 or predictor=false", 2)
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    return options


def _report(values: dict[str, Any], title: str, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(values, indent=2))
        return
    table = Table("measure", "value", title=title)
    for key, value in values.items():
        table.add_row(key, str(value))
    Console().print(table)


def main() -> None:
    app(prog_name="fullrank")


if __name__ == "__main__":
    main()
