"""Which actors of a Ray cluster get shards, where a process dies before it has loaded the encoder."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray", reason="pip install 'fullrank-server[ray]'")

import ray.exceptions

from scale.bulk import BulkError, Written
from scale.ray_bulk import Crew
from scale.sources import Shard

SHARDS = [Shard(f"s{index}", "tar", (f"{index}.tar",)) for index in range(5)]


class Actor:
    """Calls of an actor whose process lives, or died at its start: a reference is what a call gives or raises."""

    def __init__(self, lives: bool) -> None:
        self.prepare = SimpleNamespace(remote=lambda: (self, "host" if lives else ray.exceptions.RayActorError()))
        self.embed = SimpleNamespace(remote=lambda shard: (self, Written(shard.name, 1, 0, 0.0)))


class Cluster:
    """The calls of Ray that a crew makes, answered in their order."""

    exceptions = ray.exceptions

    def wait(self, references: Sequence[Any], **_: object) -> tuple[list[Any], list[Any]]:
        assert references, "Ray refuses to wait for nothing"
        return [references[-1]], list(references[:-1])

    def get(self, reference: tuple[Actor, Any]) -> Any:
        if isinstance(reference[1], Exception):
            raise reference[1]
        return reference[1]


@pytest.mark.parametrize("lives", [(True, False), (False, True), (False, False, True)])
def test_the_others_embed_what_a_dead_one_would_have(lives: tuple[bool, ...]) -> None:
    done: list[Written] = []
    Crew(Cluster(), [Actor(it) for it in lives], done.append, pytest.fail).embed(SHARDS)
    assert sorted(it.name for it in done) == [it.name for it in SHARDS]


def test_a_crew_of_which_nobody_lives_is_an_error() -> None:
    with pytest.raises(BulkError, match=r"every process died 4 times as it loaded the encoder.*fewer --processes"):
        Crew(Cluster(), [Actor(False), Actor(False)], pytest.fail, pytest.fail).embed(SHARDS)
