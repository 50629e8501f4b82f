"""Several encoders and a model of the sidecar on one replica: the fleet's dashboard shows each, alone and together."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.support.images import encoded

NAMES = ("elsewhere", "other", "small")  # elsewhere is posted to /observe, without a reference
# What each of these must show for every encoder, the sidecar's too, which has no reference and no images.
OF_ALL = ("Verdict", "Revisions in service", "Effective rank", "Participation ratio", "Total variance")


@pytest.fixture(scope="module")
def scraped(
    tool: Callable[[str], str], small_artifact: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """A Prometheus that scraped a replica with two encoders and a model of others, all of which had rows."""
    from models.artifact import load, save
    from tools.stack import prometheus, service

    tool("prometheus")
    folder = tmp_path_factory.mktemp("many")
    small = load(small_artifact)
    save(replace(small, card=small.card.model_copy(update={"name": "other"})), folder / "other")
    rng = np.random.default_rng(0)
    files = [encoded(it) for it in rng.integers(0, 256, (96, 28, 28), np.uint8)]
    settings = {"encoder": small_artifact, "encoders": folder / "other", "windows": "600,3600", "threads": 1}
    with service(folder, **settings, block_rows=32, gate="off", monitor_rate="inf") as url:
        for name in ("small", "other"):
            images = [("images", (f"{n}.png", it, "image/png")) for n, it in enumerate(files)]
            answer = httpx.post(f"{url}/embed", files=images, params={"model": name})
            assert answer.status_code == 200, answer.text
        rows = rng.normal(size=(96, 16)).tolist()
        assert httpx.post(f"{url}/observe", json={"model": "elsewhere", "rows": rows}).status_code == 202
        with prometheus(folder, [url.removeprefix("http://")], windows={"10m": "5m"}) as server:
            yield server


def panels(deploy: Path, model: str) -> dict[str, str]:
    """title -> its first PromQL, of the fleet's dashboard with this encoder chosen."""
    board = json.loads((deploy / "grafana" / "dashboards" / "fleet.json").read_text())
    found = {}
    for panel in board["panels"]:
        for target in panel.get("targets", [])[:1]:
            expression = target["expr"].replace("$instance", ".*").replace("$model", model)
            found[panel["title"].partition(" of normalised")[0]] = expression.replace("$__rate_interval", "30s")
    return found


def models(server: Any, expression: str) -> set[str]:
    return {labels["model"] for labels, value in server.query(expression) if math.isfinite(value)}


def test_the_dashboards_list_of_encoders_has_all(scraped: Any, deploy: Path) -> None:
    from tools.stack import wait

    board = json.loads((deploy / "grafana" / "dashboards" / "fleet.json").read_text())
    [variable] = [it for it in board["templating"]["list"] if it["name"] == "model"]
    assert variable["query"]["query"] == 'label_values(fullrank_verdict{instance=~"$instance"}, model)'
    assert wait(lambda: models(scraped, "fullrank_verdict == 1") == set(NAMES), 180)


@pytest.mark.parametrize("title", OF_ALL)
def test_a_panel_shows_each_encoder_and_only_the_chosen(scraped: Any, deploy: Path, title: str) -> None:
    from tools.stack import wait

    shown: set[str] = set()

    def shows(chosen: str, expected: set[str]) -> bool:
        nonlocal shown
        shown = models(scraped, panels(deploy, chosen)[title])
        return shown == expected

    for name in NAMES:
        assert wait(lambda name=name: shows(name, {name}), 180), (name, shown)
    assert wait(lambda: shows(".*", set(NAMES)), 180), shown
    assert wait(lambda: shows("small|other", {"small", "other"}), 180), shown
