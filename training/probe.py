"""Linear probes: the accuracy of a linear classifier on frozen representations.

There are three ways to fit it. `lbfgs` minimises the softmax cross entropy to its optimum. `ridge` has a closed form
and costs one solve. `training.finetune.supervised` is the papers' SGD over augmented images. The strength of the
penalty is chosen on a tenth of the training rows; the test rows are only scored.
"""

from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

Protocol = Literal["lbfgs", "ridge"]
PENALTIES = (1e-6, 1e-4, 1e-2)
HELD_OUT = 10
"""One training row in this many chooses the penalty."""
LEAST_ROWS = 2 * HELD_OUT


class Accuracy(NamedTuple):
    """Shares in [0, 1] of rows whose label is the first guess, and among the first five."""

    top1: float
    top5: float


def linear_probe(
    train_h: Tensor,
    train_y: Tensor,
    test_h: Tensor,
    test_y: Tensor,
    *,
    protocol: Protocol = "lbfgs",
    seed: int = 0,
) -> Accuracy:
    """Fit a linear classifier to (n, d) representations and labels (n,) int64, and score it on the test rows.

    Rows may lie on any device; features are standardised by the training rows' mean and deviation. ValueError when
    there are too few training rows to hold some out, or when a test label never occurs in training.
    """
    classes = int(train_y.max()) + 1 if len(train_y) else 0
    if len(train_h) < LEAST_ROWS:
        raise ValueError(f"{len(train_h)} training rows; a probe needs at least {LEAST_ROWS}")
    if int(test_y.max()) >= classes:
        raise ValueError(f"test label {int(test_y.max())} does not occur among the training labels 0..{classes - 1}")
    fit = {"lbfgs": fit_softmax, "ridge": fit_ridge}[protocol]
    mean = train_h.float().mean(0)
    std = train_h.float().std(0)
    # A dimension without variance holds no information. Division by its rounding noise would make noise a feature.
    scale = torch.where(std > 1e-6 * std.max(), 1 / std.clamp_min(1e-30), 0.0)
    train, test = ((h.float() - mean) * scale for h in (train_h, test_h))
    order = torch.randperm(len(train), generator=Generator().manual_seed(seed)).to(train.device)
    chosen, rest = order[: len(order) // HELD_OUT], order[len(order) // HELD_OUT :]

    def held_out(penalty: float) -> float:
        line = fit(train[rest], train_y[rest], classes, penalty)
        return accuracy(predict(line, train[chosen]), train_y[chosen]).top1

    best = max(PENALTIES, key=held_out)
    return accuracy(predict(fit(train, train_y, classes, best), test), test_y)


def fit_softmax(rows: Tensor, labels: Tensor, classes: int, penalty: float, iterations: int = 100) -> Tensor:
    """(d + 1, classes): the minimiser of the mean cross entropy + penalty / 2 |W|^2; the last row is the free bias.

    L-BFGS with a strong Wolfe line search, in float32 where the rows are.
    """
    line = torch.zeros(rows.shape[1] + 1, classes, device=rows.device, requires_grad=True)
    solver = torch.optim.LBFGS([line], max_iter=iterations, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(predict(line, rows), labels) + penalty / 2 * line[:-1].square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        solver.step(closure)  # type: ignore[no-untyped-call]
    return line.detach()


def fit_ridge(rows: Tensor, labels: Tensor, classes: int, penalty: float) -> Tensor:
    """(d + 1, classes): the least-squares line to one-hot labels, (X'X / n + penalty I)^-1 X'Y / n, in float64."""
    x = rows.double()
    mean = x.mean(0)
    targets = F.one_hot(labels, classes).double()
    centred = x - mean
    gram = centred.T @ centred / len(x)
    gram.diagonal().add_(penalty)
    weights = torch.linalg.solve(gram, centred.T @ targets / len(x))
    return torch.cat([weights, (targets.mean(0) - mean @ weights).unsqueeze(0)]).float()


def predict(line: Tensor, rows: Tensor) -> Tensor:
    """(d + 1, classes), (n, d) -> logits (n, classes)."""
    return rows @ line[:-1] + line[-1]


def accuracy(logits: Tensor, labels: Tensor) -> Accuracy:
    """(n, classes), (n,) -> top-1 and top-5; with five classes or fewer top-5 is 1."""
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels.unsqueeze(1)
    return Accuracy(float(ranked[:, 0].float().mean()), float(ranked.any(dim=1).float().mean()))


def few_labels(labels: Tensor, share: float, seed: int = 0) -> Tensor:
    """Indices of a `share` in (0, 1] of the rows, as many of each class as the share gives, at least one each."""
    generator = Generator().manual_seed(seed)
    picked = []
    for label in labels.unique():  # type: ignore[no-untyped-call]
        of_class = (labels == label).nonzero().flatten()
        keep = max(1, round(share * len(of_class)))
        picked.append(of_class[torch.randperm(len(of_class), generator=generator)[:keep].to(of_class.device)])
    return torch.cat(picked)
