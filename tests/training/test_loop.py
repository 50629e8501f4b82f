"""A whole run on the sample: it learns, resumes exactly, keeps its hands off other runs, and ends in an artifact."""

import io
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from models.artifact import load
from models.embedder import Embedder, normalize
from tests.support.training import OPTIONS, TINY
from training import checkpoint, export
from training.data import SAMPLE, SOURCES, DataError, ImageSet, Split, read_fashion_mnist
from training.loop import Run, Trainer, TrainingError, train
from training.methods import METHODS, SimCLR
from training.recipes import Recipe, recipe
from training.saved import artifact_of

ROOT = Path(__file__).parents[2]
QUIET = Console(file=io.StringIO())


def small(method: str = "directclr", **changes: object) -> Recipe:
    settings: dict[str, object] = {"architecture": TINY, "options": OPTIONS[method], "epochs": 2} | changes
    return replace(recipe(f"fashion-{method}"), **settings)  # type: ignore[arg-type]


def log(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "directclr"
    train(small(), Run(out, data=SAMPLE), QUIET)
    return out


class AfterFirstEpoch(Console):
    """A console that does something when the first epoch's line is printed."""

    def __init__(self, then) -> None:  # type: ignore[no-untyped-def]
        super().__init__(file=io.StringIO())
        self.then = then

    def print(self, *objects: object, **options: object) -> None:  # type: ignore[override]
        super().print(*objects, **options)  # type: ignore[arg-type]
        if " kNN " in str(objects[0]):
            self.then()


def test_a_run_ends_in_an_artifact_that_serves(finished: Path) -> None:
    records, artifact = log(finished), load(finished / "encoder")
    assert [record["epoch"] for record in records] == [1, 2]
    assert records[1]["loss"] < records[0]["loss"]
    assert artifact.card.training["method"] == "directclr"
    assert artifact.card.training["epochs"] == 2
    assert artifact.card.quality["knn_queries"] == 1000
    assert 0.4 < artifact.card.quality["knn"] <= 1  # chance is 0.1
    assert artifact.card.quality["projection"]["dimension"] == 8
    assert artifact.reference is not None
    assert artifact.reference.rows == 150  # a fifth of 1,000 held out, a quarter of those the canary
    assert artifact.canary is not None
    rows = normalize(Embedder(artifact).embed(artifact.canary.images))
    torch.testing.assert_close(rows, artifact.canary.embeddings, rtol=0, atol=1e-5)


def test_a_run_interrupted_after_an_epoch_goes_on_as_if_nothing_had_happened(finished: Path, tmp_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(small(), Run(out, data=SAMPLE), AfterFirstEpoch(interrupt))
    assert len(log(out)) == 1
    (out / "log.jsonl").unlink()  # as a kill between the checkpoint and the log leaves it
    artifact = train(small(), Run(out, data=SAMPLE, resume=True), QUIET)
    assert [record["loss"] for record in log(out)] == [record["loss"] for record in log(finished)]
    assert artifact.card.revision == load(finished / "encoder").card.revision


KILLED = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch
torch.set_num_threads(1)
from pathlib import Path
import os, signal
from test_loop import SAMPLE, QUIET, Run, Trainer, small, train

step = Trainer.train_step

def step_or_die(trainer, views):
    if trainer.step == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(trainer, views)

Trainer.train_step = step_or_die
train(small({method!r}, batch_size=32, epochs=1), Run(Path({out!r}), data=SAMPLE, checkpoint_minutes=0), QUIET)
"""


@pytest.mark.parametrize("method", ["directpred"])
def test_a_run_killed_in_the_middle_of_an_epoch_resumes_its_exact_loss_curve(method: str, tmp_path: Path) -> None:
    """kill -9 of a real process; every state a method keeps beside its weights has to survive."""
    settings = small(method, batch_size=32, epochs=1)
    train(settings, Run(tmp_path / "whole", data=SAMPLE), QUIET)
    out = tmp_path / "killed"
    script = KILLED.format(root=str(ROOT), tests=str(Path(__file__).parent), method=method, out=str(out), at=9)
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == -signal.SIGKILL
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] in range(1, 10)  # of an epoch's 25
    train(settings, Run(out, data=SAMPLE, resume=True), QUIET)
    assert [record["loss"] for record in log(out)] == [record["loss"] for record in log(tmp_path / "whole")]
    assert load(out / "encoder").card.revision == load(tmp_path / "whole" / "encoder").card.revision


def test_ctrl_c_saves_between_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One signal, delivered in the first step of the second epoch: it is the last one."""
    out, before, step = tmp_path / "run", signal.getsignal(signal.SIGINT), Trainer.train_step

    def interrupted(trainer: Trainer, views: torch.Tensor) -> torch.Tensor:
        if trainer.step == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return step(trainer, views)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    with pytest.raises(checkpoint.StoppedError, match="stopped after step 7 and saved; --resume"):
        train(small(), Run(out, data=SAMPLE), QUIET)
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] == 7
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_between_epochs_stops_there_also_if_an_epoch_is_one_step(tmp_path: Path) -> None:
    console = AfterFirstEpoch(lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(checkpoint.StoppedError, match="stopped after step 1 and saved; --resume"):
        train(small(batch_size=560, epochs=3), Run(tmp_path, data=SAMPLE, limit=700), console)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 1
    assert len(log(tmp_path)) == 1


def test_a_full_disk_keeps_the_last_checkpoint_readable(finished: Path, tmp_path: Path) -> None:
    """The limit on the size of files stands in for the disk: writes fail half way through, with an OSError."""
    out = tmp_path / "run"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill() -> None:
        size = (out / "checkpoint.pt").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, before[1]))

    try:
        with pytest.raises(TrainingError, match=r"cannot be written .*; the last one is intact. Make room"):
            train(small(), Run(out, data=SAMPLE), AfterFirstEpoch(fill))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.pt", "encoders", "log.jsonl"]
    train(small(), Run(out, data=SAMPLE, resume=True), QUIET)
    assert [record["loss"] for record in log(out)] == [record["loss"] for record in log(finished)]


