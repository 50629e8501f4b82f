"""What of an encoder's folder differs from what is in service, in words."""

from models.artifact import Artifact
from models.card import GRAPH, WEIGHTS

COMPARED = ("weights", "graph", "architecture", "preprocessing", "reference")


def changes(before: Artifact, now: Artifact) -> list[str]:
    """Which of COMPARED differ between two artifacts."""
    parts = [
        (
            it.card.files[WEIGHTS],
            it.card.files.get(GRAPH),
            it.card.architecture,
            it.card.preprocessing,
            it.card.files.get("reference.safetensors"),
        )
        for it in (before, now)
    ]
    return [name for name, old, new in zip(COMPARED, *parts, strict=True) if old != new]
