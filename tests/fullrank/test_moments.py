import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from fullrank import Moments, merge
from fullrank.measures import effective_rank, minimum_rows, numerical_rank
from fullrank.merging import Merging
from fullrank.moments import pool


def rows_of(n, d, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + rng.standard_normal(d)


def unbiased_by_enumeration(x):
    """The traces as averages over tuples of four distinct rows: the definition of the U-statistic."""
    squared = product = count = 0.0
    for i, j, k, m in itertools.permutations(range(len(x)), 4):
        a, b = x[i] - x[j], x[k] - x[m]
        squared += (a @ a) * (b @ b) / 4
        product += (a @ b) ** 2 / 4
        count += 1
    return squared / count, product / count


def test_unbiased_traces_are_the_u_statistics():
    x = np.random.default_rng(1).standard_exponential((9, 3))
    squared, product = unbiased_by_enumeration(x)
    traces = Moments(3).add(x).traces()
    assert traces.trace_squared == pytest.approx(squared)
    assert traces.square_trace == pytest.approx(product)


@pytest.mark.parametrize("shift", [None, [3.0, -2.0, 0.5, 1.0, 7.0]])
def test_matches_numpy(shift):
    x = rows_of(100, 5)
    m = Moments(5, shift)
    for part in np.array_split(x, 7):
        m.add(part)
    assert m.count == 100
    np.testing.assert_allclose(m.mean(), x.mean(0))
    np.testing.assert_allclose(m.covariance(), np.cov(x, rowvar=False), atol=1e-12)
    fourth = (np.square(x - x.mean(0)).sum(1) ** 2).sum() / 99
    assert m.traces().fourth == pytest.approx(fourth)


@given(st.lists(st.integers(0, 60), max_size=4), st.integers(0, 5), st.booleans())
@settings(max_examples=25)
def test_any_sharding_and_order_gives_the_same(cuts, seed, shifted):
    x = rows_of(60, 4, seed)
    whole = Moments(4, np.ones(4)).add(x)
    parts = [Moments(4, np.full(4, i) if shifted else None).add(p) for i, p in enumerate(np.split(x, sorted(cuts)))]
    for order in (parts, parts[::-1]):
        total = merge(order)
        assert total.count == whole.count
        np.testing.assert_allclose(total.covariance(), whole.covariance(), rtol=1e-10, atol=1e-12)
        assert total.participation_ratio() == pytest.approx(whole.participation_ratio(), rel=1e-9)


@given(st.integers(0, 20), st.floats(1e-6, 1e6))
@settings(max_examples=20)
def test_ranks_ignore_rotation_and_scale(seed, scale):
    x = rows_of(400, 6, seed)
    q = np.linalg.qr(np.random.default_rng(seed).standard_normal((6, 6)))[0]
    a, b = Moments(6).add(x), Moments(6).add(scale * x @ q)
    assert b.participation_ratio() == pytest.approx(a.participation_ratio(), rel=1e-8)
    assert b.effective_rank() == pytest.approx(a.effective_rank(), rel=1e-8)


@given(st.integers(32, 1500), st.sampled_from([8, 64, 200]), st.integers(0, 5))
@settings(max_examples=30)
def test_isotropic_reads_d_at_every_n_above_the_minimum(n, d, seed):
    # Fewer rows than dimensions among them. The estimate's own deviation is about 2 / n of d.
    torch.manual_seed(seed)
    ratio = Moments(d).add(torch.randn(n, d)).participation_ratio()
    assert ratio == pytest.approx(d, rel=12 / n + 0.02)


@given(st.integers(64, 1500), st.sampled_from([1, 8, 40]), st.integers(0, 5))
@settings(max_examples=30)
def test_rank_k_reads_k_at_every_n_above_the_minimum(n, k, seed):
    torch.manual_seed(seed)
    frame = torch.linalg.qr(torch.randn(128, k)).Q
    moments = Moments(128).add(torch.randn(n, k) @ frame.T)
    assert moments.participation_ratio() == pytest.approx(k, rel=12 / n + 0.02)
    rank = moments.effective_rank()
    assert (math.isnan(rank) and n < 2 * minimum_rows([1.0] * k)) or rank == pytest.approx(k, rel=0.05)
    assert numerical_rank(torch.linalg.eigvalsh(moments.covariance())) == k


@pytest.mark.parametrize("law", ["isotropic", "inverse", "exponential"])
def test_effective_rank_is_within_three_percent_where_it_is_given(law):
    d = 64
    i = torch.arange(1, d + 1, dtype=torch.float64)
    values = {"isotropic": torch.ones(d).double(), "inverse": 1 / i, "exponential": torch.exp(-i / 8)}[law]
    given_at = []
    for n in (64, 128, 256, 1024):
        torch.manual_seed(n)
        ranks = [Moments(d).add(torch.randn(n, d).double() * values.sqrt()).effective_rank() for _ in range(40)]
        if not any(map(math.isnan, ranks)):
            given_at.append(n)
            assert np.mean(ranks) == pytest.approx(effective_rank(values), rel=0.03)
    assert 1024 in given_at
    assert math.isnan(Moments(d).add(torch.randn(63, d)).effective_rank())


def test_effective_rank_corrects_for_heavy_tails():
    d, n = 64, 1024
    torch.manual_seed(0)
    chi = torch.distributions.Chi2(10.0)
    ranks = [Moments(d).add(torch.randn(n, d) / (chi.sample((n, 1)) / 10).sqrt()).effective_rank() for _ in range(10)]
    assert np.mean(ranks) == pytest.approx(d, rel=0.005)


def test_effective_rank_is_nan_where_the_correction_is_large():
    torch.manual_seed(0)
    assert math.isnan(Moments(128).add(torch.randn(128, 128)).effective_rank())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype):
    torch.manual_seed(0)
    x = torch.randn(500, 8).to(dtype)
    np.testing.assert_allclose(Moments(8).add(x).covariance(), np.cov(x.double().numpy(), rowvar=False), atol=1e-6)