def test_a_disk_that_is_full_for_the_encoder_alone_is_named(tmp_path: Path) -> None:
    """safetensors' own writer raises no OSError there."""
    trainer = Trainer(small(), Split.of(read_fashion_mnist(SAMPLE, "train").take(slice(0, 400)), 128, seed=0))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(TrainingError, match=r"epoch-0001 cannot be written \(.*File too large.*\); make room"):
            export.keep(trainer, trainer.rows(), {"epoch": 1}, tmp_path / "encoders", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list((tmp_path / "encoders").iterdir()) == []


def test_the_encoders_of_epochs_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("epoch-0002", "epoch-10000", "epoch-9999", "epoch-last"):
        (tmp_path / name).mkdir()
    assert [path.name for path in export.epochs_in(tmp_path)] == ["epoch-0002", "epoch-9999", "epoch-10000"]


def test_a_folder_that_holds_a_run_is_not_overwritten(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="--resume"):
        train(small(), Run(finished, data=SAMPLE), QUIET)
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    resume = Run(copy, data=SAMPLE, resume=True)
    with pytest.raises(TrainingError, match="is a run of fashion-directclr, not of fashion-byol"):
        train(small("byol"), resume, QUIET)
    with pytest.raises(TrainingError, match="a run with epochs = 2, not 3"):
        train(small(epochs=3), resume, QUIET)
    with pytest.raises(TrainingError, match="began with 800 images, not 720: --data, --limit"):
        train(small(), replace(resume, limit=900), QUIET)
    (copy / "checkpoint.pt").write_bytes((copy / "checkpoint.pt").read_bytes()[:1000])
    with pytest.raises(TrainingError, match="damaged"):
        train(small(), resume, QUIET)
    (copy / "checkpoint.pt").unlink()
    with pytest.raises(TrainingError, match=r"a run without its checkpoint.pt; name another --out"):
        train(small(), resume, QUIET)


def test_a_changed_bit_of_a_weight_is_damage(finished: Path, tmp_path: Path) -> None:
    """torch loads it without a word."""
    path = Path(shutil.copytree(finished, tmp_path / "copy")) / "checkpoint.pt"
    weight = torch.load(path, weights_only=True)["method"]["encoder.conv1.weight"].numpy().tobytes()
    content = bytearray(path.read_bytes())
    content[content.index(weight) + 3] ^= 0x40
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)["method"]["encoder.conv1.weight"].numpy().tobytes() != weight
    with pytest.raises(TrainingError, match=r"damaged, .* does not have its checksum"):
        train(small(), Run(path.parent, data=SAMPLE, resume=True), QUIET)
    with pytest.raises(TrainingError, match=r"damaged, .* does not have its checksum"):
        artifact_of(path)


