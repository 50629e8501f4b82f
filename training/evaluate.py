"""Measures a representation: its kNN accuracy and its spectrum, embedded by the path that serves it."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fullrank import Moments, measures
from models.artifact import Artifact
from models.embedder import Embedder, normalize
from models.engines import Name
from training.data import DataError, Images, ImageSet
from training.probe import LEAST_ROWS, few_labels, linear_probe

NEIGHBOURS = 20
TEMPERATURE = 0.07
CURVE = 32
CHUNK = 256
LABEL_SHARES = {"one_percent": 0.01, "ten_percent": 0.1}


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
    (Wu et al., Instance Discrimination, CVPR 2018, section 3.4). Rows without a label, -1, neither vote nor count.
    Raises ValueError if the bank has fewer than k rows.
    """
    bank, bank_labels = labelled_rows(bank, bank_labels)
    queries, labels = labelled_rows(queries, labels)
    named = torch.cat([classes for classes, _ in nearest_classes(bank, bank_labels, queries, k, temperature)])
    return int((named == labels).sum()) / len(queries)


def has_labels(labels: Tensor, least: int = 1) -> bool:
    """Whether at least so many of the labels (n,) are known, that is not -1."""
    return int((labels >= 0).sum()) >= least


def labelled_rows(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The rows (n, d) and labels (n,) whose label is known."""
    known = labels >= 0
    return (rows, labels) if bool(known.all()) else (rows[known], labels[known])


def nearest_classes(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, k: int = NEIGHBOURS, temperature: float = TEMPERATURE
) -> Iterator[tuple[Tensor, Tensor]]:
    """For some queries after others: (n,) the class that the vote of `knn_accuracy` names, and (n, k) the nearest rows.

    Raises ValueError if the bank has fewer than k rows.
    """
    if len(bank) < k:
        raise ValueError(f"the bank has {len(bank)} rows; {k} neighbours need at least {k}")
    bank = normalize(bank)
    classes = int(bank_labels.max()) + 1
    for rows in torch.split(normalize(queries), 512):
        similarity, index = (rows @ bank.T).topk(k, dim=1)
        votes = torch.zeros(len(rows), classes, device=rows.device)
        votes.scatter_add_(1, bank_labels[index], (similarity / temperature).exp())
        yield votes.argmax(dim=1), index


@dataclass(frozen=True)
class Spectrum:
    """The spectrum of L2-normalised rows, centred on their own mean: how many dimensions they use, how much they vary.

    rankme is of the centred rows' singular values. std_ratio is the mean standard deviation of a dimension times
    sqrt(d): 1 for an isotropic cloud and 0 for a point. The participation ratio is not biased by n; where the rows are
    too few for that, it is that of the sample's eigenvalues, so that a log holds no NaN, which JSON has not.
    """

    rows: int
    dimension: int
    effective_rank: float
    rankme: float
    participation_ratio: float
    std_ratio: float
    total_variance: float
    eigenvalues: Tensor
    """(d,) of the covariance, descending."""

    @classmethod
    def of(cls, rows: Tensor) -> "Spectrum":
        """(n, d) -> the spectrum of the rows' covariance after L2 normalisation, centred on their own mean."""
        unit = normalize(rows.float())
        moments = Moments(rows.shape[1])
        moments.add(unit)
        eigenvalues = measures.spectrum(moments.covariance())
        ratio = moments.participation_ratio()
        return cls(
            rows=len(rows),
            dimension=rows.shape[1],
            effective_rank=measures.effective_rank(eigenvalues),
            rankme=measures.rankme(eigenvalues.sqrt()),
            participation_ratio=ratio if math.isfinite(ratio) else measures.participation_ratio(eigenvalues),
            std_ratio=measures.std_ratio(unit),
            total_variance=float(eigenvalues.sum()),
            eigenvalues=eigenvalues,
        )

    def summary(self) -> dict[str, float | int]:
        return {
            "dimension": self.dimension,
            "effective_rank": round(self.effective_rank, 2),
            "rankme": round(self.rankme, 2),
            "participation_ratio": round(self.participation_ratio, 2),
            "std_ratio": round(self.std_ratio, 4),
            "total_variance": round(self.total_variance, 4),
        }

    def curve(self) -> dict[str, list[int] | list[float]]:
        """The eigenvalues at a few dozen ranks, logarithmically spaced from 1 to d."""
        spaced = torch.logspace(0, math.log10(self.dimension), CURVE, dtype=torch.float64)
        ranks = sorted(set(spaced.round().int().tolist()))
        return {"ranks": ranks, "eigenvalues": [float(f"{self.eigenvalues[rank - 1]:.4g}") for rank in ranks]}


@torch.no_grad()
def embed(
    embedder: Embedder, images: Images, progress: Callable[[int], None] = lambda images: None
) -> tuple[Tensor, Tensor]:
    """Embed a set, in memory or on disk, by the path that serves files: (n, d) representations and (n,) labels.

    Raises DataError if none of the images can be decoded.
    """
    rows: list[Tensor] = []
    labels: list[Tensor] = []
    for chunk in images.chunks(embedder.card.preprocessing):
        labels.append(chunk.labels)
        for part in torch.split(chunk.images, CHUNK):
            rows.append(embedder.embed_arrays(part))
            progress(len(part))
    if not rows:
        raise DataError(f"none of the {len(images)} images can be decoded: is this the folder?")
    return torch.cat(rows), torch.cat(labels)


def evaluate(
    artifact: Artifact,
    train: Images,
    test: Images,
    device: str = "cpu",
    probes: bool = False,
    engine: Name = "auto",
) -> dict[str, Any]:
    """kNN of the served embedding (bank: `train`, queries: `test`) and the spectrum of the test set's embeddings.

    `probes` adds linear probes on all labels and, stratified, on 1 % and 10 % of them, top-1 and top-5. Of images
    without labels it measures the spectrum only.
    """
    embedder = Embedder(artifact, device, engine=engine)
    queries = embed(embedder, test)
    bank = embed(embedder, train) if has_labels(queries[1]) else queries
    labelled = has_labels(bank[1])
    if probes and not labelled:
        raise ValueError("these images have no labels to fit a probe to")
    return quality(*bank, *queries, labelled) | (probe_table(*bank, *queries) if probes else {})


def evaluate_pixels(train: Images, test: Images, probes: bool = False) -> dict[str, Any]:
    """The same measures of raw pixels in [0, 1], flattened, as a baseline. Raises ValueError for image files."""
    if not (isinstance(train, ImageSet) and isinstance(test, ImageSet)):
        raise ValueError("images of many sizes have no raw-pixel baseline")
    bank, queries = ((images.images.flatten(1).float() / 255, images.labels) for images in (train, test))
    return quality(*bank, *queries) | (probe_table(*bank, *queries) if probes else {})


def quality(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, labelled: bool = True
) -> dict[str, Any]:
    """kNN accuracy and spectrum of representations, as on an artifact's card. Without labels, the spectrum only."""
    summary: dict[str, Any] = {**Spectrum.of(queries).summary()}
    if not labelled:
        return {"rows": len(queries)} | summary
    knn = round(knn_accuracy(bank, bank_labels, queries, labels), 4)
    known = {"knn_bank": int((bank_labels >= 0).sum()), "knn_queries": int((labels >= 0).sum())}
    return {"knn": knn} | known | summary


def probe_table(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor) -> dict[str, float]:
    """Linear probes by L-BFGS: on all labels, and on a few of them if that leaves enough rows for a probe."""
    bank, bank_labels = labelled_rows(bank, bank_labels)
    queries, labels = labelled_rows(queries, labels)
    shares = {"linear": 1.0} | {f"linear_{name}": share for name, share in LABEL_SHARES.items()}
    table: dict[str, float] = {}
    for name, share in shares.items():
        chosen = few_labels(bank_labels, share)
        if len(chosen) < LEAST_ROWS:
            continue
        found = linear_probe(bank[chosen], bank_labels[chosen], queries, labels)
        table |= {f"{name}_top1": round(found.top1, 4), f"{name}_top5": round(found.top5, 4)}
    return table
