"""One incident, one page: the shipped configuration in a real Alertmanager, given alerts over its API."""

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

IDENTITY = {"job": "fullrank", "instance": "a:8000", "model": "m", "revision": "r", "severity": "page"}
TICKET, OTHER = {"severity": "ticket"}, {"instance": "b:8000"}
COLLAPSE = ("EmbeddingCompleteCollapse", "EmbeddingDirectionsDied")
Alert = tuple[str, dict[str, str]]


@contextmanager
def alertmanager(tool: Callable[[str], str], configuration: Path, folder: Path) -> Iterator[str]:
    """Its address."""
    from tools.stack import free_port, process

    binary = shutil.which("prometheus-alertmanager") or tool("alertmanager")  # Debian's name, upstream's name
    url = f"http://127.0.0.1:{free_port()}"
    command = [binary, f"--config.file={configuration}", f"--storage.path={folder}"]
    command += [f"--web.listen-address={url.removeprefix('http://')}", "--cluster.listen-address="]
    with process(command, folder / "alertmanager.log", f"{url}/-/ready"):
        yield url


def post(url: str, *alerts: Alert) -> None:
    from tools.stack import call

    call(f"{url}/api/v2/alerts", [{"labels": IDENTITY | labels | {"alertname": name}} for name, labels in alerts])


@pytest.mark.parametrize("url", ["http://hook:8080/", r"https://example.org/h?v=1&sp=%2Frun&sig=a|b\1"])
def test_compose_writes_any_address_into_the_configuration(deploy: Path, tmp_path: Path, url: str) -> None:
    service = yaml.safe_load((deploy.parent / "docker-compose.yml").read_text())["services"]["alertmanager"]
    *shell, script = service["entrypoint"]
    made = tmp_path / "alertmanager.yml"
    script = script.replace("$$", "$").replace("/tmp/alertmanager.yml", str(made)).partition("exec ")[0]
    script = script.replace("/etc/alertmanager/", f"{deploy}/alertmanager/")
    subprocess.run([*shell, script], env={**os.environ, "ALERT_WEBHOOK_URL": url}, check=True)
    assert yaml.safe_load(made.read_text())["receivers"][0]["webhook_configs"][0]["url"] == url


@pytest.fixture
def active(tool: Callable[[str], str], deploy: Path, tmp_path: Path) -> Iterator[Callable[..., set[tuple[str, str]]]]:
    """active(("EmbeddingX", {"severity": "ticket"}), ...) are name and severity of those alerts that are not muted."""
    from tools.stack import call, wait

    with alertmanager(tool, deploy / "alertmanager" / "alertmanager.yml", tmp_path) as url:

        def loud() -> list[dict[str, str]]:
            seen = json.loads(call(f"{url}/api/v2/alerts"))
            return [alert["labels"] for alert in seen if not alert["status"]["inhibitedBy"]]

        def send(*alerts: Alert) -> set[tuple[str, str]]:
            post(url, *alerts)
            # Alertmanager looks at alerts in the order in which they came: once one of these mutes the other, it has
            # looked at all before.
            post(url, *((name, {"instance": "last"}) for name in COLLAPSE[:2]))
            last = [("EmbeddingCompleteCollapse", "last")]
            assert wait(
                lambda: [(it["alertname"], it["instance"]) for it in loud() if it["instance"] == "last"] == last, 120
            )
            return {(labels["alertname"], labels["severity"]) for labels in loud() if labels["instance"] != "last"}

        yield send


Active = Callable[..., set[tuple[str, str]]]


def test_a_broken_model_is_one_page_and_the_monitor_keeps_its_voice(active: Active) -> None:
    tickets = [(f"Embedding{name}", TICKET) for name in ("TrafficShifted", "TrafficNarrowed", "MonitorDropping")]
    hour = [(name, TICKET) for name in COLLAPSE]
    loud = active(("EmbeddingModelFault", {}), *((name, {}) for name in COLLAPSE), *hour, *tickets)
    assert loud == {("EmbeddingModelFault", "page"), ("EmbeddingMonitorDropping", "ticket")}


