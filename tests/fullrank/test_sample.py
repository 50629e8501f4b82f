"""Neighbourhoods, units, Gaussianity and Wasserstein uniformity, beside plain second implementations."""

import math

import numpy as np
import pytest
import torch

from fullrank import gaussianity, neighbours
from fullrank.canary import CanaryReader
from fullrank.measures import wasserstein_uniformity
from fullrank.sample import GROUP_ROWS, SAMPLE_ROWS, joined, measure_sample, stuck_units, thinned, together


def cloud(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(rows):
    return rows / rows.norm(dim=1, keepdim=True)


def plain_neighbours(rows, k):
    z = unit(rows).numpy()
    return [
        set(sorted((j for j in range(len(z)) if j != i), key=lambda j: float(((z[i] - z[j]) ** 2).sum()))[:k])
        for i in range(len(z))
    ]


def test_neighbours_are_those_of_a_plain_search():
    rows, moved = cloud(40, 6), cloud(40, 6) + 0.5 * cloud(40, 6, 1)
    before, now = (neighbours.nearest(neighbours.squared_distances(it), 5) for it in (rows, moved))
    assert [set(row) for row in before.tolist()] == plain_neighbours(rows, 5)
    expected = np.mean(
        [len(a & b) / 5 for a, b in zip(plain_neighbours(rows, 5), plain_neighbours(moved, 5), strict=True)]
    )
    assert neighbours.overlap(before, now) == pytest.approx(expected)
    assert neighbours.overlap(before, before) == 1


def test_the_angle_to_the_nearest_row_is_that_of_a_plain_search():
    rows = cloud(41, 6)
    z = unit(rows).numpy()
    plain = [min(math.degrees(math.acos(float(z[i] @ z[j]))) for j in range(41) if j != i) for i in range(41)]
    assert neighbours.nearest_angle(rows) == pytest.approx(float(np.median(plain)))
    assert math.isnan(neighbours.nearest_angle(rows[:1]))


def test_rank_correlation_of_a_permutation_is_spearmans():
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randperm(50, generator=generator).double() for _ in range(2))
    expected = 1 - 6 * float((x - y).square().sum()) / (50 * (50**2 - 1))
    assert neighbours.rank_correlation(x.exp(), y**3) == pytest.approx(expected)
    assert neighbours.rank_correlation(x, -x) == pytest.approx(-1)
    assert math.isnan(neighbours.rank_correlation(x[:2], y[:2]))


def test_hubness_is_the_skewness_of_counts():
    rows = cloud(60, 30)
    counts = np.zeros(60)
    for row in plain_neighbours(rows, 10):
        counts[list(row)] += 1
    expected = ((counts - counts.mean()) ** 3).mean() / counts.std() ** 3
    assert neighbours.hubness(neighbours.squared_distances(rows)) == pytest.approx(expected)
    ring = torch.tensor([[math.cos(t), math.sin(t)] for t in np.arange(100) * 2 * math.pi / 100])
    assert abs(neighbours.hubness(neighbours.squared_distances(ring))) < 1  # rounding breaks ties at the tenth
    assert math.isnan(neighbours.hubness(neighbours.squared_distances(rows[:8])))


@pytest.mark.parametrize("dimension", [2, 5])
def test_bounds_of_the_local_dimension_cover_it(dimension):
    """On a sphere of that many dimensions, turned into 32."""
    frame = torch.linalg.qr(cloud(32, 32, 9)).Q[: dimension + 1]
    read = [
        neighbours.local_dimension(neighbours.squared_distances(cloud(512, dimension + 1, seed) @ frame))
        for seed in range(40)
    ]
    assert np.mean([it.lower <= dimension <= it.upper for it in read]) >= 0.9