def test_a_mean_a_million_times_the_spread_is_harmless():
    torch.manual_seed(0)
    x = torch.randn(1000, 16, dtype=torch.float64)
    for shift in (None, np.zeros(16), np.full(16, 0.999e6)):
        m = Moments(16, shift)
        for part in (x + 1e6).split(100):
            m.add(part)
        np.testing.assert_allclose(m.covariance(), x.T.cov(), atol=5e-3 if shift is not None else 1e-7)


def test_float32_rows_with_a_large_mean_do_not_lose_the_spread():
    torch.manual_seed(0)
    x = (torch.randn(1000, 16, dtype=torch.float64) + 1e4).float()
    eigenvalues = torch.linalg.eigvalsh(Moments(16).add(x).covariance())
    np.testing.assert_allclose(eigenvalues, torch.linalg.eigvalsh(x.double().T.cov()), rtol=1e-5)


def test_degenerate_rows_are_defined():
    assert math.isnan(Moments(3).participation_ratio())
    assert Moments(3).mean().isnan().all()
    one = Moments(3).add(np.ones((1, 3)))
    assert one.covariance().isnan().all()
    assert math.isnan(one.participation_ratio())
    for constant in (np.ones((100, 3)), np.zeros((100, 3))):
        m = Moments(3).add(constant)
        assert m.participation_ratio() == 0.0
        assert m.effective_rank() == 0.0
    assert Moments(3).add(np.ones((0, 3))).count == 0
    assert math.isnan(Moments(3).add(rows_of(31, 3)).participation_ratio())


