"""The comparison of two encoders, against scipy, numpy and cases whose answer is known."""

import pytest
import torch
from scipy.spatial.distance import pdist
from scipy.stats import spearmanr

from fullrank.neighbours import nearest, overlap, squared_distances
from models.report.compare import Comparison, differ_only_in

GENERATOR = torch.Generator().manual_seed(0)
ROWS = torch.randn(60, 8, generator=GENERATOR)


def test_figures_are_the_librarys_and_scipys() -> None:
    other = ROWS + torch.randn(60, 8, generator=GENERATOR)
    found = Comparison.of(other, ROWS)
    distances = [pdist((it / it.norm(dim=1, keepdim=True)).numpy()) for it in (other, ROWS)]
    assert found.distances.estimate == pytest.approx(spearmanr(*distances).statistic, abs=1e-9)
    near = [nearest(squared_distances(it), 10) for it in (other, ROWS)]
    assert found.overlaps[10].estimate == pytest.approx(overlap(*near))
    assert float(found.kept.mean()) == pytest.approx(overlap(*near))
    assert found.overlaps[10].lower < found.overlaps[10].estimate < found.overlaps[10].upper


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
