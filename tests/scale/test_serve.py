"""The application for Ray Serve, as far as it needs no cluster: its arguments, and when it wants more replicas."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from pydantic import ValidationError

from scale.ray_actors import PENDING, PendingImages

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