def test_nonfinite_and_overflowing_rows_are_counted_and_left_out():
    x = rows_of(100, 3).astype(np.float32)
    bad = x.copy()
    bad[3, 0], bad[50, 2], bad[99, 1] = np.nan, np.inf, 1e30
    m = Moments(3).add(bad)
    assert (m.count, m.nonfinite) == (97, 3)
    np.testing.assert_allclose(m.covariance(), np.cov(np.delete(x, [3, 50, 99], 0), rowvar=False), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("d", [4, 150])
def test_leaving_a_part_out_is_never_having_added_it(d):
    parts = [Moments(d).add(rows_of(50 + i, d, i) + i) for i in range(3)]
    for left, traces in enumerate(pool(parts).without):
        rest = merge(part for i, part in enumerate(parts) if i != left)
        assert traces.count == rest.count
        assert traces.participation_ratio == pytest.approx(rest.participation_ratio(), rel=1e-9)
        assert traces.kurtosis == pytest.approx(rest.traces().kurtosis, rel=1e-9)
    alone = Moments(d).add(rows_of(50, d))
    assert math.isnan(pool([alone]).without[0].participation_ratio)


def test_constant_rows_have_no_rank_whatever_they_are_shifted_by():
    rows = np.random.default_rng(0).standard_normal((1, 16)).repeat(500, 0)
    for shift in (None, np.zeros(16), np.full(16, 0.3)):
        moments = Moments(16, shift)
        for part in np.array_split(rows, 7):
            moments.add(part)
        assert moments.participation_ratio() == moments.effective_rank() == 0.0


def test_survives_safetensors():
    for m in (Moments(4), Moments(4).add(rows_of(50, 4))):
        again = Moments.from_tensors(load(save(m.tensors())))
        whole = merge([m, Moments(4).add(rows_of(40, 4, 1))])
        assert merge([again, Moments(4).add(rows_of(40, 4, 1))]).participation_ratio() == whole.participation_ratio()
        assert again.count == m.count


@pytest.mark.parametrize("name", ["shift", "sum", "scatter", "cubic", "scalars"])
def test_damaged_tensors_are_refused_by_name(name):
    tensors = Moments(4).add(rows_of(50, 4)).tensors()
    for damage in ({}, {name: torch.zeros(2, 2, 2)}, {name: tensors[name] * math.nan}):
        damaged = {k: v for k, v in tensors.items() if k != name} | damage
        with pytest.raises(ValueError, match=name if name != "sum" else "moments"):
            Moments.from_tensors(damaged)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.zeros((4, 5)), "rows: expected width 3, got 5"),
        (np.zeros(3), "rows: expected two dimensions"),
        (np.zeros((2, 3), dtype=np.int64), "rows: expected a floating dtype, got int64"),
    ],
)
def test_bad_rows_are_named(rows, message):
    with pytest.raises(ValueError, match=message):
        Moments(3).add(rows)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="dimension"):
        Moments(0)
    with pytest.raises(ValueError, match="shift"):
        Moments(3, [1.0])
    with pytest.raises(ValueError, match="dimension 3, got 4"):
        Moments(3).merge(Moments(4))
    with pytest.raises(ValueError, match="nothing"):
        merge([])


@pytest.mark.parametrize("d", [1, 2, 5, 64, 65, 130])
def test_packed_moments_are_the_same_moments(d):
    whole = Moments(d).add(rows_of(40, d))
    state = load(save(whole.tensors(packed=True)))
    assert "scatter" not in state
    assert len(state["triangle"]) == d * (d + 1) // 2
    again = Moments.from_tensors(state)
    upper = whole.scatter.triu()
    assert torch.equal(again.scatter, upper + upper.triu(1).T)
    assert (again.count, again.quartic) == (whole.count, whole.quartic)
    for damage in (state["triangle"][1:], state["triangle"] * math.inf):
        with pytest.raises(ValueError, match="triangle"):
            Moments.from_tensors(state | {"triangle": damage})


@pytest.mark.parametrize("shifts", ["one", "unlike", "mixed"])
def test_merging_packed_moments_one_by_one_is_merging_them(shifts):
    d = 12
    parts = [
        Moments(d, np.ones(d) if shifts == "one" or (shifts == "mixed" and i % 2) else None).add(rows_of(30 + i, d, i))
        for i in range(5)
    ]
    merging = Merging(d)
    for part in [*parts, Moments(d)]:
        merging.add(load(save(part.tensors(packed=shifts != "mixed" or part.count % 3 > 0))))
    found, expected = merging.total(), merge(parts)
    assert (merging.parts, found.count) == (6, expected.count)
    torch.testing.assert_close(found.mean(), expected.mean())
    torch.testing.assert_close(found.covariance(), expected.covariance())
    assert found.traces().square_trace == pytest.approx(expected.traces().square_trace)


def test_merging_refuses_what_is_no_moments_and_keeps_the_rest():
    d = 6
    good = Moments(d, np.zeros(d)).add(rows_of(50, d))
    merging = Merging(d)
    merging.add(good.tensors(packed=True))
    for bad, says in [
        (good.tensors(packed=True) | {"cubic": torch.full((d,), math.nan)}, "finite"),
        ({"sum": torch.zeros(d)}, "missing"),
        (Moments(d + 1).add(rows_of(9, d + 1)).tensors(packed=True), "dimension"),
    ]:
        with pytest.raises(ValueError, match=says):
            merging.add(bad)
    assert merging.total().count == 50
