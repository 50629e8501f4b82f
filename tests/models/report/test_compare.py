"""The comparison of two encoders, against scipy, numpy and cases whose answer is known."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from models.report.compare import Comparison, cosines, differ_only_in, nearest, overlap, spearman

GENERATOR = torch.Generator().manual_seed(0)
ROWS = torch.randn(60, 8, generator=GENERATOR)


def test_spearman_is_scipys_with_ties() -> None:
    rng = np.random.default_rng(1)
    for first, second in ((rng.integers(0, 9, 200), rng.integers(0, 9, 200)), (rng.random(99), rng.random(99))):
        found = spearman(torch.from_numpy(first).double(), torch.from_numpy(second).double())
        assert found == pytest.approx(spearmanr(first, second).statistic, abs=1e-12)
    assert np.isnan(spearman(torch.ones(5), torch.arange(5.0)))


def test_neighbours_are_those_of_a_plain_loop() -> None:
    units = (ROWS / ROWS.norm(dim=1, keepdim=True)).numpy()
    near = nearest(cosines(ROWS), 5)
    for i in range(len(ROWS)):
        others = sorted((j for j in range(len(ROWS)) if j != i), key=lambda j: -float(units[i] @ units[j]))
        assert near[i].tolist() == others[:5]


def test_overlap_counts_what_both_lists_have() -> None:
    first, second = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), torch.tensor([[4, 3, 9, 8], [1, 2, 3, 4]])
    assert overlap(first, second).tolist() == [0.5, 0.0]


def test_a_rotation_changes_nothing_and_noise_everything() -> None:
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=GENERATOR)).Q
    same = Comparison.of(ROWS @ rotation * 3, ROWS)
    assert same.overlaps[10].estimate == 1
    assert same.distances.estimate == pytest.approx(1, abs=1e-6)
    other = Comparison.of(torch.randn(60, 8, generator=GENERATOR), ROWS)
    assert other.overlaps[10].lower <= 10 / 59 <= other.overlaps[10].upper  # what chance alone gives
    assert other.distances.lower <= 0 <= other.distances.upper


def test_the_image_that_moved_is_first() -> None:
    moved = ROWS.clone()
    moved[17] = -moved[17]
    found = Comparison.of(moved, ROWS)
    assert found.moved[0] == 17
    assert found.kept[17] < 0.5 < float(found.kept.mean())


def test_pairs_that_only_a_dead_direction_told_apart() -> None:
    rows = torch.cat([ROWS, ROWS[:4]])
    rows[:, 0] = 4
    rows[60:, 0] = -4  # twins of the first four, but for one direction
    dead = rows.clone()
    dead[:, 0] = 0
    twins = {(i, 60 + i) for i in range(4)}
    assert {tuple(sorted(it)) for it in Comparison.of(dead, rows).told.tolist()} == twins
    pairs, shares = differ_only_in(rows, torch.eye(8)[:, :1], 4)
    assert {tuple(sorted(it)) for it in pairs.tolist()} == twins
    assert shares.tolist() == pytest.approx([1.0] * 4)
