"""The report of an import: what was kept, dropped and assumed."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from models.artifact import Artifact


@dataclass(frozen=True)
class Report:
    """The report of an import. It lists every tensor as kept or dropped, and every assumption."""

    family: str
    file: str
    sha256: str
    weights: str
    architecture: str
    parameters: int
    dimension: int
    kept: int
    dropped: dict[str, dict[str, Any]]
    assumed: dict[str, str]
    preprocessing: str
    preprocessing_from: str
    left_out: tuple[str, ...]
    licence: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, artifact: Artifact, left_out: tuple[str, ...], dropped: Mapping[str, str]) -> "Report":
        """The report of an artifact. dropped: why, by tensor. left_out: what a reader of pickles did not load."""
        card = artifact.card
        source = card.source
        assert source is not None
        how = card.preprocessing
        firsts: dict[str, dict[str, Any]] = {}
        for name, reason in dropped.items():
            entry = firsts.setdefault(reason, {"count": 0, "first": name})
            entry["count"] += 1
        weights = artifact.module.state_dict() if artifact.module is not None else artifact.graph.weights  # type: ignore[union-attr]
        return cls(
            family=source.family,
            file=source.file,
            sha256=source.sha256,
            weights=source.weights,
            architecture=card.architecture.named() if card.architecture is not None else "ONNX graph",
            parameters=sum(it.numel() for it in weights.values() if it.is_floating_point()),
            dimension=card.dimension,
            kept=source.kept,
            dropped=firsts,
            assumed=dict(source.assumed),
            preprocessing=f"{how.resize} to {how.target}, centre {how.size}, {how.interpolation}",
            preprocessing_from=source.preprocessing,
            left_out=left_out,
            licence=source.licence,
        )
