"""Every PromQL we ship, against a real Prometheus that scraped a real service under traffic."""

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

# The service reads six seconds as if they were five minutes, so that the test need not wait.
WINDOWS = {"6s": "5m", "1m": "1h"}
STAND_INS = {"$__rate_interval": "30s", "$instance": ".*"}


@pytest.fixture(scope="module")
def scraped(
    tool: Callable[[str], str], small_artifact: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """The Prometheus, once it holds statistics of traffic."""
    from deploy.demo.stack import prometheus, service, wait
    from deploy.demo.traffic import Traffic, encoded
    from training.data import SAMPLE, read_fashion_mnist

    tool("prometheus")
    folder = tmp_path_factory.mktemp("live")
    pictures = encoded(read_fashion_mnist(SAMPLE, "test").images)
    with (
        service(folder, encoder=small_artifact, windows="6,60", block_rows=32, threads=1) as url,
        prometheus(folder, [url.removeprefix("http://")], windows=WINDOWS) as server,
        Traffic(url, pictures, rate=100),
    ):
        judged = 'fullrank_verdict{state="insufficient_data"} == 0 and on () fullrank_effective_rank{window="5m"} > 0'
        for needed in (judged, "rate(fullrank_images_total[30s]) > 0"):
            assert wait(lambda needed=needed: bool(server.query(needed)), 40), server.query("fullrank_window_rows")
        yield server


def concrete(expression: str) -> str:
    for name, value in STAND_INS.items():
        expression = expression.replace(name, value)
    return expression


def panels(deploy: Path) -> dict[str, str]:
    """where -> PromQL, of every panel."""
    dashboards = [json.loads(file.read_text()) for file in (deploy / "grafana" / "dashboards").glob("*.json")]
    everything = [panel for dashboard in dashboards for panel in dashboard["panels"]]
    return {f"{p['title']} {t['refId']}": concrete(t["expr"]) for p in everything for t in p.get("targets", [])}


def rules(deploy: Path) -> dict[str, str]:
    """where -> PromQL, of every Prometheus rule and Grafana alert."""
    found: dict[str, str] = {}
    for file in (deploy / "prometheus" / "rules").glob("*.yml"):
        groups = yaml.safe_load(file.read_text())["groups"]
        found |= {rule["alert"]: rule["expr"] for group in groups for rule in group["rules"]}
    for file in (deploy / "grafana" / "provisioning" / "alerting").glob("*.yml"):
        queries = [
            data["model"]
            for group in yaml.safe_load(file.read_text())["groups"]
            for rule in group["rules"]
            for data in rule["data"]
        ]
        found |= {f"{file.name} {query['refId']}": query["expr"] for query in queries if "expr" in query}
    return found


def test_the_service_is_scraped(scraped: Any) -> None:
    assert [value for _, value in scraped.query('up{job="fullrank"}')] == [1.0]


def test_every_panel_shows_something(scraped: Any, deploy: Path) -> None:
    answers = {where: scraped.query(expression) for where, expression in panels(deploy).items()}
    assert answers
    empty = [where for where, series in answers.items() if not any(math.isfinite(value) for _, value in series)]
    assert empty == []


def test_every_series_that_a_rule_reads_exists(scraped: Any, deploy: Path) -> None:
    for where, expression in rules(deploy).items():
        scraped.query(expression)  # raises where it is no PromQL
        selectors = re.findall(r"\bfullrank_\w+(?:\{[^}]*\})?", expression)
        assert selectors, where
        for selector in selectors:
            assert scraped.query(selector), f"{where}: {selector}"


def test_the_annotations_queries_find_their_series(scraped: Any, deploy: Path) -> None:
    ((labels, _),) = scraped.query('fullrank_verdict{state="healthy"}')
    text = "".join(file.read_text() for file in (deploy / "prometheus" / "rules").glob("*.yml"))
    templates = re.findall(r"printf `(fullrank_\w+\{.*?\})`", text)
    assert templates
    for template in templates:
        assert template.count("%s") == 3
        selector = template % (labels["instance"], labels["model"], labels["revision"])
        assert len(scraped.query(selector)) == 1, selector


def test_nothing_pages_on_ordinary_traffic(scraped: Any) -> None:
    assert [alert for alert in scraped.alerts() if alert["labels"]["severity"] == "page"] == []
