import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fullrank import Moments, measures

spectra = st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=40)
RANKS = [measures.effective_rank, measures.participation_ratio, measures.stable_rank, measures.rankme]


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("k", [1, 3, 64])
def test_k_equal_eigenvalues_read_k(rank, k):
    # RankMe's published epsilon moves it by d * 1e-7 * ln.
    assert rank([2.5] * k + [0.0] * (64 - k)) == pytest.approx(k, rel=2e-4)


def test_ranks_of_a_known_spectrum():
    values = [0.5, 0.25, 0.25]
    assert measures.effective_rank(values) == pytest.approx(2**1.5)
    assert measures.participation_ratio(values) == pytest.approx(1 / 0.375)
    assert measures.stable_rank(values) == pytest.approx(2.0)
    assert measures.condition_number(values) == pytest.approx(2.0)
    assert [measures.variance_dimensions(values, s) for s in (0.5, 0.75, 0.76, 1.0)] == [1, 2, 3, 3]


ROWS = [measures.mean_cosine, measures.std_ratio, lambda rows: float(measures.log_spectrum(rows)[0])]


@pytest.mark.parametrize("measure", ROWS)
def test_measures_of_rows_ignore_scale_order_and_dtype_and_know_bad_input(measure):
    rows = np.random.default_rng(0).normal(size=(40, 60)) + 0.3  # fewer rows than dimensions
    assert math.isfinite(measure(rows))
    assert measure(1e30 * rows[::-1]) == pytest.approx(measure(rows))
    assert measure(torch.from_numpy(rows).half()) == pytest.approx(measure(rows), abs=2e-3)
    assert math.isfinite(measure(rows + 1e6)) or measure(rows + 1e6) == -math.inf
    for bad in (math.nan, math.inf):
        broken = rows.copy()
        broken[3, 5] = bad
        assert math.isnan(measure(broken))
    for wrong, message in ((rows[0], "two dimensions"), (rows.astype(np.int64), "floating dtype, got int64")):
        with pytest.raises(ValueError, match=f"rows: expected .*{message}|rows: expected a {message}"):
            measure(wrong)


def test_measures_of_rows_that_do_not_vary():
    for rows in (np.ones((50, 8)), np.zeros((50, 8))):
        assert measures.std_ratio(rows) == pytest.approx(0.0, abs=1e-12)
        assert float(measures.log_spectrum(rows)[0]) < -60
    assert measures.mean_cosine(np.ones((50, 8))) == pytest.approx(1.0)
    assert measures.mean_cosine(np.zeros((50, 8))) == 0.0
    assert math.isnan(measures.std_ratio(np.ones((1, 8))))
    with pytest.raises(ValueError, match="at least 2"):
        measures.log_spectrum(np.ones((1, 8)))


def test_entropy_of_shares_not_of_squares():
    # 1/i spectrum of 512: the two measures that both get called effective rank.
    values = 1 / torch.arange(1, 513, dtype=torch.float64)
    assert measures.effective_rank(values) == pytest.approx(117, abs=1)
    assert measures.rankme(values.sqrt()) == pytest.approx(410, abs=1)


@given(spectra, st.floats(1e-200, 1e200))
@settings(max_examples=30)
def test_ranks_ignore_scale_and_order_and_stay_within_bounds(values, scale):
    moved = [v * scale for v in reversed(values)]
    for rank in (measures.effective_rank, measures.participation_ratio, measures.stable_rank):
        assert rank(moved) == pytest.approx(rank(values), rel=1e-9)
        assert 1 - 1e-9 <= rank(values) <= len(values) + 1e-9


@given(spectra)
@settings(max_examples=50)
def test_ranks_fall_as_trailing_dimensions_are_removed(values):
    values = sorted(values, reverse=True)
    for rank in RANKS:
        ranks = [rank(values[:k] + [0.0] * (len(values) - k)) for k in range(1, len(values) + 1)]
        assert all(less <= more * (1 + 1e-9) for less, more in pairwise(ranks))


@given(spectra, st.integers(0, 1000))
@settings(max_examples=25)
def test_ranks_are_those_of_the_matrix_however_it_is_turned(values, seed):
    d = len(values)
    turn = np.linalg.qr(np.random.default_rng(seed).standard_normal((d, d)))[0]
    turned = np.linalg.eigvalsh(turn @ np.diag(values) @ turn.T)
    for rank in (*RANKS, measures.condition_number, lambda v: measures.variance_dimensions(v, 0.9)):
        assert rank(turned) == pytest.approx(rank(values), rel=1e-6)