def test_the_local_dimension_sees_a_curve_that_fills_all_directions():
    t = torch.rand(512, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    waves = torch.stack([f(2 * math.pi * k * t) for k in range(1, 9) for f in (torch.cos, torch.sin)], 1)
    sample = measure_sample(waves)
    assert sample.local_dimension.upper < 2
    assert float(torch.linalg.eigvalsh(unit(waves).T.cov()).min()) > 0.01  # full rank


def test_copies_do_not_count_for_the_local_dimension():
    rows = cloud(200, 4)
    copied = torch.cat((rows, rows + 1e-8 * cloud(200, 4, 1)))
    assert math.isnan(neighbours.local_dimension(neighbours.squared_distances(copied)).estimate)
    assert neighbours.copies(neighbours.squared_distances(copied)) == (1, 200)
    assert neighbours.copies(neighbours.squared_distances(rows)) == (0, 200)
    half = torch.cat((rows, rows[:100].float().double()))
    assert neighbours.copies(neighbours.squared_distances(half)) == (pytest.approx(200 / 300), 200)
    assert neighbours.copies(neighbours.squared_distances(torch.ones(50, 3))) == (1, 1)


def test_rows_collapsed_onto_a_line_are_no_copies():
    rows = torch.stack((torch.ones(512), cloud(512, 1)[:, 0].float() * 0.01), 1)
    assert neighbours.copies(neighbours.squared_distances(rows)).share < 0.5


@pytest.mark.parametrize("seed", [0, 1])
def test_epps_pulley_is_the_integral(seed):
    x = cloud(100, 1, seed)[:, 0] * 1.3 + 0.2
    t = torch.linspace(-8, 8, 20001, dtype=torch.float64)
    empirical = torch.exp(1j * t[:, None] * x).mean(1)
    integrand = (empirical - torch.exp(-(t**2) / 2)).abs() ** 2 * torch.exp(-(t**2) / 2)
    expected = 100 * float(torch.trapezoid(integrand, t))
    angles = x[:, None] * gaussianity.frequencies(x)
    got = float(gaussianity.epps_pulley(angles.cos().mean(0), angles.sin().mean(0), 100.0))
    assert got == pytest.approx(expected, rel=5e-3)


def test_gaussian_rows_of_any_covariance_read_low_and_clusters_high():
    gaussian = cloud(512, 16) @ cloud(16, 16, 1)
    centres = 8 * torch.eye(16, dtype=torch.float64)[torch.arange(512) % 2]
    slices = gaussianity.random_slices(16, 64, 0)
    assert gaussianity.slice_statistic(gaussian, slices) < 0.6
    assert gaussianity.slice_statistic(cloud(512, 16) + centres, slices) > 2
    assert math.isnan(gaussianity.slice_statistic(torch.ones(512, 16), slices))
    assert math.isnan(gaussianity.slice_statistic(gaussian[:20], slices))


def test_dead_and_saturated_units_are_counted():
    rows = cloud(400, 8).float()
    rows[:, 0] = 0
    rows[:, 1] = 3
    rows[:, 2] = rows[:, 2].clamp(min=2.2)  # a ReLU that is open in 1 % of the rows
    rows[:, 3] = rows[:, 3].clamp(max=-2.2)
    rows[:, 4] = rows[:, 4].clamp(min=0)  # a healthy one
    assert stuck_units(rows) == (2, 2)
    assert stuck_units(torch.ones(400, 5)) == (5, 0)


def test_answers_shared_by_different_inputs_are_counted():
    """Beside a plain double loop: rows that repeat with their input, near inputs, and rows without one."""
    rows, inputs = cloud(120, 8).float(), cloud(120, 5, 1).float()
    rows[10:20], inputs[10:20] = rows[:10].clone(), inputs[:10].clone()  # the same image again
    rows[20:30] = rows[:10].clone()  # one answer to another image
    rows[40], inputs[40] = rows[41].clone(), inputs[41] + 0.01
    rows[60] = rows[61].clone()
    inputs[60] = math.nan
    found = neighbours.shared_answers(neighbours.squared_distances(rows), neighbours.between(inputs), 0.1)
    known = [i for i in range(120) if i != 60]
    shared = [
        any(torch.equal(rows[i], rows[j]) and float((inputs[i] - inputs[j]).square().sum()) > 0.1 for j in known)
        for i in known
    ]
    assert sum(shared) == 30
    assert found == pytest.approx(sum(shared) / len(known))
    nothing = torch.full((120, 5), math.nan)
    assert math.isnan(neighbours.shared_answers(neighbours.squared_distances(rows), neighbours.between(nothing), 0.1))


@pytest.mark.parametrize("n", [0, 1, 3, 255])
def test_few_rows_say_nothing(n):
    sample = measure_sample(cloud(n, 4))
    assert sample.rows == n
    assert sample.dead_units is None
    assert math.isnan(sample.hubness)
    assert math.isnan(sample.local_dimension.estimate)


def test_samples_of_joined_groups_keep_each_groups_share():
    first, second = torch.zeros(GROUP_ROWS, 1), torch.ones(GROUP_ROWS, 1)
    both = joined(first, 3000, second, 1000)
    assert len(both) == GROUP_ROWS
    assert float(both.mean()) == pytest.approx(0.25)
    assert len(joined(first[:5], 5, second[:6], 6)) == 11
    everything = together([first, second[: GROUP_ROWS // 2], torch.zeros(0, 1)], [192, 64, 0])
    assert everything is not None
    assert float(everything.mean()) == pytest.approx(0.25, abs=0.01)
    assert together([], []) is None
    full = together([torch.zeros(GROUP_ROWS, 1)] * 20, [GROUP_ROWS] * 20)
    assert full is not None
    assert len(full) == SAMPLE_ROWS
    assert thinned(torch.arange(10.0)[:, None], 3).flatten().tolist() == [0, 4, 9]


def root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T


def test_wasserstein_uniformity_is_the_distance_of_two_gaussian_laws():
    a = cloud(6, 6)
    covariance, mean = a @ a.T / 20, cloud(1, 6, 2)[0] * 0.3
    other = torch.eye(6, dtype=torch.float64) / 6
    cross = root(root(other) @ covariance @ root(other))
    square = mean @ mean + (covariance + other - 2 * cross).trace()
    eigenvalues = torch.linalg.eigvalsh(covariance)
    assert wasserstein_uniformity(eigenvalues, float(mean @ mean)) == pytest.approx(math.sqrt(square))
    assert wasserstein_uniformity(torch.full((8,), 1 / 8)) == pytest.approx(0, abs=1e-7)
    assert wasserstein_uniformity(torch.zeros(8), 1.0) == pytest.approx(math.sqrt(2))
    assert math.isnan(wasserstein_uniformity(torch.tensor([math.nan, 1.0])))


def test_wasserstein_uniformity_of_a_sample_is_that_of_the_law():
    law = torch.arange(1, 33, dtype=torch.float64) ** -1.0
    law /= law.sum()
    read, plain = [], []
    for seed in range(60):
        values = torch.linalg.eigvalsh((cloud(160, 32, seed) * law.sqrt()).T.cov())
        read.append(wasserstein_uniformity(values, 0.0, 159))
        plain.append(wasserstein_uniformity(values))
    truth = wasserstein_uniformity(law)
    assert abs(np.mean(read) - truth) < 0.15 * abs(np.mean(plain) - truth)
    assert math.isnan(wasserstein_uniformity(torch.linalg.eigvalsh(cloud(20, 32).T.cov()), 0.0, 19))


def test_a_canary_is_read_in_degrees_and_in_neighbours():
    stored = unit(cloud(64, 16))
    reader = CanaryReader(stored.float())
    same = reader.read(3 * stored.float())
    assert same.angle_degrees < 1e-3
    assert (same.neighbours_overlap, same.distance_correlation) == (1, pytest.approx(1))
    aside = cloud(64, 16, 1)
    aside = unit(aside - (aside * stored).sum(1, keepdim=True) * stored)
    angle = math.radians(5)
    turned = reader.read(math.cos(angle) * stored + math.sin(angle) * aside)
    assert turned.angle_degrees == pytest.approx(5, abs=1e-3)
    assert turned.angle_median_degrees == pytest.approx(5, abs=1e-3)
    assert turned.cosine_min == pytest.approx(math.cos(angle), abs=1e-6)
    assert 0.5 < turned.neighbours_overlap < 1
    rotated = reader.read(stored @ torch.linalg.qr(cloud(16, 16, 4)).Q)
    assert rotated.angle_degrees > 60
    assert rotated.neighbours_overlap == 1  # a search among rows of the same model finds what it found


def test_a_canary_that_is_not_finite_or_small_has_no_neighbours():
    reader = CanaryReader(cloud(64, 16))
    broken = cloud(64, 16)
    broken[3] = math.nan
    assert math.isnan(reader.read(broken).cosine_min)
    assert math.isnan(reader.read(broken).neighbours_overlap)
    few = CanaryReader(cloud(5, 16)).read(cloud(5, 16))
    assert few.cosine_min == pytest.approx(1)
    assert math.isnan(few.neighbours_overlap)
