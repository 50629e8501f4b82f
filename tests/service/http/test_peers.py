"""A replica that is one of a fleet: what it answers from the collector, and a swap that has to reach its peers."""

from typing import Any

import pytest
from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily

from service.failures import ConflictError, UnreadyError
from tests.support.app import Start, error_of

pytestmark = pytest.mark.anyio


class Others:
    """Peers that answer, or do not."""

    def __init__(self, *, away: bool = False) -> None:
        self.away = away
        self.swaps = list[tuple[str, str, str | None]]()

    def _there(self) -> None:
        if self.away:
            raise UnreadyError("no_collector", "the collector does not answer", retry_after=5)

    async def metrics(self) -> list[Metric]:
        self._there()
        family = GaugeMetricFamily("fullrank_fleet_replicas", "Replicas", labels=["model"])
        family.add_metric(["alpha"], 3)
        return [family]

    async def spectrum(self, model: str | None) -> dict[str, Any]:
        self._there()
        return {"fleets": [], "replicas": [], "problems": [f"asked for {model}"]}

    async def swapped(self, name: str, gate: str, replaces: str | None) -> None:
        self.swaps.append((name, gate, replaces))
        if name == "beta":
            raise ConflictError(
                "swap_incomplete", "one swapped to beta, but two did not (no such encoder)", field="name"
            )


async def test_a_replica_answers_for_its_fleet(start: Start) -> None:
    async with start() as (client, service):
        error_of(await client.get("/spectrum?fleet=1"), 404, "no_fleet")
        own = (await client.get("/metrics")).text
        service.peers = Others()
        assert (await client.get("/spectrum?fleet=1&model=alpha")).json()["problems"] == ["asked for alpha"]
        assert (await client.get("/spectrum")).json()["model"] == "alpha"
        text = (await client.get("/metrics")).text
        assert 'fullrank_fleet_replicas{model="alpha"} 3.0' in text
        assert "fullrank_images_total" in own
        assert "fullrank_images_total" not in text
        opened = await client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
        assert opened.headers["content-type"].startswith("application/openmetrics-text")
        assert opened.text.endswith("# EOF\n")


async def test_without_the_collector_a_scrape_says_so_and_images_are_embedded(start: Start) -> None:
    async with start() as (client, service):
        service.peers = Others(away=True)
        for path in ("/metrics", "/spectrum?fleet=1"):
            answer = await client.get(path)
            error_of(answer, 503, "no_collector")
            assert answer.headers["retry-after"] == "5"
        assert (await client.get("/readyz")).status_code == 200


async def test_a_swap_reaches_the_peers_once_the_gate_let_it_pass(start: Start) -> None:
    async with start() as (client, service):
        others = Others()
        service.peers = others
        error_of(await client.post("/admin/encoders", json={"name": "collapsed"}), 409, "collapsed")
        assert others.swaps == []
        answer = await client.post("/admin/encoders", json={"name": "beta", "replaces": "alpha"})
        assert "two did not" in error_of(answer, 409, "swap_incomplete")["message"]
        assert others.swaps == [("beta", "enforce", "alpha")]
        assert service.current.name == "beta"