@given(spectra)
@settings(max_examples=25)
def test_ranks_are_what_their_definitions_say(values):
    p = np.array(values) / np.sum(values)
    sigma = np.sqrt(values) / np.sum(np.sqrt(values)) + 1e-7
    naive = (np.exp(-(p * np.log(p)).sum()), 1 / (p**2).sum(), 1 / p.max(), np.exp(-(sigma * np.log(sigma)).sum()))
    for rank, expected in zip(RANKS[:3], naive[:3], strict=True):
        assert rank(values) == pytest.approx(expected)
    assert measures.rankme(np.sqrt(values)) == pytest.approx(naive[3])
    for share in (0.5, 0.9, 0.99):
        cumulative = np.cumsum(sorted(p, reverse=True))
        k = measures.variance_dimensions(values, share)
        assert cumulative[k - 1] >= share - 1e-9
        assert k == 1 or cumulative[k - 2] < share


@pytest.mark.parametrize("rank", RANKS)
def test_degenerate_spectra_are_defined(rank):
    assert rank([0.0, 0.0]) == 0.0
    assert math.isnan(rank([math.nan, 1.0]))
    assert rank(np.array([4.0, 4.0], dtype=np.float16)) == pytest.approx(2, rel=1e-5)
    assert rank([1.0, -1e-18]) == pytest.approx(1, rel=1e-5)
    with pytest.raises(ValueError, match="one dimension"):
        rank([[1.0, 2.0]])


def test_the_noise_floor_takes_a_dtype_its_name_or_tf32():
    assert measures.noise_floor("bfloat16", 64) == measures.noise_floor(torch.bfloat16, 64) == 2.0**-14 / 64
    assert measures.noise_floor("tf32", 64, 4.0) == 2.0**-20 / 16
    for unknown in ("int8", "fp8", torch.int32):
        with pytest.raises(ValueError, match="dtype: expected a torch floating dtype or 'tf32'"):
            measures.noise_floor(unknown, 64)


def test_numerical_rank_respects_the_floor():
    values = [1.0] * 10 + [1e-5] * 6 + [0.0] * 16
    assert measures.numerical_rank(values) == 16
    assert measures.numerical_rank(values, measures.noise_floor(torch.bfloat16, 1)) == 10
    assert measures.numerical_rank([0.0] * 4) == 0
    assert measures.numerical_rank([math.nan, 1.0]) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [4, 32])
def test_a_collapsed_encoder_rounded_to_a_short_dtype_still_reads_collapsed(dtype, k):
    torch.manual_seed(0)
    d = 128
    rows = torch.randn(2000, k) @ torch.randn(k, d)
    rounded = torch.nn.functional.normalize(rows).to(dtype).double()
    eigenvalues = torch.linalg.eigvalsh(rounded.T.cov())
    if dtype == torch.bfloat16:  # half precision's own noise is below what float32 sums leave
        assert measures.numerical_rank(eigenvalues) > 100
    assert measures.numerical_rank(eigenvalues, measures.noise_floor(dtype, d)) == k


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.7])
def test_alpha_req_recovers_the_exponent(alpha):
    fit = measures.alpha_req(torch.arange(1, 201, dtype=torch.float64) ** -alpha)
    assert fit.exponent == pytest.approx(alpha)
    assert fit.r_squared == pytest.approx(1.0)
    assert (fit.first, fit.last) == (4, 100)


def test_alpha_req_is_weighted_least_squares_on_the_positive_part_of_its_range():
    rng = np.random.default_rng(0)
    values = np.sort(np.arange(1, 41) ** -1.2 * np.exp(rng.normal(0, 0.3, 40)))[::-1]
    fit = measures.alpha_req([*values, *[0.0] * 90])
    x, y, root = np.log(np.arange(4, 41)), np.log(values[3:]), np.arange(4, 41) ** -0.5
    slope, _ = np.polyfit(x, y, 1, w=root)
    assert fit.exponent == pytest.approx(-slope)
    assert 0.5 < fit.r_squared < 1
    assert (fit.first, fit.last) == (4, 40)


def test_figures_that_cannot_be_meant_are_named():
    ones = torch.ones(50)
    with pytest.raises(ValueError, match="first: expected a rank from 1 on, got -2"):
        measures.alpha_req(ones, -2, 50)
    assert math.isnan(measures.alpha_req(ones, 4, -1).exponent)
    with pytest.raises(ValueError, match="dimension: expected at least 1"):
        measures.noise_floor("float32", 0)
    for measure in (measures.entropy_correction, lambda values, rows: measures.wasserstein_uniformity(values, 0, rows)):
        with pytest.raises(ValueError, match="rows: expected degrees of freedom above 0, got 0"):
            measure(ones, 0)


def test_alpha_req_without_a_range_to_fit_is_nan():
    for values in ([1.0] * 5, [1.0] * 5 + [0.0] * 40, [math.nan, *[1.0] * 40]):
        assert math.isnan(measures.alpha_req(values).exponent)


def test_mean_cosine_is_the_mean_over_pairs():
    rows = np.random.default_rng(0).normal(size=(20, 7)) + 0.5
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    pairs = (unit @ unit.T)[~np.eye(20, dtype=bool)]
    assert measures.mean_cosine(rows) == pytest.approx(pairs.mean())
    assert measures.mean_cosine(np.ones((5, 3))) == pytest.approx(1.0)
    assert math.isnan(measures.mean_cosine(np.ones((1, 3))))


