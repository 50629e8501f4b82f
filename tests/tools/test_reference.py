"""docs/reference is what the code says, and mkdocs.yml knows every page."""

import re
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
import yaml

from cli.metrics import unit
from service.settings import Settings
from tools.architecture import ROOT
from tools.reference import PAGES
from tools.reference.command_line import section
from tools.reference.metrics import serving

DOCS = ROOT / "docs"
CONFIGURATION = yaml.safe_load((ROOT / "mkdocs.yml").read_text())


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_the_code_says(name: str) -> None:
    assert (DOCS / "reference" / name).read_text() == PAGES[name](), f"docs/reference/{name} is old: make openapi"


def test_every_setting_and_metric_is_described() -> None:
    settings = (DOCS / "reference" / "settings.md").read_text()
    assert {name for name in Settings.model_fields if f"| `FULLRANK_{name.upper()}` |" not in settings} == set()
    metrics = (DOCS / "reference" / "metrics.md").read_text()
    assert len(serving()) > 20
    for line in re.findall(r"^\| `fullrank_.*", metrics, re.MULTILINE):
        assert all(cell.strip() for cell in (line.split("|")[i] for i in (1, 2, 3, 5))), line


def test_every_parameter_of_a_route_has_a_meaning() -> None:
    rows = re.findall(
        r"^\| `[^|]*\| (?:query|header|path) \|.*", (DOCS / "reference" / "http.md").read_text(), re.MULTILINE
    )
    assert len(rows) > 20
    assert [row for row in rows if not row.split("|")[4].strip()] == []


def test_the_library_has_properties_defaults_as_they_are_typed_and_what_a_snapshot_holds() -> None:
    page = PAGES["library.md"]()
    assert "**`Snapshot.waits_for: str`**" in page
    assert "**`Reference.shortfall: str`**" in page
    assert 'Client(url: str = "http://127.0.0.1:8000"' in page
    assert "clock: Callable[[], float] = time.monotonic" in page
    assert {"### WindowStatistics", "### overlap", "### Merging"} <= set(page.splitlines())
    assert not re.search(r"<built-in|<factory>|<function|= [,)]", page)


def test_units_follow_the_names() -> None:
    assert unit("fullrank_request_seconds") == "seconds"
    assert unit("fullrank_pending_bytes_limit") == "bytes"
    assert unit("fullrank_effective_rank") == "dimensions"


def test_a_command_shows_defaults_of_zero_and_in_words_variables_and_what_may_be_left_out() -> None:
    application = typer.Typer()

    @application.command()
    def grow(
        where: str,
        name: Annotated[str | None, typer.Argument(help="Whose.")] = None,
        seed: Annotated[int, typer.Option(help="Where it begins.")] = 0,
        width: Annotated[int | None, typer.Option(help="How wide.", show_default="the recipe's")] = None,
        key: Annotated[str | None, typer.Option(help="The key.", envvar="FULLRANK_API_KEY")] = None,
    ) -> None:
        """Grow."""

    written = section("fullrank grow", typer.main.get_command(application))
    assert "fullrank grow WHERE [NAME] [OPTIONS]" in written
    assert "| `--seed INTEGER` | `0` | Where it begins. |" in written
    assert "| `--width INTEGER` | the recipe's | How wide. |" in written
    assert "| `--key TEXT` |  | The key. Or `FULLRANK_API_KEY`. |" in written


def listed(entry: Any) -> list[str]:
    """The files that a part of the navigation names."""
    if isinstance(entry, str):
        return [entry]
    return [file for inner in (entry.values() if isinstance(entry, dict) else entry) for file in listed(inner)]


def test_the_navigation_has_every_page_once() -> None:
    files = sorted(str(it.relative_to(DOCS)) for it in DOCS.rglob("*.md"))
    assert sorted(listed(CONFIGURATION["nav"])) == files


def test_the_site_needs_no_plugin_and_loads_nothing_from_elsewhere() -> None:
    assert CONFIGURATION["plugins"] == ["search"]
    assert CONFIGURATION["theme"]["font"] is False
    assert not {"extra_javascript", "extra_css", "hooks"} & set(CONFIGURATION)


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda it: str(it.relative_to(DOCS)))
def test_a_page_links_to_nothing_that_the_site_lacks(page: Path) -> None:
    """Files of the repository outside docs/ are named, not linked: on the site such a link would be dead."""
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not re.match(r"[a-z]+:", target):
            file = (page.parent / target).resolve()
            assert file.is_relative_to(DOCS), target
            assert not file.is_dir(), target
