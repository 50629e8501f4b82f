"""Every command in the documentation fits the real command line, Makefile and files; every Python block compiles.

And every block is run by a test, or the page says why not in a comment before it.
"""

import ast
import importlib
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from cli import app
from service.settings import Settings
from tools.architecture import ROOT

FENCE = re.compile(r"^( *)```(\w*)[^\n`]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
PAGES = sorted(
    [*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md"), ROOT / "deploy" / "README.md", ROOT / "fullrank" / "README.md"]
)
OURS = ("fullrank", "models", "training", "service", "scale", "theory", "tools", "benchmarks", "cli")
SHELL = ("sh", "console")
DOCS = "tests/service/http/test_docs.py"
# page -> language -> the test that runs its blocks, which names the page.
RUN = {
    "CONTRIBUTING.md": dict.fromkeys(("sh", "python"), "tests/test_contributing.py"),
    "README.md": {"sh": DOCS, "python": "tests/packaging/test_library.py"},
    "fullrank/README.md": {"python": "tests/packaging/test_library.py"},
    "docs/howto/efficientnet.md": {"sh": "tests/cli/test_howto_efficientnet.py"},
    "docs/howto/sidecar.md": {"python": "tests/e2e/test_sidecar.py"},
    **{
        f"docs/tutorial/{it}.md": {"python": "tests/fullrank/test_tutorials.py"}
        for it in ("compare-encoders", "is-it-collapsed", "training-loop")
    },
    **{f"docs/tutorial/{it}.md": {"sh": DOCS} for it in ("first-alert", "own-encoder")},
    **{
        f"docs/howto/{it}.md": dict.fromkeys(("sh", "python"), DOCS)
        for it in ("export", "gate", "own-method", "report", "send-images", "thresholds", "train")
    },
}
NOT_RUN = re.compile(r"<!-- not run here: (.+?) -->\n$")
WITHOUT = {"CHANGELOG.md", "CONTRIBUTING.md"}  # prose; and tests/test_contributing.py runs every step


def commands(block: str) -> list[list[str]]:
    """The simple commands of a shell block, as words."""
    found = []
    joined = re.sub(r"\\\n\s*", " ", block)
    for line in joined.splitlines():
        line = line.removeprefix("$ ")
        try:
            lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;()<>")
            lexer.whitespace_split = True
            words = list(lexer)
        except ValueError:  # a quotation that goes over several lines: what is in it is not ours
            continue
        part: list[str] = []
        for word in [*words, ";"]:
            if word and set(word) <= set("|&;()"):
                found.append(part)
                part = []
            else:
                part.append(word)
    return [drop_assignments(it) for it in found if drop_assignments(it)]


def drop_assignments(words: list[str]) -> list[str]:
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    return words


@cache
def parser() -> Any:
    return typer.main.get_command(app)


def wrong_options(words: list[str]) -> list[str]:
    """Options of `fullrank ...` that it does not have."""
    if not words or words[0].startswith("-"):
        return [
            it
            for it in words
            if it.startswith("-")
            and it not in ("--help", "-h", "--version", "--install-completion", "--show-completion")
        ]
    command = parser()
    while hasattr(command, "commands"):
        if not words or words[0].startswith("-") or not re.fullmatch(r"[a-z][\w-]*", words[0]):
            return []  # the group itself, or a placeholder such as NAME
        below = command.get_command(None, words[0])
        if below is None:
            return [words[0]]
        command, words = below, words[1:]
    known = {"--help", "-h"} | {option for it in command.params for option in (*it.opts, *it.secondary_opts)}
    if command.name == "serve":
        known |= {f"--{name.replace('_', '-')}" for name in Settings.model_fields}
    options = [it.partition("=")[0] for it in words if re.match(r"--[a-z]", it)]
    return [it for it in options if it not in known]


def wrong(words: list[str]) -> str | None:
    """What is wrong with a command that is ours, or None."""
    first, rest = Path(words[0]).name, words[1:]
    if first == "torchrun" and "fullrank" in " ".join(words):
        where = next(i for i, it in enumerate(words) if "fullrank" in it)
        return wrong(["fullrank", *words[where + 1 :]])
    if first == "fullrank":
        bad = wrong_options([it.rstrip(")") for it in rest])
        return f"fullrank has no {bad}" if bad else None
    if first == "make":
        makefile = (ROOT / "Makefile").read_text()
        targets = [it for it in rest if "=" not in it and not it.startswith("-")]
        bad = [it for it in targets if not re.search(rf"^{re.escape(it)}:", makefile, re.MULTILINE)]
        return f"no target {bad}" if bad else None
    if first in ("python", "python3") and rest[:1] == ["-m"]:
        if rest[1].partition(".")[0] not in (*OURS, "tests"):
            return None
        file = ROOT / rest[1].replace(".", "/")
        return None if file.with_suffix(".py").exists() or (file / "__main__.py").exists() else f"no module {rest[1]}"
    if first in ("python", "python3") and rest and rest[0].endswith(".py"):
        return None if (ROOT / rest[0]).exists() or "/" not in rest[0] else f"no file {rest[0]}"
    return None


def test_the_check_finds_what_is_wrong() -> None:
    text = "A=1 fullrank serve --max-batch 3 | head\nfullrank check X --nowhere && make nothing\npython -m tools.gone\n"
    assert [wrong(it) for it in commands(text)] == [
        None,
        None,
        "fullrank has no ['--nowhere']",
        "no target ['nothing']",
        "no module tools.gone",
    ]
    assert wrong(["fullrank", "nothing"]) == "fullrank has no ['nothing']"
    assert wrong(["torchrun", "--nproc-per-node", "8", "$(which fullrank)", "train", "x", "--nowhere"])


@pytest.mark.parametrize(
    "page", [it for it in PAGES if it.name not in WITHOUT], ids=lambda it: str(it.relative_to(ROOT))
)
def test_every_command_fits_the_real_one(page: Path) -> None:
    text = page.read_text()
    blocks = [body for _, language, body in FENCE.findall(text) if language in ("sh", "console", "")]
    # Commands in a sentence, as in `fullrank check ENCODER`, are held to the same.
    inline = [
        it for it in re.findall(r"`((?:fullrank|make|python -m) [^`\n]+)`", FENCE.sub("", text)) if "..." not in it
    ]
    found = [(words, problem) for block in (*blocks, *inline) for words in commands(block) if (problem := wrong(words))]
    assert found == []


@pytest.mark.parametrize(
    "page", [it for it in PAGES if it.name not in WITHOUT], ids=lambda it: str(it.relative_to(ROOT))
)
def test_python_blocks_compile_and_import_what_exists(page: Path) -> None:
    if page.parent.name == "reference":
        return  # signatures
    for _, language, body in FENCE.findall(page.read_text()):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in OURS:
                module = importlib.import_module(str(node.module))
                assert [it.name for it in node.names if not hasattr(module, it.name)] == []


def not_run(page: str, text: str) -> list[str]:
    """The first lines of blocks that no test runs, without a word why."""
    left = []
    for found in FENCE.finditer(text):
        if (
            found[2] in (*SHELL, "python")
            and found[2] not in RUN.get(page, {})
            and not NOT_RUN.search(text, 0, found.start())
        ):
            left.append(found[3].partition("\n")[0])
    return left


@pytest.mark.parametrize("page", [str(it.relative_to(ROOT)) for it in PAGES if it.name != "CHANGELOG.md"])
def test_every_block_is_run_or_the_page_says_why_not(page: str) -> None:
    text = (ROOT / page).read_text()
    if page in ("docs/reference/library.md", "docs/reference/command-line.md"):  # signatures and usage, from the code
        return
    assert not_run(page, text) == []
    for test in re.findall(r"tests/[\w/]+", " ".join(re.findall(r"<!-- not run here: (.+?) -->", text))):
        assert (ROOT / test).exists() or (ROOT / f"{test}.py").exists(), test


@pytest.mark.parametrize("page", RUN)
def test_the_tests_that_run_a_page_name_it(page: str) -> None:
    for test in RUN[page].values():
        assert Path(page).stem in (ROOT / test).read_text()


def test_a_block_that_nobody_runs_is_found() -> None:
    text = "a\n\n```sh\nls\n```\n\n<!-- not run here: slow -->\n```python\nx\n```\n\n```text\nx\n```\n"
    assert not_run("docs/new.md", text) == ["ls"]
    assert not_run("docs/howto/gate.md", text) == []
