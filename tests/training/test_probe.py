"""Linear probes against closed forms, an independent solver and plain loops."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from training.probe import accuracy, few_labels, fit_ridge, fit_softmax, linear_probe, predict


def blobs(n: int, seed: int, classes: int = 3, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    centres = 3 * torch.randn(classes, 8, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (n,), generator=generator)
    return centres[labels] + spread * torch.randn(n, 8, generator=generator), labels


@pytest.mark.parametrize("protocol", ["lbfgs", "ridge"])
def test_separable_classes_are_told_apart_and_noise_is_not(protocol: str) -> None:
    train, test = blobs(600, 0, spread=0.3), blobs(300, 1, spread=0.3)
    assert linear_probe(*train, *test, protocol=protocol).top1 > 0.99  # type: ignore[arg-type]
    noise = torch.randn(300, 8, generator=torch.Generator().manual_seed(2))
    assert linear_probe(torch.randn(600, 8), train[1], noise, test[1], protocol=protocol).top1 < 0.55  # type: ignore[arg-type]


def test_lbfgs_finds_scipys_optimum_of_the_stated_objective() -> None:
    rows, labels = blobs(200, 0, spread=3.0)
    x, y, penalty = rows.double().numpy(), labels.numpy(), 0.01

    def objective(flat: np.ndarray) -> float:
        line = flat.reshape(9, 3)
        logits = x @ line[:-1] + line[-1]
        cross_entropy = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(y)), y]
        return float(cross_entropy.mean() + penalty / 2 * (line[:-1] ** 2).sum())

    best = minimize(objective, np.zeros(27), method="BFGS", tol=1e-10)
    line = fit_softmax(rows, labels, 3, penalty)
    assert objective(line.double().numpy().ravel()) == pytest.approx(best.fun, rel=1e-4)
    np.testing.assert_allclose(line[:-1].numpy(), best.x.reshape(9, 3)[:-1], atol=5e-3)


def test_ridge_without_penalty_is_least_squares() -> None:
    rows, labels = blobs(100, 0)
    padded = np.concatenate([rows.double().numpy(), np.ones((100, 1))], axis=1)
    expected, *_ = np.linalg.lstsq(padded, np.eye(3)[labels.numpy()], rcond=None)
    np.testing.assert_allclose(fit_ridge(rows, labels, 3, 0.0).numpy(), expected, atol=1e-4)


def test_an_affine_map_of_the_features_changes_little() -> None:
    train, test = blobs(500, 0, spread=2.0), blobs(500, 1, spread=2.0)
    plain = linear_probe(*train, *test).top1
    scale = torch.logspace(-3, 3, 8)
    moved = linear_probe(train[0] * scale + 5, train[1], test[0] * scale + 5, test[1]).top1
    assert 0.5 < plain < 0.999
    assert moved == pytest.approx(plain, abs=0.01)


def test_accuracy_counts_first_and_first_five() -> None:
    logits = torch.arange(7.0).expand(4, 7)
    found = accuracy(logits, torch.tensor([6, 2, 1, 0]))
    assert (found.top1, found.top5) == (0.25, 0.5)
    assert accuracy(logits[:, :3], torch.tensor([2, 0, 0, 0])) == (0.25, 1.0)


def test_few_labels_are_a_share_of_every_class() -> None:
    labels = torch.tensor([0] * 200 + [1] * 1000 + [2] * 30)
    picked = few_labels(labels, 0.01)
    assert labels[picked].bincount().tolist() == [2, 10, 1]
    assert len(picked.unique()) == len(picked)
    assert not torch.equal(picked, few_labels(labels, 0.01, seed=1))


def test_what_a_probe_cannot_do_is_said() -> None:
    rows, labels = blobs(100, 0)
    with pytest.raises(ValueError, match="at least 20"):
        linear_probe(rows[:5], labels[:5], rows, labels)
    with pytest.raises(ValueError, match="test label 9"):
        linear_probe(rows, labels, rows[:1], torch.tensor([9]))


def test_logits_are_rows_times_weights_plus_bias() -> None:
    line = torch.tensor([[1.0, 0.0], [0.0, 2.0], [10.0, 20.0]])
    assert predict(line, torch.tensor([[3.0, 4.0]])).tolist() == [[13.0, 28.0]]
