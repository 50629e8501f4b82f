"""Links between our Markdown pages: each leads to a file of the repository, and each anchor to a heading."""

import os
import re
import subprocess
import unicodedata
from collections import Counter
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest

from tools.architecture import ROOT

SKIPPED = {".venv", ".git", "build", "dist", "node_modules", "site"}
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(\s*<?([^)\s>]*)>?(?:\s+\"[^\"]*\")?\s*\)")
IMAGE = re.compile(r"<img[^>]*\ssrc=\"([^\"]+)\"")


def pages() -> list[Path]:
    if (ROOT / ".git").exists():
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        return [ROOT / it for it in listed if (ROOT / it).exists()]
    found = []
    for folder, inner, files in os.walk(ROOT):
        inner[:] = [it for it in inner if it not in SKIPPED]
        found += [Path(folder) / it for it in files if it.endswith(".md")]
    return found


def prose(text: str) -> str:
    """The text without code: what is written there is not a link."""
    text = re.sub(r"^( *)(`{3,})[^`\n]*\n.*?^\1\2`*$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "code", text)


def forge_slug(heading: str) -> str:
    """A heading's anchor as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def site_slug(heading: str) -> str:
    """A heading's anchor as Python-Markdown, and with it the site, makes it."""
    plain = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())


def fragments(text: str) -> set[str]:
    """Anchors of a page that are the same on the forge and on the site."""
    fenced = re.sub(r"^( *)(`{3,})[^`\n]*\n.*?^\1\2`*$", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = [
        re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", it).replace("`", "").strip()
        for it in re.findall(r"(?m)^#{1,6} +(.+?) *#*$", fenced)
    ]
    seen = Counter(forge_slug(it) for it in headings)
    same = {forge_slug(it) for it in headings if forge_slug(it) == site_slug(it) and seen[forge_slug(it)] == 1}
    return same | set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", text))


@cache
def anchors(page: Path) -> set[str]:
    return fragments(page.read_text())


def broken(page: Path) -> list[str]:
    text = prose(page.read_text())
    wrong = []
    for target in LINK.findall(text) + IMAGE.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, fragment = unquote(target).partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.is_relative_to(ROOT) or not file.exists():
            wrong.append(f"{target}: there is no such file")
        elif fragment and (file.suffix != ".md" or fragment not in anchors(file)):
            wrong.append(f"{target}: no heading has this anchor, on the forge and on the site")
    return wrong


def test_every_link_and_anchor_leads_somewhere() -> None:
    every = pages()
    assert len(every) > 50
    assert {str(page.relative_to(ROOT)): wrong for page in every if (wrong := broken(page))} == {}


@pytest.mark.parametrize(
    ("written", "wrong"),
    [
        ("[a](there.md)", False),
        ("[a](there.md#a-heading-of-its-own)", False),
        ("![a](gone.png)", True),
        ("[a](gone.md)", True),
        ("[a](there.md#gone)", True),
        ("[a](#gone)", True),
        ("[`a`](gone.md)", True),
        ("[![a](there.md)](gone.md)", True),
        ("`[a](gone.md)`", False),
        ("```text\n[a](gone.md)\n```", False),
        ("[a](https://example.org/gone.md#gone)", False),
        ("# Twice\n\n# Twice\n\n[a](#twice)", True),
        ("# A — b\n\n[a](#a--b)", True),
    ],
)
def test_what_is_broken_is_found(written: str, wrong: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(broken.__globals__, "ROOT", tmp_path.resolve())
    (tmp_path / "there.md").write_text("## A heading `of` its own\n")
    page = tmp_path / "page.md"
    page.write_text(written + "\n")
    assert bool(broken(page.resolve())) is wrong
