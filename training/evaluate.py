"""How good a representation is and how much of its space it uses, through the path that serves it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fullrank import Moments, measures
from models.artifact import Artifact
from models.embedder import Embedder, normalize
from training.data import SOURCES, ImageSet

NEIGHBOURS, TEMPERATURE = 20, 0.07


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    labels: Tensor,
    k: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> float:
    """Weighted k-nearest-neighbour top-1 accuracy in [0, 1] by cosine similarity.

    bank (m, d), queries (n, d); each of the k nearest votes exp(similarity / temperature)
    (Wu et al., Instance Discrimination, CVPR 2018, section 3.4). ValueError when the bank has fewer than k rows.
    """
    if len(bank) < k:
        raise ValueError(f"the bank has {len(bank)} rows; {k} neighbours need at least {k}")
    bank, classes, correct = normalize(bank), int(bank_labels.max()) + 1, 0
    for rows, truth in zip(torch.split(normalize(queries), 512), torch.split(labels, 512), strict=True):
        similarity, index = (rows @ bank.T).topk(k, dim=1)
        votes = torch.zeros(len(rows), classes, device=rows.device)
        votes.scatter_add_(1, bank_labels[index], (similarity / temperature).exp())
        correct += int((votes.argmax(dim=1) == truth).sum())
    return correct / len(queries)


@dataclass(frozen=True)
class Spectrum:
    """How many dimensions L2-normalised rows use, and how much they vary."""

    rows: int
    dimension: int
    effective_rank: float
    participation_ratio: float
    total_variance: float
    eigenvalues: Tensor
    """(d,) of the covariance, descending."""

    @classmethod
    def of(cls, rows: Tensor) -> "Spectrum":
        """(n, d) -> the spectrum of the rows' covariance after L2 normalisation, centred on their own mean."""
        moments = Moments(rows.shape[1])
        moments.add(normalize(rows.float()))
        covariance = torch.as_tensor(moments.covariance())
        eigenvalues = torch.linalg.eigvalsh(covariance).flip(0).clamp_(min=0)
        return cls(
            rows=len(rows),
            dimension=rows.shape[1],
            effective_rank=measures.effective_rank(eigenvalues),
            participation_ratio=moments.participation_ratio(),
            total_variance=float(eigenvalues.sum()),
            eigenvalues=eigenvalues,
        )

    def summary(self) -> dict[str, float | int]:
        return {
            "dimension": self.dimension,
            "effective_rank": round(self.effective_rank, 2),
            "participation_ratio": round(self.participation_ratio, 2),
            "total_variance": round(self.total_variance, 4),
        }


def evaluate(artifact: Artifact, train: ImageSet, test: ImageSet, device: str = "cpu") -> dict[str, Any]:
    """kNN of the served embedding (bank: `train`, queries: `test`) and the spectrum of the test set's embeddings."""
    embedder = Embedder(artifact, device)
    return _quality(embedder.embed_arrays(train.images), train.labels, embedder.embed_arrays(test.images), test.labels)


def evaluate_pixels(train: ImageSet, test: ImageSet) -> dict[str, Any]:
    """The same table's row for no encoder at all: raw pixels in [0, 1], flattened."""
    bank, queries = train.images.flatten(1).float() / 255, test.images.flatten(1).float() / 255
    return _quality(bank, train.labels, queries, test.labels)


def _quality(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor) -> dict[str, Any]:
    return {
        "knn": round(knn_accuracy(bank, bank_labels, queries, labels), 4),
        "knn_bank": len(bank),
        "knn_queries": len(queries),
        **Spectrum.of(queries).summary(),
    }


def load_data(name: str, folder: Path | None = None) -> tuple[ImageSet, ImageSet]:
    """(train, test) of a data set of `training.data.SOURCES`. Raises DataError."""
    source = SOURCES[name]
    root = folder or source.default
    return source.read(root, "train"), source.read(root, "test")
