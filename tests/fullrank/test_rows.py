"""Arrays as users have them: any strides, either byte order, read-only, and lengths that only float64 holds."""

import warnings

import numpy as np
import pytest
import torch

from fullrank import Moments, SpectrumMonitor, measures
from fullrank.rows import as_tensor, unit

ROWS = np.random.default_rng(0).normal(size=(40, 8))


def locked(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.setflags(write=False)
    return array


ARRAYS = {
    "strides": np.repeat(ROWS, 2, axis=1)[:, ::2],
    "rows backwards": ROWS[::-1],
    "columns backwards": ROWS[:, ::-1],
    "Fortran order": np.asfortranarray(ROWS),
    "big-endian": ROWS.astype(">f8"),
    "longdouble": ROWS.astype(np.longdouble),
    "read-only": locked(ROWS),
    "from bytes": np.frombuffer(ROWS.tobytes()).reshape(40, 8),
    "float32": ROWS.astype(np.float32),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_any_array_of_floats_is_read_without_a_warning(name: str) -> None:
    array = ARRAYS[name]
    unit_rows = ROWS / np.linalg.norm(ROWS, axis=1, keepdims=True)
    cosines = (unit_rows @ unit_rows.T)[~np.eye(40, dtype=bool)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert measures.mean_cosine(array) == pytest.approx(cosines.mean(), rel=1e-5)
        np.testing.assert_allclose(Moments(8).add(array).mean(), np.asarray(array, np.float64).mean(0), atol=1e-6)
        with SpectrumMonitor(8) as monitor:
            monitor.observe(array, inputs=array[:, :2])
            assert monitor.flush(120)
            assert monitor.counters.rows["sampled"] == 40


def test_a_read_only_array_is_shared_and_stays_locked() -> None:
    array = locked(ROWS)
    assert as_tensor(array, "rows").data_ptr() == array.__array_interface__["data"][0]
    assert not array.flags.writeable


def test_falling_eigenvalues_of_numpy_are_a_spectrum() -> None:
    values = np.linalg.eigvalsh(np.cov(ROWS.T))[::-1]
    assert measures.participation_ratio(values) == pytest.approx(values.sum() ** 2 / np.square(values).sum())
    with pytest.raises(ValueError, match="spectrum: expected real values"):
        measures.effective_rank(values.astype(np.complex128))


@pytest.mark.parametrize("rows", [ROWS.astype(object), "abc", None, [[1.0], [1.0, 2.0]]])
def test_what_is_no_array_of_floats_is_named(rows: object) -> None:
    with pytest.raises(ValueError, match="rows: expected an array of floats"):
        measures.mean_cosine(rows)  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [1e-310, 1e-200, 1e-150, 1e-30, 1.0, 1e30, 1e150, 1e200, 1e300])
def test_lengths_that_cannot_be_squared_are_scaled_to_one(scale: float) -> None:
    expected = ROWS / np.linalg.norm(ROWS, axis=1, keepdims=True)
    # Below 1e-308 a number has fewer digits.
    tolerance = 1e-2 if scale < 1e-308 else 1e-13
    np.testing.assert_allclose(unit(torch.from_numpy(ROWS * scale)), expected, rtol=tolerance, atol=1e-13)


def test_zeros_stay_zeros_and_infinities_are_no_number() -> None:
    rows = torch.zeros(3, 4, dtype=torch.float64)
    rows[1, 0], rows[2, 0] = 1e-200, torch.inf
    assert torch.equal(unit(rows)[:2], torch.tensor([[0.0, 0, 0, 0], [1, 0, 0, 0]], dtype=torch.float64))
    assert unit(rows)[2].isnan().any()
