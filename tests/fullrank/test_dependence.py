"""Distance correlation, beside a plain second implementation, and what it says of answers and inputs."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist  # type: ignore[import-untyped]

from fullrank.dependence import LEAST_INPUTS, distance_correlation, input_correlation
from fullrank.neighbours import between, squared_distances
from fullrank.sample import measure_sample


def cloud(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain(first, second):
    """Székely & Rizzo 2013: U-centred matrices of distances and their inner products."""

    def centred(distances):
        n = len(distances)
        sums = distances.sum(0)
        found = distances - sums / (n - 2) - sums[:, None] / (n - 2) + distances.sum() / ((n - 1) * (n - 2))
        np.fill_diagonal(found, 0)
        return found

    a, b = centred(cdist(first, first)), centred(cdist(second, second))
    return (a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum())


def distances(points):
    return between(points).sqrt().fill_diagonal_(0)


def related(n, seed=0, share=0.5):
    """Points and others that follow them in part."""
    x = cloud(n, 6, seed)
    return x, share * x @ cloud(6, 9, 99) + cloud(n, 9, seed + 1)


def test_it_is_the_ratio_of_u_centred_products_and_its_bounds_leave_out_one_row_at_a_time():
    x, y = related(60)
    found = distance_correlation(distances(x), distances(y))
    assert found.estimate == pytest.approx(plain(x.numpy(), y.numpy()))
    left_out = [plain(np.delete(x.numpy(), i, 0), np.delete(y.numpy(), i, 0)) for i in range(60)]
    half = 1.96 * math.sqrt(59 * np.var(left_out))
    assert (found.lower, found.upper) == pytest.approx((found.estimate - half, found.estimate + half))


def test_it_is_1_for_the_same_points_turned_and_scaled_and_0_on_average_for_independent_ones():
    x = cloud(80, 6)
    turned = 3 * x @ torch.linalg.qr(cloud(6, 6, 1)).Q + 5
    assert distance_correlation(distances(x), distances(turned)).estimate == pytest.approx(1)
    # A curve that no covariance sees.
    assert distance_correlation(distances(x[:, :1]), distances(x[:, :1].square())).lower > 0.05
    found = [
        distance_correlation(distances(cloud(40, 3, 2 * i)), distances(cloud(40, 50, 2 * i + 1))) for i in range(200)
    ]
    estimates = np.array([it.estimate for it in found])
    assert abs(estimates.mean()) < 3 * estimates.std() / math.sqrt(len(estimates))


def test_the_bounds_hold_what_many_rows_give():
    """Beside the value on 3,000 rows, 95 % bounds of 120 rows: at least nine tenths of a hundred hold it."""
    x, y = related(3000)
    true = plain(x.numpy(), y.numpy())
    held = 0
    for part in torch.split(torch.arange(3000), 120)[:25]:
        found = distance_correlation(distances(x[part]), distances(y[part]))
        held += found.lower <= true <= found.upper
    assert held >= 22


def test_what_does_not_vary_or_is_too_little_is_not_known():
    x, y = related(40)
    still = torch.zeros(40, 40, dtype=torch.float64)
    assert math.isnan(distance_correlation(distances(x), still).estimate)
    assert math.isnan(distance_correlation(distances(x[:4]), distances(y[:4])).estimate)


def test_answers_of_other_requests_do_not_follow_their_inputs_and_copies_count_once():
    shown, rows = related(300, 5, 2.0)
    follow = input_correlation(squared_distances(rows), between(shown), 0.01)
    handed = input_correlation(squared_distances(rows.roll(1, 0)), between(shown), 0.01)
    assert follow.lower > 0.2
    assert handed.lower < 0 < handed.upper < 0.1
    # The same picture again and again changes nothing, whoever gets its answer.
    again = torch.cat((torch.arange(300), torch.zeros(150, dtype=torch.int64)))
    repeated = input_correlation(squared_distances(rows[again]), between(shown[again]), 0.01)
    assert repeated.estimate == pytest.approx(follow.estimate)
    few = torch.arange(300) % (LEAST_INPUTS - 1)
    assert math.isnan(input_correlation(squared_distances(rows), between(shown[few]), 0.01).estimate)


def test_rows_without_inputs_are_left_out_of_a_sample():
    shown, rows = related(400, 7)
    some = shown.clone()
    some[::4] = math.nan
    known = torch.arange(400) % 4 != 0
    found = measure_sample(rows, some, 0.01).input_correlation
    expected = input_correlation(squared_distances(rows[known]), between(shown[known]), 0.01)
    assert found.estimate == pytest.approx(expected.estimate)
    assert math.isnan(measure_sample(rows).input_correlation.estimate)
    assert math.isnan(measure_sample(rows, torch.full((400, 6), math.nan), 0.01).input_correlation.estimate)