@pytest.mark.parametrize("severity", ["page", "ticket"])
def test_a_collapse_is_one_notification(active: Active, severity: str) -> None:
    loud = active(*((name, {"severity": severity}) for name in COLLAPSE))
    assert loud == {("EmbeddingCompleteCollapse", severity)}


def test_the_hour_says_nothing_beside_what_is_said_of_now(active: Active) -> None:
    loud = active(
        ("EmbeddingDirectionsDied", {}), ("EmbeddingDirectionsDied", TICKET), ("EmbeddingCompleteCollapse", TICKET)
    )
    assert loud == {("EmbeddingDirectionsDied", "page")}


def test_a_ticket_mutes_no_page(active: Active) -> None:
    loud = active(
        ("EmbeddingCompleteCollapse", TICKET), ("EmbeddingDirectionsDied", {}), ("EmbeddingTrafficShifted", TICKET)
    )
    assert loud == {("EmbeddingDirectionsDied", "page")}


@pytest.mark.parametrize("other", [OTHER, {"revision": "s"}])
def test_one_replica_or_revision_mutes_no_other(active: Active, other: dict[str, str]) -> None:
    alerts = [("EmbeddingCompleteCollapse", {}), ("EmbeddingDirectionsDied", other)]
    assert active(*alerts) == {("EmbeddingCompleteCollapse", "page"), ("EmbeddingDirectionsDied", "page")}


def test_an_incident_on_two_replicas_is_one_call(tool: Callable[[str], str], deploy: Path, tmp_path: Path) -> None:
    from tools.stack import wait

    calls: list[dict[str, Any]] = []

    class Webhook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            calls.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    receiver = HTTPServer(("127.0.0.1", 0), Webhook)
    threading.Thread(target=receiver.serve_forever, daemon=True).start()
    text = (deploy / "alertmanager" / "alertmanager.yml").read_text()
    configuration = tmp_path / "alertmanager.yml"
    for shipped, here in (
        ("http://alert-webhook-url.invalid/", f"http://127.0.0.1:{receiver.server_port}/"),
        ("group_wait: 10s", "group_wait: 4s"),
        ("group_wait: 1m", "group_wait: 4s"),
    ):
        assert shipped in text
        text = text.replace(shipped, here)
    configuration.write_text(text)
    try:
        with alertmanager(tool, configuration, tmp_path) as url:
            everything = [(name, place) for name in ("EmbeddingModelFault", *COLLAPSE) for place in ({}, OTHER)]
            post(
                url, *everything, ("EmbeddingMonitorStale", TICKET), ("EmbeddingInsufficientData", {"severity": "info"})
            )
            assert wait(lambda: len(calls) == 2, 120)
            assert not wait(lambda: len(calls) > 2, 2)
    finally:
        receiver.shutdown()
        receiver.server_close()
    told = {call["groupLabels"]["severity"]: [a["labels"] for a in call["alerts"]] for call in calls}
    assert {(labels["alertname"], labels["instance"]) for labels in told["page"]} == {
        ("EmbeddingModelFault", "a:8000"),
        ("EmbeddingModelFault", "b:8000"),
    }
    assert [labels["alertname"] for labels in told["ticket"]] == ["EmbeddingMonitorStale"]


@pytest.mark.parametrize(("severity", "receiver"), [("page", "webhook"), ("ticket", "webhook"), ("info", "nobody")])
def test_who_is_told(tool: Callable[[str], str], deploy: Path, severity: str, receiver: str) -> None:
    configuration = deploy / "alertmanager" / "alertmanager.yml"
    command = [tool("amtool"), "config", "routes", "test", f"--config.file={configuration}", f"severity={severity}"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == receiver