def test_std_ratio_is_one_for_isotropic_and_zero_for_a_point():
    torch.manual_seed(0)
    assert measures.std_ratio(torch.randn(4000, 64)) == pytest.approx(1.0, abs=0.01)
    assert measures.std_ratio(torch.ones(10, 64)) == pytest.approx(0.0, abs=1e-9)


def test_log_spectrum_is_that_of_the_covariance():
    rows = np.random.default_rng(0).normal(size=(50, 6))
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    expected = np.log(np.linalg.svd(np.cov(unit, rowvar=False))[1])
    np.testing.assert_allclose(measures.log_spectrum(rows).numpy(), expected)


def test_what_has_no_answer_says_so():
    broken = [math.nan, 1.0, 1.0]
    assert math.isnan(measures.condition_number(broken))
    assert measures.variance_dimensions(broken) == measures.variance_dimensions([0.0, 0.0]) == 0
    assert math.isnan(measures.entropy_correction(broken, 100))
    with pytest.raises(ValueError, match="eigenvalues: expected finite"):
        measures.minimum_rows(broken)
    for measure in (measures.condition_number, measures.alpha_req, measures.numerical_rank, measures.minimum_rows):
        with pytest.raises(ValueError, match="spectrum: expected one dimension"):
            measure([[1.0, 2.0]])


@pytest.mark.parametrize("share", [0.0, 1.1, math.nan])
def test_variance_dimensions_refuses_a_share_out_of_range(share):
    with pytest.raises(ValueError, match="share"):
        measures.variance_dimensions([1.0], share)


def test_condition_number_of_empty_directions():
    assert measures.condition_number([1.0, 0.0]) == math.inf
    assert math.isnan(measures.condition_number([0.0, 0.0]))


def naive_correction(values, n):
    p = np.array(values) / np.sum(values)
    h = -np.sum(p * np.log(p))
    pairs = 0.0
    for i in range(len(p)):
        for j in range(i):
            same = math.isclose(p[i], p[j], rel_tol=1e-12)
            pairs += p[i] if same else p[i] * p[j] * (math.log(p[i]) - math.log(p[j])) / (p[i] - p[j])
    return (pairs + 1 - np.sum(p**2 * (1 + 2 * h + 2 * np.log(p)))) / n


@given(st.lists(st.sampled_from([0.1, 0.5, 0.50000001, 1.0, 7.0]), min_size=2, max_size=8))
@settings(max_examples=40)
def test_entropy_correction_is_the_formula_also_at_equal_eigenvalues(values):
    assert measures.entropy_correction(values, 100) == pytest.approx(naive_correction(values, 100), rel=1e-6)


def test_entropy_correction_is_the_derivative_of_the_bias():
    # Against simulation, as no formula shares its derivation: mean plug-in entropy of Gaussian rows at large n.
    rng = np.random.default_rng(0)
    values, n, repeats = np.array([4.0, 2.0, 1.0, 0.5]), 100, 20000
    rows = rng.standard_normal((repeats, n, 4)) * np.sqrt(values)
    rows -= rows.mean(1, keepdims=True)
    eigenvalues = np.linalg.eigvalsh(rows.transpose(0, 2, 1) @ rows)
    p = eigenvalues / eigenvalues.sum(1, keepdims=True)
    entropies = -(p * np.log(p)).sum(1)
    truth = values / values.sum()
    bias = entropies.mean() + (truth * np.log(truth)).sum()
    error = entropies.std() / math.sqrt(repeats)
    assert -measures.entropy_correction(values, n - 1) == pytest.approx(bias, abs=4 * error + 0.02 * abs(bias))


@pytest.mark.parametrize("law", ["isotropic", "inverse", "exponential", "few"])
def test_the_effective_rank_is_given_from_about_the_minimum_of_rows(law):
    d = 64
    i = torch.arange(1, d + 1, dtype=torch.float64)
    laws = {"isotropic": torch.ones(d), "inverse": 1 / i, "exponential": torch.exp(-i / 8), "few": (i <= 4).double()}
    values = laws[law].double()
    least = measures.minimum_rows(values)
    assert least >= 64
    torch.manual_seed(0)

    def gates(n):
        return [math.isnan(Moments(d).add(torch.randn(n, d) * values.sqrt()).effective_rank()) for _ in range(10)]

    assert not any(gates(math.ceil(1.25 * least)))
    assert all(gates(int(0.7 * least)))


def test_the_minimum_of_rows_of_an_isotropic_law_is_a_multiple_of_its_dimension():
    assert measures.minimum_rows(torch.ones(512)) == pytest.approx(0.5 / math.log(1.15) * 512, rel=0.01)
    assert measures.minimum_rows(torch.ones(512), kurtosis=2.0) == pytest.approx(1 / math.log(1.15) * 512, rel=0.01)
    assert measures.minimum_rows([1.0, 0.0]) == measures.minimum_rows([0.0]) == 64
