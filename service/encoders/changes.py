"""The differences between an encoder's folder and the encoder in service, in words."""

from models.artifact import Artifact
from models.card import GRAPH, WEIGHTS

COMPARED = ("weights", "graph", "architecture", "preprocessing", "reference")


def changes(before: Artifact, now: Artifact) -> list[str]:
    """The entries of COMPARED that differ between two artifacts."""
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
