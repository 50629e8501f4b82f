"""Every PromQL we ship, against a real Prometheus that scraped a real service under traffic and a run's exposition."""

import json
import math
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml

from tests.support.rules import about_embeddings

# The service reads six seconds as if they were five minutes, so that the test need not wait.
DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
WINDOWS = {"6s": "5m", "1m": "1h"}
Series = list[tuple[dict[str, str], float]]
STAND_INS = {"$__rate_interval": "30s", "$instance": ".*", "$model": ".*", "$run": ".*"}
RUN = {
    "epoch": 3,
    "loss": 5.1,
    "knn": 0.81,
    "learning_rate": 0.01,
    "views_per_second": 900,
    "representation": {"effective_rank": 21.0, "participation_ratio": 9.0, "total_variance": 0.4},
    "projection": {"effective_rank": 11.0, "participation_ratio": 5.0, "total_variance": 0.9},
}


@pytest.fixture(scope="module")
def scraped(
    tool: Callable[[str], str], small_artifact: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """The Prometheus, once it holds statistics of traffic and of a training run."""
    from models.artifact import load, save
    from models.references import in_chunks, with_reference
    from tools.demo.traffic import Traffic, encoded
    from tools.stack import free_port, prometheus, service, wait
    from training.data import SAMPLE, read_fashion_mnist
    from training.watch import prometheus as training_metrics

    tool("prometheus")
    folder = tmp_path_factory.mktemp("live")
    train, test = (read_fashion_mnist(SAMPLE, split).images for split in ("train", "test"))
    pictures = encoded(test)
    # Thresholds of the mean, of the inputs and of the evidence come with a calibrated reference: 1024 images or more.
    small = load(small_artifact)
    basis, rest = (in_chunks(x, small.card.preprocessing) for x in (train[:400], torch.cat([train[400:], test])))
    artifact = with_reference(small, basis, rest, train[:64], "MIT")
    save(artifact, folder / "small")
    port = free_port()
    training_metrics(port, "fashion-directclr", 6)(RUN)
    with (
        service(folder, encoder=folder / "small", windows="6,60", block_rows=32, threads=1) as url,
        prometheus(folder, [url.removeprefix("http://"), f"127.0.0.1:{port}"], windows=WINDOWS) as server,
        Traffic(url, pictures, rate=100),
    ):
        needed = [
            'fullrank_verdict{state="insufficient_data"} == 0 and on () fullrank_effective_rank{window="5m"} > 0',
            "fullrank_training_epoch == 3",
            *rules(DEPLOY)["record"],
        ]
        for expression in needed:
            assert wait(lambda expression=expression: known(server.query(expression)), 180), expression
        yield server


def known(series: Series) -> bool:
    return any(math.isfinite(value) for _, value in series)


def at_last(server: Any, expression: str, found: Callable[[Series], bool] = bool) -> Series:
    """What a query gives once it gives what it should: a scrape that times out takes all series away for a second."""
    from tools.stack import wait

    answers: list[Series] = []
    assert wait(lambda: found(answers.append(server.query(expression)) or answers[-1]), 180), expression
    return answers[-1]


def missing(server: Any, expressions: Iterable[str]) -> list[str]:
    """Those that show nothing, however often they are asked."""
    from tools.stack import wait

    left = dict.fromkeys(expressions)

    def gone() -> bool:
        for expression in [it for it in left if known(server.query(it))]:
            del left[expression]
        return not left

    wait(gone, 180)
    return list(left)


def concrete(expression: str) -> str:
    for name, value in STAND_INS.items():
        expression = expression.replace(name, value)
    return expression


def panels(deploy: Path) -> dict[str, str]:
    """where -> PromQL, of every panel."""
    files = (deploy / "grafana" / "dashboards").glob("*.json")
    return {
        f"{file.stem}: {panel['title']} {target['refId']}": concrete(target["expr"])
        for file in files
        for panel in json.loads(file.read_text())["panels"]
        for target in panel.get("targets", [])
    }


def rules(deploy: Path) -> dict[str, dict[str, str]]:
    """kind -> name -> PromQL, of every recording rule, alert and Grafana alert."""
    files = sorted((deploy / "prometheus" / "rules").glob("*.yml"))
    shipped = [
        rule for file in files for group in yaml.safe_load(file.read_text())["groups"] for rule in group["rules"]
    ]
    grafana = yaml.safe_load((deploy / "grafana" / "provisioning" / "alerting" / "rules.yml").read_text())["groups"]
    return {
        "record": {rule["record"]: rule["expr"] for rule in shipped if "record" in rule},
        "alert": {f"{r['alert']} {r['labels']['severity']}": r["expr"] for r in shipped if "alert" in r},
        "grafana": {rule["title"]: rule["data"][0]["model"]["expr"] for group in grafana for rule in group["rules"]},
    }


def test_the_service_and_the_run_are_scraped(scraped: Any) -> None:
    at_last(scraped, 'up{job="fullrank"}', lambda found: [value for _, value in found] == [1.0, 1.0])


def test_promtool_finds_nothing_wrong_with_the_metrics(scraped: Any, tool: Callable[[str], str]) -> None:
    for labels, _ in scraped.query('up{job="fullrank"}'):
        exposed = httpx.get(f"http://{labels['instance']}/metrics").content
        found = subprocess.run([tool("promtool"), "check", "metrics"], input=exposed, capture_output=True, check=False)
        assert found.returncode == 0, found.stderr.decode()


def test_every_panel_shows_something(scraped: Any, deploy: Path) -> None:
    shown = panels(deploy)
    assert len({where.partition(":")[0] for where in shown}) == 3
    tail = shown.pop("fleet: Shift of the mean in the tail A")
    empty = missing(scraped, shown.values())
    assert [where for where, expression in shown.items() if expression in empty] == []
    # It needs 1,024 rows in the shortest window, which is six seconds here: NaN is its right value.
    at_last(scraped, tail)


def test_every_recorded_ratio_is_recorded(scraped: Any, deploy: Path) -> None:
    names = rules(deploy)["record"]
    assert len(names) > 20
    assert missing(scraped, names) == []


def test_counters_and_gauges_agree_on_the_rank(scraped: Any) -> None:
    (_, counted), *_ = at_last(scraped, "instance:fullrank_participation_ratio:rate1h", known)
    (_, lower), *_ = at_last(scraped, 'fullrank_participation_ratio{window="1h",bound="lower"}', known)
    (_, upper), *_ = at_last(scraped, 'fullrank_participation_ratio{window="1h",bound="upper"}', known)
    assert 0.8 * lower < counted < 1.25 * upper


@pytest.mark.parametrize("kind", ["alert", "grafana"])
def test_every_series_that_an_alert_reads_exists(scraped: Any, deploy: Path, kind: str) -> None:
    found = rules(deploy)[kind]
    assert found
    for where, expression in found.items():
        scraped.query(expression)  # raises where it is no PromQL
        selectors = re.findall(
            r"\b(?:(?:job|instance|fullrank):fullrank_|fullrank[:_]|up\{)[\w:]*(?:\{?[^}\s]*\})?", expression
        )
        assert selectors, where
        for selector in selectors:
            assert at_last(scraped, selector), where


def test_the_annotations_queries_find_their_series(scraped: Any, deploy: Path) -> None:
    ((labels, _),) = at_last(scraped, "fullrank_verdict == 1", lambda found: len(found) == 1)
    files = (deploy / "prometheus" / "rules").glob("*.yml")
    groups = [group for file in files for group in yaml.safe_load(file.read_text())["groups"]]
    text = "\n".join(rule["annotations"]["description"] for it in groups for rule in it["rules"] if "alert" in rule)
    asked = set(re.findall(r"printf `([^`]+)` ((?:\$[\w.]+ )+)\| query", text))
    assert len(asked) > 20
    own = ",".join(f"{name}='{labels[name]}'" for name in ("instance", "model", "revision"))
    for template, names in asked:
        wanted = [own if name == "$of" else labels[name.removeprefix("$labels.")] for name in names.split()]
        expression = template.replace("%[1]s", own) if "%[1]s" in template else template % tuple(wanted)
        scraped.query(expression)  # raises where it is no PromQL
        for selector in re.findall(r"[\w:]*(?:fullrank_|up)[\w:]*\{[^}]*\}", expression):
            at_last(scraped, selector)


def test_nothing_pages_on_ordinary_traffic(scraped: Any) -> None:
    alerts = {alert["labels"]["alertname"] for alert in scraped.alerts() if alert["labels"]["severity"] == "page"}
    assert alerts & about_embeddings(DEPLOY) == set()  # a slow machine may have missed a scrape
