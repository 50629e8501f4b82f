"""One incident, one page: the shipped configuration in a real Alertmanager, given alerts over its API."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

IDENTITY = {"job": "fullrank", "instance": "a:8000", "model": "m", "revision": "r"}


@pytest.fixture
def active(tool: Callable[[str], str], deploy: Path, tmp_path: Path) -> Iterator[Callable[..., set[str]]]:
    """active("EmbeddingX", EmbeddingY={"instance": "b"}) are the names of those alerts that are not muted."""
    from deploy.demo.stack import call, free_port, process, wait

    binary = shutil.which("prometheus-alertmanager") or tool("alertmanager")  # Debian's name, upstream's name
    url = f"http://127.0.0.1:{free_port()}"
    command = [binary, f"--config.file={deploy / 'alertmanager' / 'alertmanager.yml'}", f"--storage.path={tmp_path}"]
    command += [f"--web.listen-address={url.removeprefix('http://')}", "--cluster.listen-address="]

    def send(*names: str, **changes: dict[str, str]) -> set[str]:
        labels = dict.fromkeys(names, IDENTITY) | {name: IDENTITY | change for name, change in changes.items()}
        call(f"{url}/api/v2/alerts", [{"labels": {"alertname": name, **values}} for name, values in labels.items()])
        assert wait(lambda: len(json.loads(call(f"{url}/api/v2/alerts"))) == len(labels), 5)
        alerts = json.loads(call(f"{url}/api/v2/alerts"))
        return {alert["labels"]["alertname"] for alert in alerts if not alert["status"]["inhibitedBy"]}

    with process(command, tmp_path / "alertmanager.log", f"{url}/-/ready"):
        yield send


def test_narrow_traffic_mutes_the_rank_that_falls_with_it(active: Callable[..., set[str]]) -> None:
    assert active("EmbeddingTrafficNarrowed", "EmbeddingRankCollapse") == {"EmbeddingTrafficNarrowed"}


def test_a_broken_model_is_one_page_and_the_monitor_keeps_its_voice(active: Callable[..., set[str]]) -> None:
    everything = ("CompleteCollapse", "DimensionalCollapse", "RankCollapse", "TrafficShifted", "MonitorDropping")
    names = [f"Embedding{name}" for name in ("ModelFault", *everything)]
    assert active(*names) == {"EmbeddingModelFault", "EmbeddingMonitorDropping"}


def test_a_collapse_is_one_page(active: Callable[..., set[str]]) -> None:
    names = [f"Embedding{name}" for name in ("CompleteCollapse", "DimensionalCollapse", "RankCollapse")]
    assert active(*names) == {"EmbeddingCompleteCollapse"}


@pytest.mark.parametrize("other", [{"instance": "b:8000"}, {"revision": "s"}])
def test_one_replica_or_revision_mutes_no_other(active: Callable[..., set[str]], other: dict[str, str]) -> None:
    names = {"EmbeddingTrafficNarrowed", "EmbeddingRankCollapse"}
    assert active("EmbeddingTrafficNarrowed", EmbeddingRankCollapse=other) == names
