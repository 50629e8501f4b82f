"""The application for Ray Serve, as far as it needs no cluster: its arguments, and when it wants more replicas."""

import asyncio
import math
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily
from pydantic import ValidationError

from scale.ray_actors import PENDING, CollectorActor, PendingImages
from service.failures import UnreadyError

ROOT = Path(__file__).resolve().parents[2]
serve = pytest.importorskip("scale.serve", reason="pip install 'fullrank-server[ray]'")


@pytest.mark.parametrize(
    ("pending", "wanted"),
    [({}, 1), ({"one": 0.0}, 1), ({"one": 64.0}, 1), ({"one": 65.0}, 2), ({"one": 100.0, "two": 100.0}, 4)],
)
def test_replicas_are_wanted_for_pending_images(pending: dict[str, float], wanted: int) -> None:
    context = SimpleNamespace(aggregated_metrics={PENDING: pending} if pending else {})
    assert PendingImages(64)(context) == (wanted, {})


def test_a_misspelt_argument_is_named() -> None:
    with pytest.raises(ValidationError, match="max_replica\n"):
        serve.Arguments(max_replica=2)
    with pytest.raises(ValidationError, match=r"gpus\n"):
        serve.Arguments(gpus=-1)


def test_a_wrong_setting_is_named_before_anything_starts() -> None:
    with pytest.raises(ValueError, match="settings: encoderr: "):
        serve.app(serve.Arguments(settings={"encoderr": "x"}))
    with pytest.raises(ValueError, match="settings: device: "):
        serve.app(serve.Arguments(settings={"device": "warp"}))


def test_a_replica_has_the_threads_that_ray_gives_it() -> None:
    assert serve.settings_of({}, 3.0).threads == 3
    assert serve.settings_of({}, 0.5).threads == 1
    assert serve.settings_of({"threads": 2}, 8.0).threads == 2


def test_the_shipped_configuration_builds_a_deployment_that_scales() -> None:
    (application,) = yaml.safe_load((ROOT / "deploy" / "ray" / "fullrank.yaml").read_text())["applications"]
    assert application["import_path"] == "scale.serve:app"
    deployment = serve.app(serve.Arguments(**application["args"]))._bound_deployment
    config = deployment._deployment_config
    assert (config.autoscaling_config.min_replicas, config.autoscaling_config.max_replicas) == (1, 4)
    assert config.autoscaling_config.policy.policy_function == "scale.ray_actors.PendingImages"
    assert config.autoscaling_config.policy.policy_kwargs == {"target": 64}
    assert config.max_ongoing_requests == serve.settings_of({}, 1).max_pending_images
    fixed = serve.app(serve.Arguments(replicas=3, gpus=0.25))._bound_deployment
    assert fixed._deployment_config.num_replicas == 3
    assert fixed._deployment_config.autoscaling_config is None
    assert fixed.ray_actor_options == {"num_cpus": 1, "num_gpus": 0.25}


class Kept:
    """What Ray's store keeps, in this process."""

    def __init__(self) -> None:
        self._values = dict[str, bytes]()
        self.get, self.put, self.clear = self._values.get, self._values.__setitem__, self._values.clear


class Handle:
    """An actor's handle, as Ray gives one: the actor runs in this process, and can be killed."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self.dead = False

    def __getattr__(self, method: str) -> Any:
        async def call(*arguments: Any) -> Any:
            if self.dead:
                raise serve.ray.exceptions.RayActorError
            return await getattr(self._actor, method)(*arguments)

        return SimpleNamespace(remote=call)


def images_in(families: Iterable[Metric]) -> float:
    return next(it.samples[0].value for it in families if it.name == "images")


def test_a_collector_that_is_started_again_goes_on_with_what_was_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"one": 5, "two": 7, "gone": 3}
    kept: Any = Kept()
    handles = [Handle(CollectorActor(kept=kept))]

    def collector_of(_: Any) -> Handle:
        if handles[-1].dead:
            handles.append(Handle(CollectorActor(kept=kept)))
        return handles[-1]

    def metrics_of(service: Any) -> list[Metric]:
        return [CounterMetricFamily("images", "Images.", value=counts[service.name])]

    monkeypatch.setattr(serve, "collector_of", collector_of)
    monkeypatch.setattr(serve, "metrics_of", metrics_of)
    monkeypatch.setattr(serve, "serving", lambda service: [("alpha", "r1")])
    monkeypatch.setattr(serve, "watched_by", lambda *arguments: [])
    monkeypatch.setattr(serve.serve, "get_replica_context", lambda: None)

    async def scenario() -> None:
        settings = SimpleNamespace(windows=(300.0,), request_timeout=30.0)
        one, two, gone = (
            serve.Peers(SimpleNamespace(settings=settings, name=name), name, 0.5, "settings") for name in counts
        )
        for it in (one, two, gone, one, two):
            await it.report()
        await gone.report(last=True)
        assert images_in(await one.metrics()) == 15
        handles[-1].dead = True
        with pytest.raises(UnreadyError, match="does not answer"):
            await one.metrics()
        with pytest.raises(UnreadyError, match="was started again and has not heard of two yet"):
            await one.metrics()
        assert "has not heard of two yet" in (await one.spectrum(None))["problems"][0]
        counts["two"] = 8
        await two.catch_up()  # by the old handle: it notices that the collector is gone
        await two.catch_up()
        assert images_in(await one.metrics()) == 16
        assert images_in(await two.metrics()) == 16
        # The replica that answered the last scrape ends with the collector, and the sum does not fall.
        handles[-1].dead = True
        await one.catch_up()
        await one.catch_up()
        collector = handles[-1]._actor._collector
        monkeypatch.setattr(collector, "_awaited", {"two": (15.0, -math.inf)})  # as if fifteen seconds had passed
        assert images_in(await one.metrics()) == 16
        # A swap begins with the orders that replicas know, also at a collector that is new.
        handles[-1].dead = True
        with pytest.raises(UnreadyError, match="swap again"):
            await one.swapped("beta", "enforce", None)
        assert len(handles) == 3

    asyncio.run(scenario())
    assert len(handles) == 3
