"""Everything is opened before the first step; an encoder after each epoch; a resume without flags; honest clocks."""

import io
import json
import re
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner, Result

from cli import app
from models.artifact import load
from models.embedder import Embedder
from models.gate import judge
from tests.support.training import OPTIONS, TINY
from training import trainer as training_loop
from training.checkpoint import StoppedError, TrainingError, save
from training.data import SAMPLE, DataError, Split, read_fashion_mnist
from training.loop import Run, train
from training.progress import shown, stages
from training.recipes import recipe
from training.saved import artifact_of
from training.trainer import Trainer

TRACKER = """
import json
from pathlib import Path

def start(settings):
    Path("settings.json").write_text(json.dumps(settings))
    def log(step, values):
        with Path("tracked.jsonl").open("a") as file:
            file.write(json.dumps({"step": step} | dict(values)) + "\\n")
    return log
"""
FAILING_TRACKER = """
from pathlib import Path

def start(settings):
    def log(step, values):
        if step == 3:
            raise ConnectionError("the server is gone")
        with Path("steps").open("a") as file:
            file.write(f"{step} {len(values)}\\n")
    return log
"""
FLAGS = ["--width", "4", "--batch-size", "64", "--epochs", "2", "--limit", "700", "--option", "d0=8", "--threads", "1"]


def fullrank(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of somebody's, with a tracker of their own in it and a run that was watched by it."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "my_tracker_for_a_test.py").write_text(TRACKER)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = fullrank(
            *("train", "fashion-directclr", "--data", SAMPLE, "--out", "run", "--keep", 2, *FLAGS),
            *("--tracker", "my_tracker_for_a_test:start"),
        )
    sys.modules.pop("my_tracker_for_a_test", None)
    assert done.exit_code == 0, done.output
    (folder / "said").write_text(done.stderr)
    return folder


def test_the_start_and_the_measuring_are_told_in_plain_lines(elsewhere: Path) -> None:
    said = (elsewhere / "said").read_text()
    assert "fashion-directclr on cpu in" in said
    assert "2 epochs of 8 steps of 64 images, 560 to train on, 140 held out" in said
    for words in ("epoch   2  loss", "measuring ...", "measuring the untrained twin ...", "embedding ..."):
        assert words in said


def test_limit_limits_the_test_too(elsewhere: Path) -> None:
    quality = load(elsewhere / "run" / "encoder").card.quality
    assert (quality["knn_queries"], quality["knn_bank"]) == (700, 560)
    assert quality["untrained"]["knn"] == max(quality["untrained"]["knn_initial"], quality["untrained"]["knn_measured"])


def test_each_epoch_leaves_an_encoder_that_evaluates_serves_and_exports(elsewhere: Path) -> None:
    encoders = sorted((elsewhere / "run" / "encoders").iterdir())
    assert [path.name for path in encoders] == ["epoch-0001", "epoch-0002"]
    first, last, final = (load(path) for path in (*encoders, elsewhere / "run" / "encoder"))
    assert last.card.revision == final.card.revision != first.card.revision
    assert first.reference is not None
    assert first.canary is not None
    assert first.card.quality["held_out"]["epoch"] == 1
    assert judge(Embedder(last), last).checks[1].passed, "the canary is what the encoder makes of it"
    evaluated = fullrank("evaluate", encoders[0], "--data", SAMPLE, "--json")
    assert evaluated.exit_code == 0
    assert 0 < json.loads(evaluated.stdout)["knn"] <= 1
    unfinished = elsewhere / "unfinished"
    shutil.copytree(elsewhere / "run" / "encoders", unfinished / "encoders")
    assert fullrank("evaluate", unfinished, "--data", SAMPLE, "--json").exit_code == 0


def test_a_tracker_sees_every_step_and_epoch_and_the_settings(elsewhere: Path) -> None:
    lines = [json.loads(line) for line in (elsewhere / "tracked.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "step/loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 17))
    assert all(line["step/loss"] > 0 and "step/learning_rate" in line for line in steps)
    assert [line["step"] for line in lines if "knn" in line] == [8, 16]
    settings = json.loads((elsewhere / "settings.json").read_text())
    assert (settings["batch_size"], settings["options"]["d0"], settings["limit"]) == (64, 8, 700)


