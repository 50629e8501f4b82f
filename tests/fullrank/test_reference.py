import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from fullrank import Reference, SpectrumMonitor
from fullrank.calibration.enough import divided
from fullrank.reference import log_bands, merged_bands


def healthy(n, d=32, seed=0):
    torch.manual_seed(seed)
    scale = torch.arange(1, d + 1).float() ** -0.5
    return torch.randn(n, d) * scale + 0.3


@pytest.fixture(scope="module")
def reference():
    return Reference.build(
        healthy(4000), healthy(4000, seed=1), canary=healthy(40, seed=2), dtype="bfloat16", calibrate=False
    )


def test_describes_the_held_out_rows(reference):
    z = torch.nn.functional.normalize(healthy(4000, seed=1).double())
    covariance = z.T.cov()
    np.testing.assert_allclose(reference.mean, z.mean(0), atol=1e-6, rtol=1e-5)
    assert reference.total_variance == pytest.approx(float(covariance.trace()), rel=1e-5)
    assert reference.band_energy.sum() == pytest.approx(reference.total_variance)
    np.testing.assert_allclose(reference.eigenvalues, torch.linalg.eigvalsh(covariance).flip(0), rtol=1e-3, atol=1e-8)
    assert reference.bands == (1, 2, 4, 8, 16, 32)
    assert reference.rows == 4000
    assert (reference.dimension, reference.numerical_rank) == (32, 32)


def test_basis_is_orthonormal_and_of_the_other_rows(reference):
    np.testing.assert_allclose(reference.basis.T @ reference.basis, torch.eye(32), atol=1e-12)
    z = torch.nn.functional.normalize(healthy(4000).double())
    energies = (reference.basis.T @ z.T.cov() @ reference.basis).diag()
    assert (energies.diff() <= 1e-9).all()


def test_survives_safetensors(reference):
    again = Reference.from_tensors(load(save(reference.tensors())))
    for name in ("mean", "basis", "band_energy", "eigenvalues", "canary"):
        np.testing.assert_allclose(getattr(again, name), getattr(reference, name), rtol=0, atol=0)
    for name in ("bands", "rows", "dtype", "participation_ratio", "effective_rank", "total_variance"):
        assert getattr(again, name) == getattr(reference, name)


def test_without_a_canary_it_survives_too():
    bare = Reference.build(healthy(100), healthy(100, seed=1), calibrate=False)
    assert Reference.from_tensors(bare.tensors()).canary is None


def test_dead_units_do_not_get_a_band_of_their_own():
    rows = healthy(2000)
    rows[:, 10:] = 0
    reference = Reference.build(rows[:1000], rows[1000:], calibrate=False)
    assert reference.bands == (1, 2, 4, 8, 32)
    assert (reference.band_energy > 1e-4).all()
    assert reference.numerical_rank == 10


def test_bands_end_in_the_dimension():
    assert log_bands(1) == (1,)
    assert log_bands(6) == (1, 2, 4, 6)
    assert log_bands(256) == (1, 2, 4, 8, 16, 32, 64, 128, 256)
    assert merged_bands(torch.tensor([0.0, 0.0, 0.0, 0.0]), 1e-9) == (4,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": None}, "'mean' is missing"),
        ({"basis": torch.zeros(3, 3)}, "basis has shape"),
        ({"bands": torch.tensor([1, 2])}, "bands must rise to the dimension 32"),
        ({"band_energy": torch.full((6,), float("nan"))}, "band_energy is not finite"),
        ({"canary": torch.zeros(4, 3)}, "canary has shape"),
        ({"band_energy": torch.zeros(6)}, "band_energy and total_variance must be above 0"),
        ({"total_variance": torch.zeros(1)}, "band_energy and total_variance must be above 0"),
        (
            {"inputs.mean": torch.zeros(1), "inputs.basis": torch.ones(1, 1), "inputs.bands": torch.tensor([1])}
            | {"inputs.band_energy": torch.zeros(1)},
            "inputs.band_energy must be above 0",
        ),
        ({"dtype": torch.tensor(list(b"int8"), dtype=torch.uint8)}, "dtype 'int8'"),
    ],
)
def test_damaged_tensors_are_refused_by_name(reference, change, message):
    tensors = {k: v for k, v in (reference.tensors() | change).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        Reference.from_tensors(tensors)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="held_out_rows: expected width 32, got 16"):
        Reference.build(healthy(100), healthy(100, d=16), calibrate=False)
    with pytest.raises(ValueError, match="basis_rows: expected at least 32 finite rows, got 5"):
        Reference.build(healthy(5), healthy(100), calibrate=False)
    with pytest.raises(ValueError, match="canary: expected width 32"):
        Reference.build(healthy(100), healthy(100), canary=healthy(3, d=4), calibrate=False)
    with pytest.raises(ValueError, match="canary: expected one finite row"):
        Reference.build(healthy(100), healthy(100), canary=torch.full((2, 32), float("nan")), calibrate=False)
    with pytest.raises(ValueError, match="dtype 'complex'"):
        Reference.build(healthy(100), healthy(100), dtype="complex", calibrate=False)
    with pytest.raises(ValueError, match="canary: expected one finite row"):
        Reference.build(healthy(100), healthy(100), canary=healthy(0), calibrate=False)
    with pytest.raises(ValueError, match="labels: expected 2100, one a row, got 3"):
        Reference.build(healthy(2100), labels=[0.0, 1.0, 2.0])
    with pytest.raises(ValueError, match="labels: expected a class for each row, got NaN"):
        Reference.build(healthy(2100), labels=np.where(np.arange(2100) % 2, np.nan, 1.0))


