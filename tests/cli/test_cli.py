"""The front door: what it prints, what it exits with, and what it says to a slip of the finger."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from rich.text import Text
from typer.testing import CliRunner, Result

import fullrank
from cli import app
from cli.common import show
from models.artifact import load, save
from models.embedder import Embedder, normalize
from training.recipes import RECIPES

ROOT = Path(__file__).parents[2]
DEFAULT = "models/pretrained/fashion-byol"
EXAMPLE = ROOT / "examples" / "ankle-boot.png"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


HELP = """
import contextlib, sys
import cli
with contextlib.suppress(SystemExit):
    cli.main()
print({"torch", "numpy", "pydantic", "fullrank", "models", "service", "training"} & sys.modules.keys())
"""


def test_help_names_every_command_and_imports_no_room() -> None:
    command = [sys.executable, "-c", HELP, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    commands = {file.stem.rstrip("_") for file in (ROOT / "cli").glob("[!_]*.py")} - {"common"}
    assert {name for name in commands if f"│ {name} " not in done.stdout} == set()
    assert done.stdout.endswith("set()\n")


def test_our_warnings_are_sentences_and_others_keep_their_place() -> None:
    program = (
        "import warnings, cli, contextlib\n"
        "with contextlib.suppress(SystemExit): cli.main()\n"
        "warnings.warn('few rows')\nwarnings.warn('old', FutureWarning)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, "--version"], capture_output=True, text=True, cwd=ROOT)
    first, *rest = done.stderr.splitlines()
    assert first == "fullrank: few rows"
    assert "FutureWarning: old" in rest[0]


def test_what_the_system_refuses_is_a_sentence() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cli", "report", "x" * 300], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"fullrank: {'x' * 300}: File name too long\n"


def test_names_that_are_no_unicode_are_printed_with_escapes(tmp_path: Path) -> None:
    out = os.fsencode(tmp_path) + b"/not\xffunicode"
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    command = [sys.executable, "-m", "cli", "rules", out]
    done = subprocess.run(command, capture_output=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert rb"/not\udcffunicode/prometheus/rules/serving.yml" in done.stdout


def test_train_lists_recipes() -> None:
    lines = run("train", "--list").stdout.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["fashion-simclr", "fashion-directclr", "fashion-byol"]
    assert [line.split()[0] for line in lines] == list(RECIPES)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("train", "fashion-byoll"), 2, "did you mean fashion-byol"),
        (("train", "fashion-byol", "--option", "momentum"), 2, "write NAME=VALUE"),
        (("train", "fashion-byol", "--data", "nowhere"), 1, "dataset-fashion-mnist"),
        (("train", "--resume", "--out", "nowhere"), 2, "nowhere/checkpoint.pt does not exist; name the recipe"),
        (("train", "fashion-byol", "--name", "../x"), 2, "--name: '../x' must be"),
        (("import", "nowhere", "--name", "my model"), 2, "--name: 'my model' must be"),
        (("train", "fashion-byol", "--seed", "99999999999999999999"), 2, "--seed"),
        (("evaluate", "nowhere"), 1, "is not a folder"),
        (("check", "nowhere"), 1, "is not a folder"),
        (("embed", "x.png", "--encoder", "nowhere"), 1, "is not a folder"),
        (("check", "nowhere", "--junit", "nowhere/report.xml"), 2, "--junit"),
        (("reference", "nope.npy", "--out", "r.safetensors"), 1, "nope.npy does not exist: give an encoder's"),
        (("reference", "nope.parquet", "--out", "r.safetensors"), 1, "nope.parquet does not exist"),
        (("reference", "nope", "--data", "photographs"), 1, "nope does not exist"),
        (("report", "nope.npy"), 1, "nope.npy does not exist: give"),
        (("report", DEFAULT, "--data", "nowhere"), 2, "--data: nowhere is not a folder"),
        (("export", "nowhere", "--onnx", "--out", "README.md"), 2, "--out: README.md is a file; name a folder"),
        (("rules", "README.md"), 2, "OUT: README.md is a file; name a folder"),
        (("lab", "measurement", "--out", "README.md/x"), 2, "README.md is a file; name a folder"),
        (("embed", "nope.png", "--encoder", DEFAULT), 1, "nope.png: No such file or directory"),
        (("embed", "docs", "--encoder", DEFAULT), 1, "docs is a folder; embed it with --out DIR"),
        (("check", "nowhere", "--device", "cudaa"), 2, "cannot be used here"),
        (("reference", "README.md", "--data", "docs"), 1, "README.md is no encoder's folder: give one"),
        (("evaluate", "nowhere", "--sgd", "--precision", "int8"), 1, "precision is 'int8'; it must be one of"),
        (("train", "fashion-byol", "--guard-share", "nan"), 2, "--guard-share"),
        (
            ("train", "fashion-byol", "--backbone", "vit_tiny_patch5"),
            2,
            "--backbone: size 28 is no multiple of patch 5",
        ),
        (
            ("train", "fashion-byol", "--dataset", "folder", "--data", "examples"),
            1,
            "too few to hold a fifth of them out",
        ),
        (("train", "fashion-byol", "--plugin", "no_such"), 2, "name a module that is installed or lies in"),
        # Said before anything is read or computed:
        (("train", "fashion-byol", "--out", "README.md"), 2, "--out: README.md is a file; name a folder"),
        (("embed", "x.png", "--encoder", "nowhere", "--out", "no/x.npy"), 2, "/no is not a folder; make it first"),
        (("embed", "docs", "--encoder", "nowhere", "--out", "README.md"), 2, "--out: README.md is a file"),
        (("embed", "docs", "--encoder", DEFAULT, "--out", DEFAULT), 1, "is an encoder's folder: choose another --out"),
    ],
)
def test_mistakes_are_named(arguments: tuple[str, ...], code: int, message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert "Errno" not in result.output


def test_a_folder_that_is_read_only_is_named_before_any_work(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    if os.access(closed, os.W_OK):
        pytest.skip("root may write anywhere")
    assert run("check", "nowhere", "--junit", "/dev/null").exit_code == 1  # a device in a folder of root's
    said = f"--out: {closed} is read-only here; name another place"
    for arguments in (
        ("train", "fashion-byol", "--data", "nowhere", "--out", closed / "run"),
        ("embed", "x.png", "--encoder", "nowhere", "--out", closed / "x.npy"),
        ("embed", "docs", "--encoder", "nowhere", "--out", closed / "rows"),
        ("export", "nowhere", "--onnx", "--out", closed),
        ("reference", DEFAULT, "--data", "nowhere", "--out", closed / "encoder"),
        ("report", DEFAULT, "--out", closed / "report.html"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2
        assert said in result.stderr, arguments


@pytest.mark.parametrize("target", ["README.md", "docs", "no/such.safetensors"])
def test_a_reference_that_cannot_be_written_is_said_before_a_corpus_is_embedded(target: str, tmp_path: Path) -> None:
    arguments = ("embed", "examples", "--encoder", DEFAULT, "--out", tmp_path / "rows")
    result = run(*arguments, "--reference", target)
    assert result.exit_code == 2
    assert result.stderr.startswith("fullrank: --reference: ")
    assert not (tmp_path / "rows").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"hello", "torch.save did not write it"), (b"", "torch.save did not write it"), (None, "it has no 'recipe'")],
)
def test_a_checkpoint_that_cannot_be_read_is_named_with_the_reason(
    content: bytes | None, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content) if content is not None else torch.save({"model": {}}, path)
    before = path.read_bytes()
    for arguments in (
        ("train", "--resume", "--out", tmp_path),
        ("train", "fashion-byol", "--resume", "--out", tmp_path),
    ):
        result = run(*arguments)
        assert result.exit_code == 1
        assert f"{path} is damaged, or no checkpoint of this version ({reason}" in result.stderr
        assert "remove it, or name another --out" in result.stderr
    assert path.read_bytes() == before


def test_embed_refuses_rows_that_are_no_embedding(small_artifact: Path, tmp_path: Path) -> None:
    loaded = load(small_artifact)
    with torch.no_grad():
        for parameter in loaded.encoder.parameters():
            parameter.zero_()
    save(replace(loaded, reference=None, canary=None), tmp_path / "dead")
    result = run("embed", EXAMPLE, "--encoder", tmp_path / "dead")
    assert result.exit_code == 1
    assert set(json.loads(result.stdout)) == {"file", "error"}
    message = " ".join(result.stderr.split())
    assert "gives no embedding (not finite, or all zero)" in message
    assert str(EXAMPLE) in message


def test_embed_prints_what_the_embedder_makes(small_artifact: Path, tmp_path: Path) -> None:
    expected = normalize(Embedder(load(small_artifact)).embed_files([EXAMPLE]))[0]
    result = run("embed", EXAMPLE, "--encoder", small_artifact)
    assert result.exit_code == 0
    torch.testing.assert_close(torch.tensor(json.loads(result.stdout)["embedding"]), expected)
    run("embed", EXAMPLE, EXAMPLE, "--encoder", small_artifact, "--out", tmp_path / "rows.npy")
    assert np.load(tmp_path / "rows.npy").shape == (2, 32)


def test_embed_names_the_bad_file(small_artifact: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"x")
    result = run("embed", EXAMPLE, bad, "--encoder", small_artifact)
    assert result.exit_code == 1
    assert "bad.png" in result.stderr


def test_check_passes_the_healthy_and_fails_the_squashed(small_artifact: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from models.artifact import save

    assert run("check", small_artifact, "--against", small_artifact).exit_code == 0
    squashed = load(small_artifact)
    with torch.no_grad():  # every feature one constant plus a thousandth of what it was: all directions, no variance
        last = squashed.encoder.get_submodule("layer4.1.bn2")
        last.weight.mul_(1e-3)  # type: ignore[operator, union-attr]
        last.bias.fill_(50.0)  # type: ignore[operator, union-attr]
    save(replace(squashed, card=squashed.card.model_copy(update={"name": "squashed"})), tmp_path / "squashed")
    result = run("check", tmp_path / "squashed", "--against", small_artifact, "--json")
    assert result.exit_code == 1
    assert "total variance" in json.loads(result.stdout)["reason"]


def test_what_a_user_names_is_printed_as_it_is(tmp_path: Path) -> None:
    """Square brackets are markup to rich: a folder's name and an extra would lose them."""
    for name in ("run[1]", "[bold]x[/bold]", "a[/]b"):
        result = run("evaluate", tmp_path / name)
        assert result.exit_code == 1
        assert f"{tmp_path / name} is not a folder" in result.stderr


