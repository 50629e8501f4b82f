"""What a user would set a threshold on instead: simple detectors' scores of a window, higher is worse."""

import torch
from torch import Tensor

from benchmarks.detection.cases import Bench
from fullrank import measures


def rivals(bench: Bench, rows: Tensor) -> dict[str, float]:
    """Name -> score. The distance of means is what Evidently's embedding drift calls "distance"; the MMD has a Gaussian
    kernel of median width, on 2,000 rows."""
    healthy = bench.clean[:2000]
    sample = rows[:2000]
    half = len(healthy) // 2
    bandwidth = float((healthy[:half] - healthy[half : 2 * half]).square().sum(1).median())

    def kernel(a: Tensor, b: Tensor) -> float:
        return float((-torch.cdist(a, b).square() / bandwidth).exp().mean())

    return {
        "mean cosine": measures.mean_cosine(rows),
        "std": 1 - measures.std_ratio(rows),
        "distance": float((rows.mean(0) - bench.reference.mean.float()).norm()),
        "MMD": kernel(healthy, healthy) + kernel(sample, sample) - 2 * kernel(healthy, sample),
        "effective rank": 1 / measures.effective_rank(torch.linalg.eigvalsh(rows.T.cov())),
    }