@pytest.mark.parametrize(
    ("name", "message"),
    [("nothing:start", "nothing cannot be imported"), ("json:none", "has no 'none'"), ("json", "is not MODULE:NAME")],
)
def test_a_tracker_that_is_not_there_is_named(name: str, message: str) -> None:
    result = fullrank("train", "fashion-directclr", "--tracker", name)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_tracker_that_does_not_start_is_named(tmp_path: Path) -> None:
    begun = ("train", "fashion-directclr", "--data", SAMPLE, "--out", tmp_path / "run", *FLAGS)
    for tracker, error in (("os:getcwd", "TypeError"), ("sys:exit", "SystemExit")):
        result = fullrank(*begun, "--tracker", tracker)
        assert result.exit_code == 1
        assert f"the tracker {tracker} did not start: {error}" in result.stderr


def test_resume_needs_no_other_flag(elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in its second epoch, a run goes on with its own recipe, data and limit, and ends in the same weights.

    Its tracker fails in the third step: the run says so once, and goes on. The resumed run has the tracker too.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "failing_tracker_for_a_test.py").write_text(FAILING_TRACKER)
    step = Trainer.train_step

    def stopped(trainer: Trainer, views: Tensor) -> Tensor:
        if trainer.step == 10:
            raise StoppedError("stopped")
        return step(trainer, views)

    monkeypatch.setattr(Trainer, "train_step", stopped)
    begun = ["train", "fashion-directclr", "--data", str(SAMPLE), "--out", "run", "--checkpoint-minutes", "0", *FLAGS]
    begun += ["--tracker", "failing_tracker_for_a_test:start"]
    monkeypatch.setattr(sys, "argv", ["fullrank", *begun])
    stop = fullrank(*begun)
    assert stop.exit_code == 130
    said = "the tracker failing_tracker_for_a_test:start failed: ConnectionError: the server is gone"
    assert stop.stderr.count(said) == 1
    logged = [line.split() for line in Path("steps").read_text().splitlines()]
    assert [step for step, _ in logged] == ["1", "2", "8", "9", "10"], "it rests until the epoch is over, at step 8"
    assert int(logged[2][1]) > 10, "and is told of the epoch"
    monkeypatch.setattr(Trainer, "train_step", step)
    for flag, value, message in (
        ("--epochs", 3, "a run with epochs = 2, not 3"),
        ("--method", "simclr", "a run with method = directclr, not simclr"),
        ("--name", "other", "a run of fashion-directclr, not of other"),
    ):
        other = fullrank("train", "--resume", "--out", "run", flag, value)
        assert other.exit_code == 1
        assert message in other.stderr
    assert (
        "is a run of fashion-directclr, not of fashion-byol"
        in fullrank("train", "fashion-byol", "--resume", "--out", "run").stderr
    )
    monkeypatch.setattr(sys, "argv", ["fullrank", "train", "--resume", "--out", "run"])
    done = fullrank("train", "--resume", "--out", "run")
    assert done.exit_code == 0, done.output
    assert "resumed at step 10" in done.stderr
    assert Path("steps").read_text().splitlines()[5].startswith("11 ")
    assert load(Path("run/encoder")).card.revision == load(elsewhere / "run" / "encoder").card.revision
    made = [load(Path("run", path)) for path in ("encoder", "encoders/epoch-0002")] + [
        artifact_of(Path("run/checkpoint.pt"))
    ]
    state = torch.load("run/checkpoint.pt", weights_only=True)
    save(state | {"run": json.dumps(json.loads(state["run"]) | {"new": 1})}, Path("run/checkpoint.pt"))
    assert fullrank("train", "--resume", "--out", "run").exit_code == 0, "a newer version's settings are left out"
    for artifact in made:
        assert artifact.card.training["command"] == shlex.join(["fullrank", *begun]), "what would make it again"


