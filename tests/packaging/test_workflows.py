"""The workflows of a public forge: actions pinned by commit, few rights, commands and files that exist."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
# What each job may do beyond reading the repository.
RIGHTS = {
    "publish": {"id-token": "write"},
    "image": {"contents": "read", "packages": "write", "id-token": "write"},
    "page": {"contents": "write"},
}


def steps(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """(job, step) of a workflow."""
    return [(name, step) for name, job in yaml.safe_load(file.read_text())["jobs"].items() for step in job["steps"]]


@pytest.mark.parametrize("file", FILES, ids=lambda it: it.stem)
def test_actions_are_pinned_by_commit_with_their_version_beside(file: Path) -> None:
    used = re.findall(r"uses: (.*)", file.read_text())
    assert used
    for it in used:
        assert re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", it), it
    for _, step in steps(file):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


def test_one_commit_for_each_version_of_an_action() -> None:
    used = {it for file in FILES for it in re.findall(r"uses: (.*)", file.read_text())}
    assert len({it.partition("@")[0] for it in used}) == len(used)


@pytest.mark.parametrize("file", FILES, ids=lambda it: it.stem)
def test_a_job_has_no_more_rights_than_it_needs_and_an_end(file: Path) -> None:
    content = yaml.safe_load(file.read_text())
    assert content["permissions"] == {"contents": "read"}
    for name, job in content["jobs"].items():
        assert job.get("permissions", {}) == (RIGHTS.get(name, {}) if file.stem == "release" else {}), name
        assert job["timeout-minutes"] <= 90


@pytest.mark.parametrize("file", FILES, ids=lambda it: it.stem)
def test_its_commands_are_shell_and_its_make_targets_and_files_exist(file: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for _, step in steps(file):
        script = re.sub(r"\$\{\{.*?\}\}", "value", step.get("run", ""))
        done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        # Text from outside is never pasted into a script: it comes by the environment.
        assert not re.search(r"\$\{\{\s*(github\.event|github\.head_ref|secrets)", step.get("run", ""))
        for target in re.findall(r"\bmake (\w[\w-]*)", script):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
        for path in re.findall(r"\b(?:requirements|deploy|examples|docs)/[\w./-]+\w", script):
            assert (ROOT / path).exists(), path


def script_of(name: str) -> str:
    """The commands of the release's step of that name."""
    return next(str(step["run"]) for _, step in steps(FILES[0]) if step.get("name", "").startswith(name))


def bash(script: str, folder: Path, tag: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"GITHUB_REF_NAME": tag}
    command = ["bash", "-euo", "pipefail", "-c", script]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_tag_has_to_be_the_version_and_its_notes_are_the_changelogs(tmp_path: Path) -> None:
    version = re.search(r'__version__ = "(.+)"', (ROOT / "fullrank" / "__init__.py").read_text())
    assert version
    assert FILES[0].stem == "release"
    assert bash(script_of("the tag is the version"), ROOT, f"v{version[1]}").returncode == 0
    assert bash(script_of("the tag is the version"), ROOT, "v9.9.9").returncode != 0
    shutil.copy(ROOT / "CHANGELOG.md", tmp_path)
    notes = script_of("the changelog's notes").partition("gh release")[0]
    assert bash(notes, tmp_path, f"v{version[1]}").returncode == 0
    written = (tmp_path / "notes.md").read_text()
    assert "### " in written
    assert "## [" not in written.replace("### [", "")
    assert written.strip() in (ROOT / "CHANGELOG.md").read_text()
    assert bash(notes, tmp_path, "v9.9.9").returncode != 0


def test_a_pushed_charts_digest_is_what_is_signed(tmp_path: Path) -> None:
    """Against what helm 3 prints."""
    digest = f"sha256:{'5e' * 32}"
    (tmp_path / "pushed").write_text(f"Pushed: ghcr.io/someone/charts/fullrank:0.2.0\nDigest: {digest}\n")
    found = re.search(r"\$\((sed .* pushed)\)", script_of("package the chart"))
    assert found
    assert bash(found[1], tmp_path, "v1.0.0").stdout.strip() == digest
