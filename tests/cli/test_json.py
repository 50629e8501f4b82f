"""Every command has --json, and with it prints one JSON value and nothing else on standard output."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from cli import app
from models.backbones.resnet import ResNet
from tools.stack import free_port
from training.data import SAMPLE

ROOT = Path(__file__).parents[2]
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
NOTHING_TO_PRINT = {"serve"}  # it runs until it is ended, and its log has a form of its own
EXAMPLE = str(ROOT / "examples" / "ankle-boot.png")
Arguments = Callable[[Path, Path], list[str]]

# The arguments of a small call, of a small encoder's folder and an empty folder; a key of its result; its exit code.
CALLS: dict[str, tuple[Arguments, str, int]] = {
    "check": (lambda encoder, out: [str(encoder)], "passed", 0),
    "doctor": (lambda encoder, out: ["--encoder", str(encoder)], "check", 0),
    "embed": (lambda encoder, out: [EXAMPLE, "--encoder", str(encoder), "--out", str(out / "rows.npy")], "rows", 0),
    "evaluate": (lambda encoder, out: [str(encoder), "--data", str(SAMPLE)], "knn", 0),
    "export": (lambda encoder, out: [str(encoder), "--safetensors", "--out", str(out / "copy")], "files", 0),
    "fleet": (lambda encoder, out: [f"http://127.0.0.1:{free_port()}"], "unread", 1),
    "import": (lambda encoder, out: [weights(out), "--set", "size=32", "--out", str(out / "mine")], "revision", 0),
    "lab": (lambda encoder, out: ["--list"], "measurement", 0),
    "metrics": (lambda encoder, out: ["canary"], "name", 0),
    "reference": (
        lambda encoder, out: [
            *(str(encoder), "--dataset", "fashion", "--data", str(SAMPLE)),
            *("--limit", "128", "--out", str(out / "with")),
        ],
        "rows",
        0,
    ),
    "report": (lambda encoder, out: [str(encoder), "--out", str(out / "page.html")], "subjects", 0),
    "rules": (lambda encoder, out: [str(out / "rules")], "files", 0),
    "train": (lambda encoder, out: ["--list"], "fashion-directclr", 0),
}


def weights(folder: Path) -> str:
    torch.manual_seed(0)
    torch.save(ResNet("resnet18", width=4, stem="3x3").state_dict(), folder / "resnet.pth")
    return str(folder / "resnet.pth")


def test_no_command_is_forgotten() -> None:
    assert COMMANDS.keys() - NOTHING_TO_PRINT == CALLS.keys()
    for name in CALLS:
        assert any("--json" in it.opts for it in COMMANDS[name].params), f"{name} has no --json"


@pytest.mark.parametrize("name", CALLS)
def test_it_prints_one_json_value(
    name: str, small_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FULLRANK_PORT", str(free_port()))
    arguments, key, code = CALLS[name]
    done = CliRunner().invoke(app, [name, *arguments(small_artifact, tmp_path), "--json"])
    assert done.exit_code == code, done.output
    value = json.loads(done.stdout, parse_constant=lambda it: pytest.fail(f"{it} is no JSON"))
    assert key in (value[0] if isinstance(value, list) else value)
