"""fullrank metrics: every metric that is exported is listed with its type, unit, labels and meaning."""

import json
import re
from pathlib import Path

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from cli import app
from cli.common import EXIT_CODES
from fullrank import SpectrumMonitor
from fullrank.exposition import SpectrumCollector
from service.metrics import Metrics
from training.watch import registered

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["metrics", *arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


LISTED = {it["name"]: it for it in json.loads(run("--json"))}


def exported() -> dict[str, tuple[str, str, set[str]]]:
    """Name -> type, meaning and labels, as a scrape of the service and of a training run gives them."""
    service = Metrics("1", "2", "cpu").registry
    with SpectrumMonitor(4) as monitor:
        service.register(SpectrumCollector(lambda: [("m", "r", monitor)]))
        texts = [generate_latest(it).decode() for it in (service, registered("run", 3)[0])]
    found = {}
    for text in texts:
        for family in text_string_to_metric_families(text):
            name = {"counter": f"{family.name}_total"}.get(family.type, family.name)
            labels = {key for sample in family.samples for key in sample.labels} - {"le"}
            found[name] = (family.type, family.documentation, labels)
    return {name: it for name, it in found.items() if not name.endswith("_created")}


def test_what_a_scrape_holds_is_listed_as_it_is() -> None:
    scraped = exported()
    assert len(scraped) > 60
    assert scraped.keys() <= LISTED.keys()
    for name, (kind, meaning, labels) in scraped.items():
        listed = LISTED[name]
        assert listed["meaning"] == meaning
        if listed["type"] != "info":  # a scrape calls it a gauge
            assert listed["type"] == kind, name
        if labels and listed["exported_by"] != "service, monitor":  # without rows a monitor has few series
            assert set(listed["labels"]) == labels, name


def test_each_has_a_unit_and_a_meaning() -> None:
    for name, it in LISTED.items():
        assert it["meaning"], name
        assert it["unit"], name
    units = {name: LISTED[f"fullrank_{name}"]["unit"] for name in ("request_seconds", "effective_rank", "images_total")}
    assert units == {"request_seconds": "seconds", "effective_rank": "dimensions", "images_total": "images"}


def test_every_metric_that_a_rule_names_is_listed() -> None:
    recorded = set(re.findall(r"record: (\S+)", "".join(it.read_text() for it in (ROOT / "deploy").rglob("*.yml"))))
    rules = "".join(it.read_text() for it in (ROOT / "deploy" / "prometheus" / "rules").glob("*.yml"))
    named = set(re.findall(r"(?<![\w:])fullrank_\w+(?![\w:])", rules)) - recorded
    endings = re.compile(r"_(bucket|sum|count)$")
    assert {it for it in named if it not in LISTED and endings.sub("", it) not in LISTED} == set()


def test_a_word_narrows_the_list_and_a_wrong_one_is_said() -> None:
    shown = run("canary")
    assert "fullrank_canary_cosine_min" in shown
    assert "fullrank_requests" not in shown
    done = CliRunner().invoke(app, ["metrics", "nothing-like-it"])
    assert done.exit_code == 1
    assert "no metric's name holds" in done.stderr


def test_exit_codes_are_those_of_the_help() -> None:
    said = " ".join(CliRunner().invoke(app, ["--help"]).stdout.split())
    assert all(f"{code} {words}" in said for code, words in EXIT_CODES.items())
