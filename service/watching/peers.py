"""What a replica asks of the others when it is one of a fleet. scale/serve.py implements it."""

from collections.abc import Iterable
from typing import Any, Protocol

from prometheus_client import Metric

from service.settings import Gate


class Peers(Protocol):
    """The other replicas. All methods raise UnreadyError while they cannot be reached."""

    async def metrics(self) -> Iterable[Metric]:
        """The metrics of all replicas, for one scrape."""

    async def spectrum(self, model: str | None) -> dict[str, Any]:
        """JSON-able: every replica's verdict, the fleet's for each encoder, and what is wrong with whom."""

    async def swapped(self, name: str, gate: Gate, replaces: str | None) -> None:
        """Have the others swap as this replica just did. Raises ConflictError that names those which did not."""


class Families:
    """Metric families in the place of a registry, for prometheus_client's encoders."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        """The families."""
        return self._families
