"""Reference: what one encoder's healthy embeddings look like, measured on two disjoint sets of rows."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from fullrank import measures, profile
from fullrank.calibration.enough import MINIMUM_ROWS, divided, needed_rows, shortfall, wanted_rows
from fullrank.calibration.inputs import InputReference
from fullrank.calibration.ranges import Calibration
from fullrank.measures import noise_floor, numerical_rank
from fullrank.moments import Moments
from fullrank.neighbours import nearest_angle
from fullrank.profile import band_sums, log_bands, merged_bands
from fullrank.rows import ArrayLike, as_rows, as_tensor, unit
from fullrank.stored import check_plain

__all__ = ["Reference", "band_sums", "log_bands", "merged_bands"]

# Of the tensors on disk. Files without one are older and load; a newer one is refused.
SCHEMA = 1
_VECTORS = ("mean", "band_energy", "eigenvalues")
_SCALARS = ("participation_ratio", "effective_rank", "total_variance", "canary_participation_ratio")


@dataclass(frozen=True, eq=False)
class Reference:
    """Healthy statistics of L2-normalised embeddings of `dimension` d, all float64.

    mean (d,); basis (d, d), columns in order of falling variance; bands: the upper ranks of the bands of directions,
    ending in d; band_energy (len(bands),): the variance that rows not used for the basis have in each; eigenvalues
    (d,) of those rows' covariance, falling; rows: how many they were; canary (m, d): what fixed images should embed
    to; dtype: what the encoder computes in; calibration, inputs: how far healthy traffic strays from all this, and what
    its inputs look like, both added by `fullrank.calibration.resample.calibrated`; canary_noise: the largest angle, in
    degrees, by which the precision that serves turns a canary image's embedding, NaN where nobody measured it;
    basis_rows: how many rows gave the basis, 0 where an older file does not say.

    The basis and the energies must come from different rows: measured on the rows that chose the directions, the last
    band of a healthy encoder reads 1.2 instead of 1.
    """

    mean: Tensor
    basis: Tensor
    bands: tuple[int, ...]
    band_energy: Tensor
    eigenvalues: Tensor
    participation_ratio: float
    effective_rank: float
    total_variance: float
    rows: int
    canary: Tensor | None = None
    canary_participation_ratio: float = math.nan
    dtype: str = "float32"
    calibration: Calibration | None = None
    inputs: InputReference | None = None
    canary_noise: float = math.nan
    basis_rows: int = 0

    @classmethod
    def build(
        cls,
        basis_rows: ArrayLike,
        held_out_rows: ArrayLike | None = None,
        *,
        dtype: str = "float32",
        canary: ArrayLike | None = None,
        labels: ArrayLike | None = None,
        inputs: ArrayLike | None = None,
        calibrate: bool = True,
        progress: Callable[[int, int], None] = lambda done, total: None,
        seed: int = 0,
    ) -> Self:
        """Measure a reference on two disjoint sets of rows (n, d), which are L2-normalised here, and calibrate it.

        One set alone is divided at random (`seed`): some of its rows give the directions, the others are held out.
        labels (n,), inputs (n, k): classes of the held-out rows (of all rows, where there is one set), from which
        sessions and drift are simulated, and descriptors of what was embedded, such as those of
        `fullrank.descriptors.describe`. canary (m, d): what fixed inputs embed to. progress: called with the
        parts of the calibration done so far, and how many there are. Warns in words where the rows do not suffice to
        calibrate, or to tell an intact encoder from a broken one; the verdict is then never healthy.

        ValueError, naming the argument, for rows of the wrong shape, type or width, fewer than 32 finite rows in either
        set, rows that are one point, an unknown dtype, labels or inputs of another length, or a canary that is not
        finite.
        """
        first = as_rows(basis_rows, name="basis_rows")
        d = first.shape[1]
        held: Tensor
        if held_out_rows is None:
            chosen, rest = divided(len(first), d, seed)
            labels = None if labels is None else _of_each(labels, len(first), "labels")[rest]
            inputs = None if inputs is None else _of_each(inputs, len(first), "inputs")[rest]
            first, held = first[chosen], first[rest]
        else:
            held = as_rows(held_out_rows, d, name="held_out_rows")
        made = cls._measured(first, held, dtype, canary)
        if made.shortfall:
            warnings.warn(made.shortfall, stacklevel=2)
        if not calibrate:
            return made
        finite = held.double().square().sum(1).isfinite()
        if int(finite.sum()) < MINIMUM_ROWS:
            one = f"build it from {wanted_rows(d)} rows or more"
            two = f"hold out {max(MINIMUM_ROWS, needed_rows(d))} or more"
            warnings.warn(
                f"{int(finite.sum())} rows are held out, and calibration needs {MINIMUM_ROWS}: the reference is not "
                f"calibrated, and general thresholds are used; {one if held_out_rows is None else two}",
                stacklevel=2,
            )
            return made
        from fullrank.calibration.resample import calibrated  # which knows references

        labels = None if labels is None else _of_each(labels, len(held), "labels")[finite]
        inputs = None if inputs is None else _of_each(inputs, len(held), "inputs")[finite]
        known = calibrated(made, held[finite], labels, inputs, seed=seed, progress=progress)
        return replace(made, calibration=known.calibration, inputs=known.inputs)

    @classmethod
    def _measured(cls, first: Tensor, second: Tensor, dtype: str, canary: ArrayLike | None) -> Self:
        d = first.shape[1]
        basis_moments, held_out = Moments(d), Moments(d)
        _add_units(basis_moments, first, "basis_rows")
        _add_units(held_out, second, "held_out_rows")
        return cls.of_moments(basis_moments, held_out, dtype=dtype, canary=canary)

    @classmethod
    def of_moments(
        cls, basis_moments: Moments, held_out: Moments, *, dtype: str = "float32", canary: ArrayLike | None = None
    ) -> Self:
        """As `build`, not calibrated, of moments of two disjoint sets of unit rows, which need not fit in memory.

        ValueError, naming the argument, for fewer than 32 rows, rows that are one point, unlike dimensions, an unknown
        dtype or a canary that is not finite.
        """
        _dtype(dtype)
        d = basis_moments.dimension
        if held_out.dimension != d:
            raise ValueError(f"held_out: expected dimension {d}, got {held_out.dimension}")
        for name, moments in (("basis_moments", basis_moments), ("held_out", held_out)):
            if moments.count < 32:
                raise ValueError(f"{name}: expected the moments of at least 32 rows, got {moments.count}")
        basis = torch.linalg.eigh(basis_moments.covariance()).eigenvectors.flip(1)
        covariance = held_out.covariance()
        variance = float(covariance.trace())
        if not variance > d * noise_floor(torch.float32, d):
            raise ValueError(
                f"held_out_rows: all rows are one point up to rounding (total variance {variance:.2g}): the encoder "
                "that gave them has collapsed, or all its inputs were alike, and nothing can be compared with them"
            )
        energies = profile.energies_of_covariance(covariance, basis)
        bands = merged_bands(energies, noise_floor(_dtype(dtype), d))
        eigenvalues = measures.spectrum(covariance)
        images = None if canary is None else unit(as_rows(canary, d, name="canary")).float()
        if images is not None and (not len(images) or not images.isfinite().all()):
            raise ValueError("canary: expected one finite row or more")
        return cls(
            mean=held_out.mean(),
            basis=basis,
            bands=bands,
            band_energy=band_sums(energies, bands),
            eigenvalues=eigenvalues,
            participation_ratio=held_out.participation_ratio(),
            effective_rank=held_out.effective_rank(eigenvalues),
            total_variance=variance,
            rows=held_out.count,
            canary=images,
            canary_participation_ratio=math.nan if images is None else Moments(d).add(images).participation_ratio(),
            dtype=dtype,
            basis_rows=basis_moments.count,
        )

    @property
    def shortfall(self) -> str:
        """In words, what this reference has too few rows to tell; empty where they suffice."""
        return shortfall(self.basis_rows, self.rows, self.dimension)

    @property
    def dimension(self) -> int:
        """Width d of the embeddings."""
        return len(self.mean)

    @property
    def noise_floor(self) -> float:
        """Variance per dimension below which nothing is signal in the serving dtype."""
        return noise_floor(_dtype(self.dtype), self.dimension)

    @property
    def numerical_rank(self) -> int:
        """Directions above the noise floor."""
        return numerical_rank(self.eigenvalues, self.noise_floor)

    @cached_property
    def canary_nearest(self) -> float:
        """Median angle in degrees from a canary image to the nearest other one; NaN without a canary."""
        return math.nan if self.canary is None else nearest_angle(self.canary)

    def tensors(self) -> dict[str, Tensor]:
        """Everything as contiguous tensors, for `safetensors.torch.save_file`; the dtype's name as its ASCII bytes."""
        tensors = {name: getattr(self, name).contiguous() for name in (*_VECTORS, "basis")}
        tensors["bands"] = torch.tensor(self.bands, dtype=torch.int64)
        tensors["schema_version"] = torch.tensor([SCHEMA], dtype=torch.int64)
        tensors["rows"] = torch.tensor([self.rows], dtype=torch.int64)
        tensors["basis_rows"] = torch.tensor([self.basis_rows], dtype=torch.int64)
        tensors["dtype"] = torch.tensor(list(self.dtype.encode("ascii")), dtype=torch.uint8)
        tensors |= {name: torch.tensor([getattr(self, name)], dtype=torch.float64) for name in _SCALARS}
        if math.isfinite(self.canary_noise):
            tensors["canary_noise"] = torch.tensor([self.canary_noise], dtype=torch.float64)
        if self.canary is not None:
            tensors["canary"] = self.canary.contiguous()
        for part in (self.calibration, self.inputs):
            tensors |= {} if part is None else part.tensors()
        return tensors

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        """The inverse of `tensors`. ValueError that names a tensor which is missing, misshapen or not finite."""
        check_plain(tensors, "reference: tensor")
        version = tensors.get("schema_version", torch.zeros(1)).flatten().tolist()
        if len(version) != 1 or not version[0] <= SCHEMA:
            raise ValueError(
                f"reference: schema_version is {version}, and this fullrank reads up to {SCHEMA}: upgrade fullrank, or "
                "build the reference again"
            )
        for name in (*_VECTORS, *_SCALARS, "basis", "bands", "rows", "dtype"):
            if name not in tensors:
                raise ValueError(f"reference: tensor {name!r} is missing")
        d = tensors["mean"].numel()
        bands = tuple(tensors["bands"].flatten().tolist())
        if not bands or bands[-1] != d or list(bands) != sorted(set(bands)) or bands[0] < 1:
            raise ValueError(f"reference: bands must rise to the dimension {d}, got {bands}")
        shapes: dict[str, tuple[int, ...]] = {"mean": (d,), "basis": (d, d), "band_energy": (len(bands),)}
        shapes |= {"eigenvalues": (d,), "rows": (1,), **dict.fromkeys(_SCALARS, (1,))}
        if "canary" in tensors:
            shapes["canary"] = (len(tensors["canary"]) if tensors["canary"].ndim else 0, d)
        shapes |= {name: (1,) for name in ("canary_noise", "basis_rows") if name in tensors}
        for name, shape in shapes.items():
            tensor = tensors[name]
            if tuple(tensor.shape) != shape:
                raise ValueError(f"reference: {name} has shape {tuple(tensor.shape)}, expected {shape}")
            # The scalars may be NaN: too few rows to tell.
            if name not in (*_SCALARS, "canary_noise") and not torch.isfinite(tensor).all():
                raise ValueError(f"reference: {name} is not finite")
        if not (tensors["band_energy"] > 0).all() or not float(tensors["total_variance"]) > 0:
            raise ValueError(
                "reference: band_energy and total_variance must be above 0: nothing can be compared with rows that are "
                "one point; build it from an encoder's healthy embeddings"
            )
        dtype = bytes(tensors["dtype"].to(torch.uint8).flatten().tolist()).decode("ascii", "replace")
        _dtype(dtype)
        vector = {name: tensors[name].to("cpu", torch.float64) for name in (*_VECTORS, "basis")}
        scalar = {name: float(tensors[name]) for name in _SCALARS}
        return cls(
            mean=vector["mean"],
            basis=vector["basis"],
            band_energy=vector["band_energy"],
            eigenvalues=vector["eigenvalues"],
            participation_ratio=scalar["participation_ratio"],
            effective_rank=scalar["effective_rank"],
            total_variance=scalar["total_variance"],
            canary_participation_ratio=scalar["canary_participation_ratio"],
            bands=bands,
            rows=int(tensors["rows"]),
            basis_rows=int(tensors.get("basis_rows", 0)),
            canary=tensors["canary"].to("cpu", torch.float32) if "canary" in tensors else None,
            dtype=dtype,
            calibration=Calibration.from_tensors(tensors, len(bands)),
            inputs=InputReference.from_tensors(tensors),
            canary_noise=float(tensors["canary_noise"]) if "canary_noise" in tensors else math.nan,
        )


def _of_each(given: ArrayLike, rows: int, name: str) -> Tensor:
    """The values (n, ...), one a row. ValueError for another number of them."""
    values = as_tensor(given, name)
    if not values.ndim or len(values) != rows:
        raise ValueError(f"{name}: expected {rows}, one a row, got {len(values) if values.ndim else 'a scalar'}")
    return values.cpu()


def _add_units(moments: Moments, rows: Tensor, name: str) -> None:
    for chunk in torch.split(rows, 4096):
        moments.add(unit(chunk))
    if moments.count < 32:
        raise ValueError(f"{name}: expected at least 32 finite rows, got {moments.count}")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"reference: dtype {name!r} is not a torch floating dtype")
    return dtype