def test_tables_print_what_they_are_given(capsys: pytest.CaptureFixture[str]) -> None:
    show({"[red]key": "[client]"}, "runs/[1]", as_json=False)
    shown = capsys.readouterr().out
    assert "runs/[1]" in shown
    assert "[red]key" in shown
    assert "[client]" in shown


def help_texts(command: Any, path: str = "fullrank") -> Iterator[tuple[str, str]]:
    """Every command's path and every option's help, as written."""
    for name in command.list_commands(None) if hasattr(command, "list_commands") else ():
        yield from help_texts(command.get_command(None, name), f"{path} {name}")
    for option in command.params:
        yield f"{path} {option.name}", getattr(option, "help", None) or ""


def test_no_help_is_swallowed_as_markup() -> None:
    texts = dict(help_texts(typer.main.get_command(app)))
    assert len(texts) > 100
    for where, text in texts.items():
        assert Text.from_markup(text).plain == text.replace("\\[", "["), where


def test_the_version_is_the_librarys() -> None:
    assert run("--version").stdout == f"fullrank {fullrank.__version__}\n"


def test_rules_writes_what_belongs_to_this_version(tmp_path: Path) -> None:
    out = tmp_path / "monitoring"
    assert run("rules", out).exit_code == 0
    for part in ("prometheus/rules", "grafana", "alertmanager"):
        there, here = (sorted(it for it in (root / part).rglob("*") if it.is_file()) for root in (out, ROOT / "deploy"))
        assert here
        assert [it.read_bytes() for it in there] == [it.read_bytes() for it in here]
    (out / "alertmanager").rename(tmp_path / "elsewhere")
    again = run("rules", out)
    assert again.exit_code == 1
    assert again.stderr == f"fullrank: OUT: {out / 'grafana'} exists; give a new folder\n"
    assert not (out / "alertmanager").exists()


def test_a_port_that_is_taken_and_a_device_that_is_not_there_end_serve_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("serve", "--port", port, "--encoder", "nowhere")
    assert result.exit_code == 1
    assert f"fullrank: 127.0.0.1:{port}: Address already in use; set FULLRANK_PORT" in result.stderr
    result = run("serve", "--host", "host.invalid", "--port", 0, "--encoder", "nowhere")
    assert result.exit_code == 1
    assert "set FULLRANK_HOST" in result.stderr
    result = run("serve", "--device", "cuda:99", "--encoder", "nowhere")
    assert result.exit_code == 2
    assert "fullrank: device: 'cuda:99' cannot be used here: " in result.stderr