def test_too_little_memory_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A projector of 4 TB."""
    begun = ("train", "fashion-byol", "--data", SAMPLE, "--out", tmp_path / "run", *FLAGS[:-4])
    result = fullrank(*begun, "--option", f"hidden={2**31 - 1}")
    assert result.exit_code == 1
    assert "cpu has too little memory for this: lower --batch-size or --width, or cut it" in result.stderr

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("training.evaluate.evaluate_pixels", full)
    result = fullrank("evaluate", "pixels", "--data", SAMPLE)
    assert (result.exit_code, "cpu has too little memory for this; name another" in result.stderr) == (1, True)


def test_what_a_run_will_need_is_opened_before_its_first_step(tmp_path: Path) -> None:
    for path in SAMPLE.glob("train-*"):
        shutil.copy(path, tmp_path)
    small = replace(recipe("fashion-directclr"), architecture=TINY, options=OPTIONS["directclr"], epochs=1)
    with pytest.raises(DataError, match="t10k-images"):
        train(small, Run(tmp_path / "run", data=tmp_path), Console(file=io.StringIO()))
    assert not (tmp_path / "run").exists()


def test_steps_are_shown_in_plain_lines_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    with shown(Console(file=out, width=200), "epoch 1/2", 10, done=3, every=0.0) as steps:
        steps.advance(extra="loss [bold] 2.5")
        steps.advance(2)
    assert out.getvalue().splitlines() == ["epoch 1/2  4/10  loss [bold] 2.5", "epoch 1/2  6/10"]
    quiet = io.StringIO()
    with shown(Console(file=quiet), "epoch 1/2", 10) as steps:
        steps.advance()
    assert quiet.getvalue() == ""


def test_a_stage_is_shown_with_how_much_there_is_to_do() -> None:
    out = io.StringIO()
    with stages(Console(file=out, width=200, force_terminal=True), embedding=40) as stage:
        stage("embedding", 40)
        stage("calibrating", 3, 12)
        stage("calibrating", 4, 12)
    said = re.sub(r"\x1b\[[0-9;?]*\w", "", out.getvalue())
    assert re.search(r"embedding .* 40/40", said)
    assert re.search(r"calibrating .* 7/12", said)


def test_step_times_wait_for_an_asynchronous_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that is asked for steps of 0.05 s and works them off while it is waited for, on a clock of its own."""
    now, queued = [0.0], [0.0]
    trainer = Trainer(
        replace(recipe("fashion-directclr"), architecture=TINY, options=OPTIONS["directclr"], batch_size=16),
        Split.of(read_fashion_mnist(SAMPLE, "train").take(slice(0, 260)), 100, seed=0),
    )

    def ask(views: Tensor) -> Tensor:
        queued[0] += 0.05
        trainer.step += 1
        return torch.tensor(1.0)

    def wait() -> None:
        now[0] += queued[0]
        queued[0] = 0.0

    monkeypatch.setattr(Trainer, "asynchronous", property(lambda trainer: True))
    monkeypatch.setattr(training_loop.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(trainer, "train_step", ask)
    monkeypatch.setattr(trainer, "wait", wait)
    record = trainer.train_epoch()
    assert trainer.steps_per_epoch == 10
    assert record["seconds"] == pytest.approx(0.5)
    assert record["views_per_second"] == pytest.approx(2 * 16 / 0.05, abs=1)
    assert record["data_share"] == 0


def test_a_batch_in_parts_has_the_gradient_of_the_whole_where_nothing_compares_images() -> None:
    """In evaluation mode, where BatchNorm does not compare them either; BYOL's loss is a mean over rows."""
    images = read_fashion_mnist(SAMPLE, "train").take(slice(0, 300))
    base = replace(recipe("fashion-byol"), architecture=TINY, options=OPTIONS["byol"], batch_size=16)
    found = []
    for parts in (1, 4):
        trainer = Trainer(replace(base, accumulate=parts), Split.of(images, 128, seed=0), numbers="float32")
        trainer.method.eval()
        views = trainer.views(images.images[:16], images.images[:16])
        loss = trainer.accumulate(views, parts)
        found.append((loss.item(), trainer.method.encoder.conv1.weight.grad.clone()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)
    with pytest.raises(TrainingError, match="accumulate is 3; it must cut a process's 16 images into equal parts"):
        train(replace(base, accumulate=3), Run(Path("nowhere"), data=SAMPLE), Console(file=io.StringIO()))


def test_another_size_of_image_reaches_the_encoder_and_its_card() -> None:
    images = read_fashion_mnist(SAMPLE, "train").take(slice(0, 300))
    base = replace(recipe("fashion-directclr"), architecture=TINY, options=OPTIONS["directclr"], batch_size=32)
    trainer = Trainer(replace(base, image_size=20), Split.of(images, 128, seed=0))
    batch = images.images[:4]
    assert trainer.views(batch, batch).shape == (8, 1, 20, 20)
    assert trainer.artifact().card.preprocessing.size == 20
    assert trainer.measure()["representation"]["dimension"] == 32


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--backbone", "resnet19"), 2, "unknown architecture 'resnet19'"),
        (("--backbone", "vit_tiny_patch5"), 2, "no multiple of patch 5"),
        (("--image-size", "4"), 2, "image-size"),
    ],
)
def test_backbones_are_named(flags: tuple[str, ...], code: int, message: str) -> None:
    result = fullrank("train", "fashion-simclr", *flags)
    assert result.exit_code == code
    assert message in result.stderr
