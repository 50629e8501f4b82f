"""The end-to-end play: its parts here, the whole of it under soak, and an encoder without a reference."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests.support.rules import about_embeddings

Tool = Callable[[str], str]


def test_sped_up_rules_are_the_shipped_ones_but_for_time(tool: Tool, deploy: Path, tmp_path: Path) -> None:
    from tests.support.hurry import sped_up, sped_up_rules

    assert [sped_up(it) for it in ("15s", "1m", "5m", "1h", "1d")] == ["1s", "4s", "20s", "240s", "5760s"]
    folder = sped_up_rules(tmp_path / "rules")
    files = sorted(folder.glob("*.yml"))
    done = subprocess.run([tool("promtool"), "check", "rules", *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    def timeless(file: Path) -> str:
        content = yaml.safe_load(file.read_text())
        for rule in (rule for group in content["groups"] for rule in group["rules"]):
            rule["expr"] = re.sub(r"\[\w+\]", "[]", rule["expr"])
            rule.pop("for", None)
        return json.dumps(content)

    shipped = sorted((deploy / "prometheus" / "rules").glob("*.yml"))
    assert [timeless(file) for file in files] == [timeless(file) for file in shipped]


def test_the_webhook_remembers_when_an_alert_first_came() -> None:
    from tests.support.alertmanager import Webhook
    from tools.stack import call

    def alert(name: str, status: str = "firing", since: str = "t0") -> dict[str, object]:
        labels = {"alertname": name, "severity": "page", "instance": "a:1"}
        return {"status": status, "fingerprint": name, "startsAt": since, "labels": labels}

    with Webhook() as webhook:
        call(webhook.url, {"alerts": [alert("X"), alert("Y", "resolved")]})
        mark = time.monotonic()
        call(webhook.url, {"alerts": [alert("X"), alert("X", since="t1"), alert("Z")]})
        assert [it.alert for it in webhook.since(mark)] == ["X", "Z"]
        assert [it.alert for it in webhook.since(0)] == ["X", "X", "Z"]


@pytest.mark.soak  # test_sidecar shows a model without a reference under the shipped rules
def test_an_encoder_without_a_reference_serves_and_pages_nobody(
    tool: Tool, deploy: Path, small_artifact: Path, tmp_path: Path
) -> None:
    from models.artifact import load, save
    from tests.support.hurry import sped_up_rules
    from tools.demo.traffic import Traffic, encoded
    from tools.stack import call, prometheus, service, wait
    from training.data import SAMPLE, read_fashion_mnist

    tool("prometheus")
    save(replace(load(small_artifact), reference=None, canary=None), tmp_path / "imported")
    pictures = encoded(read_fashion_mnist(SAMPLE, "test").images)
    with (
        service(tmp_path, encoder=tmp_path / "imported", windows="20,60", block_rows=32, threads=1) as url,
        prometheus(
            tmp_path, [url.removeprefix("http://")], windows={"20s": "5m"}, rules=sped_up_rules(tmp_path / "rules")
        ) as server,
        Traffic(url, pictures, rate=100),
    ):
        # Enough rows for every rule that asks for some, in several evaluations: an alert that is pending shows too.
        seen = 'count_over_time((fullrank_window_rows{window="5m"} >= 256)[5m:1s]) > 3'
        assert wait(lambda: bool(server.query(seen)), 180)
        spectrum = json.loads(call(f"{url}/spectrum", timeout=120))
        assert spectrum["verdict"]["state"] == "insufficient_data"
        assert "fullrank reference ENCODER --data DIR" in spectrum["verdict"]["reason"]
        assert wait(lambda: server.value('fullrank_verdict{state="insufficient_data"}') == 1, 120)

        def alerts() -> set[str]:
            return {alert["labels"]["alertname"] for alert in server.alerts()}

        assert wait(lambda: "EmbeddingInsufficientData" in alerts(), 120)
        assert alerts() & about_embeddings(deploy) == set()


@pytest.mark.soak
def test_every_scenario_ends_as_it_should(tool: Tool, deploy: Path, tmp_path: Path) -> None:
    tool("prometheus")
    command = [sys.executable, "-m", "tests.e2e", "--json", tmp_path / "table.json"]
    done = subprocess.run(command, cwd=deploy.parent, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(row["passed"] for row in json.loads((tmp_path / "table.json").read_text()).values())