@pytest.mark.parametrize("rows", [torch.ones(2100, 32), torch.zeros(2100, 32), 1 + 1e-9 * healthy(2100).double()])
def test_rows_that_are_one_point_make_no_reference(rows):
    """Every statistic compared with them would be divided by 0."""
    for calibrate in (True, False):
        with pytest.raises(ValueError, match=r"held_out_rows: all rows are one point.*has collapsed"):
            Reference.build(rows, calibrate=calibrate)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (np.ones((2100, 3)), "inputs: the descriptors do not vary"),
        (np.full((2100, 3), np.nan), "inputs: expected finite descriptors"),
        (healthy(2100, 3).double().numpy() * 1e200, "inputs: expected finite descriptors"),
        (np.ones((2100, 0)), "inputs: expected at least one column"),
    ],
)
def test_inputs_that_tell_nothing_are_refused_by_name(inputs, message):
    with pytest.raises(ValueError, match=message):
        Reference.build(healthy(2100), inputs=inputs)


def test_one_set_of_rows_is_divided_and_calibrated_and_says_how_far_it_is():
    rows, seen = healthy(2100), []
    labels = torch.arange(len(rows)) % 5
    made = Reference.build(
        rows, labels=labels, inputs=rows[:, :4], progress=lambda done, total: seen.append((done, total))
    )
    assert (made.basis_rows, made.rows) == (1050, 1050)
    assert made.calibration is not None
    assert made.inputs is not None
    counts, totals = zip(*seen, strict=True)
    assert list(counts) == sorted(set(counts))
    assert {counts[-1]} == set(totals)
    assert made.shortfall == ""


def test_as_many_rows_are_held_out_as_calibration_needs_where_there_are_few():
    first, held = divided(2000, 1280, seed=0)
    assert (len(first), len(held)) == (976, 1024)
    assert len(torch.cat((first, held)).unique()) == 2000
    first, held = divided(500, 1280, seed=0)
    assert (len(first), len(held)) == (250, 250)


def test_a_reference_of_few_rows_warns_and_calls_nothing_healthy():
    d = 256
    rows = torch.randn(2500, d, generator=torch.Generator().manual_seed(1)) * torch.arange(1, d + 1) ** -0.5
    with pytest.warns(UserWarning, match=r"50 and 50 rows of 256 dimensions.*each part needs 193, or .* divided 1217"):
        few = Reference.build(rows[:50], rows[50:100], calibrate=False)
    with SpectrumMonitor(d, few, clock=lambda: 0.0) as monitor:
        monitor.observe(rows[500:] * (torch.arange(d) % 2))
        assert monitor.flush(60)
        verdict = monitor.snapshot().verdict
    assert verdict.state != "healthy"
    with SpectrumMonitor(d, few, clock=lambda: 0.0) as monitor:
        monitor.observe(rows[500:])
        assert monitor.flush(60)
        verdict = monitor.snapshot().verdict
    assert verdict.state == "insufficient_data"
    assert "each part needs 193" in verdict.reason


def test_what_is_missing_is_said_of_the_sets_that_were_given():
    d = 128
    rows = torch.randn(1121, d, generator=torch.Generator().manual_seed(2))
    with pytest.warns(UserWarning, match="held out, and calibration needs 1024.*; build it from 1121 rows or more"):
        Reference.build(rows[:-1])
    with pytest.warns(UserWarning, match="1023 rows are held out, and calibration needs 1024.*; hold out 1024 or more"):
        Reference.build(rows[:98], rows[98:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Reference.build(rows[:97], rows[97:]).calibration is not None
        assert Reference.build(rows).calibration is not None


def test_files_of_before_the_schema_load_and_later_ones_are_refused(reference):
    tensors = reference.tensors()
    old = {name: tensor for name, tensor in tensors.items() if name not in ("schema_version", "basis_rows")}
    assert Reference.from_tensors(old).basis_rows == 0
    assert Reference.from_tensors(old).shortfall == ""
    assert Reference.from_tensors(tensors).basis_rows == 4000
    with pytest.raises(ValueError, match=r"schema_version is .2.*upgrade"):
        Reference.from_tensors(tensors | {"schema_version": torch.tensor([2])})