def test_a_checkpoint_of_other_code_is_named(finished: Path, tmp_path: Path) -> None:
    """As of a plugin that was edited since: its method has another buffer."""
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    state = torch.load(copy / "checkpoint.pt", weights_only=True)
    state["method"]["queue"] = torch.zeros(3)
    torch.save(state, copy / "checkpoint.pt")
    with pytest.raises(TrainingError, match=r'other code of directclr .*"queue".*; go back to that, or name another'):
        train(small(), Run(copy, data=SAMPLE, resume=True), QUIET)


class Masked(SimCLR):
    """A method that draws from torch's global generator."""

    def forward(self, views: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.dropout(views, 0.5, train=True))


def test_a_method_that_draws_random_numbers_resumes_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "simclr", Masked)
    split = Split.of(read_fashion_mnist(SAMPLE, "train").take(slice(0, 400)), 128, seed=0)
    whole, early, late = (Trainer(small("simclr", batch_size=64), split) for _ in range(3))
    expected = [whole.train_epoch()["loss"] for _ in range(2)]
    first = early.train_epoch()["loss"]
    torch.randn(1000)
    late.restore(early.state([]))
    assert [first, late.train_epoch()["loss"]] == expected


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_takes_a_step_and_is_measured(method: str) -> None:
    images = read_fashion_mnist(SAMPLE, "train").take(slice(0, 300))
    trainer = Trainer(small(method, batch_size=64), Split.of(images, 128, seed=0))
    record = trainer.train_epoch() | trainer.measure()
    assert record["loss"] == record["loss"]
    assert len(record["representation"]["eigenvalues"]) == len(record["representation"]["ranks"])
    json.dumps(record, allow_nan=False)


def test_too_small_a_set_or_batch_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="raise --limit"):
        train(small(), Run(tmp_path / "run", data=SAMPLE, limit=200), QUIET)
    with pytest.raises(TrainingError, match=r"batch_size is 1; .* BatchNorm at least two"):
        train(small(batch_size=1), Run(tmp_path / "run", data=SAMPLE), QUIET)
    assert not (tmp_path / "run").exists()


def test_a_diverging_run_names_the_step_and_keeps_the_last_good_state(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"the loss is nan at step \d+; what was saved before is intact"):
        train(small(learning_rate=1e30), Run(tmp_path / "run", data=SAMPLE), QUIET)
    trainer = Trainer(small(), Split.of(read_fashion_mnist(SAMPLE, "train"), 200, seed=0))
    with torch.no_grad():
        trainer.method.encoder.conv1.weight[0] = torch.inf
    with pytest.raises(TrainingError, match=r"encoder\.conv1\.weight is not finite after step -1"):
        trainer.state([])


@pytest.mark.parametrize("method", ["directpred", "directcopy"])
def test_a_predictor_without_a_closed_form_is_a_divergence(method: str, tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError, match=r"a matrix has no decomposition after step \d+; .* Lower the learning rate"
    ):
        train(small(method, learning_rate=1e12), Run(tmp_path / "run", data=SAMPLE), QUIET)


