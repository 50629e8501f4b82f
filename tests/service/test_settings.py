"""Every setting is a flag of `fullrank serve` and a variable, and a wrong one is named."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cli import app
from service import settings
from service.settings import Settings
from tools import settings_docs


def serve(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[Result, list[Settings]]:
    """What the command says, and the settings it would have served with."""
    served: list[Settings] = []
    monkeypatch.setattr("service.http.app.serve", served.append)
    return CliRunner().invoke(app, ["serve", *arguments], env={"COLUMNS": "120"}), served


def test_help_lists_every_setting_and_an_example(monkeypatch: pytest.MonkeyPatch) -> None:
    result, served = serve(monkeypatch, "--help")
    assert result.exit_code == 0
    assert not served
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in result.stdout
        assert field.description is not None
        assert " ".join(field.description.split())[:40] in " ".join(result.stdout.split())
    assert "Example: fullrank serve --encoder" in result.stdout


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (["--max-batch", "8"], "max_batch", 8),
        (["--no-monitor"], "monitor", False),
        (["--windows", "20,300"], "windows", (20.0, 300.0)),
        (["--windows=[60]"], "windows", (60.0,)),
        (["--cors-origins", "https://a.org,https://b.org"], "cors_origins", ("https://a.org", "https://b.org")),
        (["--log-format", "json"], "log_format", "json"),
    ],
)
def test_flags_are_settings_and_win_over_variables(
    monkeypatch: pytest.MonkeyPatch, flags: list[str], name: str, value: Any
) -> None:
    monkeypatch.setenv("FULLRANK_MAX_BATCH", "4")
    monkeypatch.setenv("FULLRANK_PORT", "1234")
    result, (settings,) = serve(monkeypatch, *flags)
    assert result.exit_code == 0, result.output
    assert getattr(settings, name) == value
    assert settings.port == 1234


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-batch", "0"], "max_batch: Input should be greater than or equal to 1"),
        (["--threads", "many"], "threads: Input should be a valid integer"),
        (["--max-images-per-request", "600"], "exceeds max_pending_images (512)"),
        (["--log-format", "xml"], "log_format: Input should be 'text' or 'json'"),
        (["--quux", "1"], "fullrank: --quux is no option of fullrank serve; `fullrank serve --help` lists them\n"),
        (["--prot=80"], "fullrank: --prot is no option of fullrank serve; did you mean --port?\n"),
        (["--max_batch", "8"], "did you mean --max-batch?"),
        (["--port", "80", "more"], "unrecognized arguments: more"),
        (["--windows=-5,300"], "windows.0: Input should be greater than 0"),
        (["--device", "cudaa"], "'cudaa' is no torch device"),
        (["--api-key", "short"], "api_key: Value should have at least 8 items"),
    ],
)
def test_a_wrong_flag_is_named(monkeypatch: pytest.MonkeyPatch, flags: list[str], words: str) -> None:
    result, served = serve(monkeypatch, *flags)
    assert result.exit_code == 2
    assert not served
    assert words in result.output
    assert "Traceback" not in result.output
    assert "short" not in result.output.replace("--api-key short", "")


def test_windows_may_come_in_any_order() -> None:
    """The canary's pace and the share of each sender follow from the shortest, which is taken to be the first."""
    assert Settings.model_validate({"windows": "3600,60,300"}).windows == (60.0, 300.0, 3600.0)


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "250000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "1600000 100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ({"cpu.max": "", "cpu/cpu.cfs_quota_us": "300000"}, 8),
    ],
)
def test_a_containers_quota_counts_as_its_cpus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, str], cpus: int
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(settings, "CGROUP", tmp_path)
    monkeypatch.setattr(settings.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert settings.available_cpus() == cpus


def test_the_table_in_the_docs_is_that_of_the_settings() -> None:
    page = settings_docs.PAGE.read_text()
    assert page == settings_docs.written(page), "run `python -m tools.settings_docs`"