def test_weights_that_an_epoch_s_last_step_breaks_are_not_measured(tmp_path: Path) -> None:
    settings = small("byol", learning_rate=1e38, batch_size=560)
    with pytest.raises(TrainingError, match=r"\S+ is not finite after step \d; what was saved before is intact"):
        train(settings, Run(tmp_path / "run", data=SAMPLE, limit=700), QUIET)


@pytest.mark.parametrize(("every", "bank"), [(2, 280), (100, None)])
def test_images_with_few_labels_are_measured_by_those(
    every: int, bank: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By none where there are fewer than the neighbours that vote."""

    def read(folder: Path, split: str) -> ImageSet:
        images = read_fashion_mnist(folder, split)
        return ImageSet(images.images, images.labels.where(torch.arange(len(images)) % every == 0, -1))

    monkeypatch.setitem(SOURCES, "fashion", replace(SOURCES["fashion"], read=read))
    artifact = train(small(epochs=1), Run(tmp_path, data=SAMPLE, limit=700), QUIET)
    assert (log(tmp_path)[0]["knn"] is not None) == (bank is not None)
    found = artifact.card.quality.get("knn_bank")
    assert found is None if bank is None else found == pytest.approx(bank, abs=30)


def test_unknown_options_and_recipes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="directclr has no option 'depth'; it takes d0, temperature"):
        train(replace(small(), options={"depth": 3}), Run(tmp_path / "run", data=SAMPLE), QUIET)
    with pytest.raises(ValueError, match="d0 is 99; it must lie between 1 and the representation's 32"):
        train(replace(small(), options={"d0": 99}), Run(tmp_path / "run", data=SAMPLE), QUIET)
    with pytest.raises(ValueError, match="fashion-directclr"):
        recipe("fashion-directclear")


def test_a_port_for_metrics_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(TrainingError, match=f"--metrics-port {port}: Address already in use; name another port"):
            train(small(epochs=1), Run(tmp_path, data=SAMPLE, limit=800, metrics_port=port), QUIET)


def test_a_run_can_start_from_an_encoder(finished: Path, tmp_path: Path) -> None:
    """At a learning rate of almost nothing the weights stay those of the encoder it started from."""
    out = tmp_path / "run"
    start = finished / "encoder"
    changed = train(small(learning_rate=1e-12, epochs=1), Run(out, data=SAMPLE, init=start), QUIET)
    before = load(start).encoder.state_dict()["layer4.1.conv2.weight"]
    torch.testing.assert_close(changed.encoder.state_dict()["layer4.1.conv2.weight"], before, rtol=0, atol=1e-6)
    with pytest.raises(TrainingError, match="not name='resnet18' width=32"):
        train(replace(recipe("fashion-directclr"), epochs=1), Run(tmp_path / "wide", data=SAMPLE, init=start), QUIET)
    assert not (tmp_path / "wide").exists()


@pytest.mark.soak
def test_compiled_and_plain_forward_agree() -> None:
    """`aot_eager` traces as `--compile` does and leaves out the code generation, which takes a minute of a CPU."""
    images = read_fashion_mnist(SAMPLE, "train").take(slice(0, 300))
    losses = []
    for compiled in (False, True):
        trainer = Trainer(small(batch_size=32), Split.of(images, 128, seed=0))
        if compiled:
            trainer.forward = torch.compile(trainer.method, backend="aot_eager")
        losses.append(trainer.train_epoch()["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)  # bfloat16 rounds in other places


@pytest.mark.parametrize(("schedule", "end"), [("cosine", 0.0), ("cosine", 0.5), ("constant", 1.0)])
def test_the_learning_rate_follows_the_recipe(schedule: str, end: float) -> None:
    images = read_fashion_mnist(SAMPLE, "train").take(slice(0, 300))
    settings = {"schedule": schedule, "final_lr": end if schedule == "cosine" else 0.0, "learning_rate": 0.1}
    recipe = small(batch_size=32, epochs=4, warmup=0.25, clip=1.0, **settings)
    trainer = Trainer(recipe, Split.of(images, 128, seed=0))
    rates = [trainer.train_epoch()["learning_rate"] for _ in range(4)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[3] == pytest.approx(0.1 * end, abs=0.005)
