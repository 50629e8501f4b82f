"""Reference of the inputs: small descriptors of healthy images, to tell other traffic from a broken model.

A model that breaks changes the embeddings while the inputs stay what they were. Other traffic changes both.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fullrank import profile
from fullrank.moments import Moments
from fullrank.profile import band_sums, merged_bands

THUMBNAIL = 8
# A direction of descriptors that holds less than this share of the mean variance says nothing.
_FLOOR_SHARE = 1e-4
# Two inputs whose squared distance is below this share of the usual one count as the same picture.
SAME_PICTURE = 0.01
_PREFIX = "inputs."


def thumbnails(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Thumbnails of 8 x 8 area means: (n, c, s, s) uint8 with s >= 8 -> (n, c * 64) in 0..1."""
    side = pixels.shape[-1]
    edges = np.linspace(0, side, THUMBNAIL + 1).astype(np.intp)
    cells = np.searchsorted(edges, np.arange(side), "right") - 1
    mean = (cells == np.arange(THUMBNAIL)[:, None]) / np.diff(edges)[:, None].astype(np.float32)
    means: NDArray[np.float32] = mean @ pixels.astype(np.float32) @ (mean.T / np.float32(255))
    return means.reshape(len(pixels), pixels.shape[1] * THUMBNAIL**2)


@dataclass(frozen=True)
class InputReading:
    """How inputs differ from the reference's; NaN where that is not known.

    distance: 0 where they are alike; variance_ratio: their total variance over the reference's; weakest_band: the least
    of that ratio over bands. Where a share of the inputs are near-copies of one, it is about what the others make up.
    """

    distance: float = math.nan
    variance_ratio: float = math.nan
    weakest_band: float = math.nan


@dataclass(frozen=True, eq=False)
class InputReference:
    """Descriptors of healthy inputs, float64: mean (k,), basis (k, k) by falling variance, band_energy per band."""

    mean: Tensor
    basis: Tensor
    bands: tuple[int, ...]
    band_energy: Tensor

    @classmethod
    def build(cls, descriptors: Tensor) -> Self:
        """From (n, k) finite descriptors, n well above k: one half chooses the directions, the other measures them.

        ValueError for descriptors of which fewer than 4 are finite, and for those that do not vary.
        """
        first, second = (Moments(descriptors.shape[1]).add(half) for half in (descriptors[::2], descriptors[1::2]))
        if min(first.count, second.count) < 2:
            raise ValueError("inputs: expected finite descriptors; leave inputs out where there are none")
        basis = torch.linalg.eigh(first.covariance()).eigenvectors.flip(1)
        energies = profile.energies_of_covariance(second.covariance(), basis)
        bands = merged_bands(energies, _FLOOR_SHARE * float(energies.mean()))
        if not bool((band_sums(energies, bands) > 0).all()):
            raise ValueError("inputs: the descriptors do not vary, and tell no traffic from another; leave inputs out")
        mean = (first.mean() * first.count + second.mean() * second.count) / (first.count + second.count)
        return cls(mean, basis, bands, band_sums(energies, bands))

    @property
    def reach(self) -> float:
        """Squared distance up to which two inputs count as one picture: a hundredth of the usual one, 2 variances."""
        return SAME_PICTURE * 2 * float(self.band_energy.sum())

    @property
    def width(self) -> int:
        """Width k of the descriptors."""
        return len(self.mean)

    def read(self, moments: Moments | None) -> InputReading:
        """Compare descriptors' moments with these; unknown for fewer than 32 rows or descriptors of another width.

        The distance is the larger of the mean's shift, in standard deviations of the reference's total variance, and
        the largest |log ratio| of a band's energy: each 0 for inputs of the same law, up to sampling.
        """
        if moments is None or moments.dimension != self.width or moments.count < 32:
            return InputReading()
        energies = profile.energies_of_covariance(moments.covariance(), self.basis)
        return self.compare(moments.mean() - self.mean, energies, moments.count)

    def compare(self, shift: Tensor, energies: Tensor, count: int) -> InputReading:
        """As `read`, of the shift (k,) of the mean of `count` descriptors in any orthonormal basis, and of their
        variance (k,) along each column of the reference's."""
        variance = float(energies.sum())
        total = float(self.band_energy.sum())
        moved = profile.mean_shift(shift, torch.zeros_like(shift), variance, count, total)
        ratios = band_sums(energies, self.bands) / self.band_energy
        largest = float(ratios.clamp(min=1e-3).log().abs().max())
        return InputReading(max(math.sqrt(max(0.0, moved)), largest), variance / total, float(ratios.min()))

    def tensors(self) -> dict[str, Tensor]:
        """Contiguous tensors for safetensors, named "inputs.mean", ..."""
        return {
            _PREFIX + "mean": self.mean.contiguous(),
            _PREFIX + "basis": self.basis.contiguous(),
            _PREFIX + "bands": torch.tensor(self.bands, dtype=torch.int64),
            _PREFIX + "band_energy": self.band_energy.contiguous(),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self | None:
        """The inverse of `tensors`; None where there are none. ValueError that names what is missing or misshapen."""
        found = {n.removeprefix(_PREFIX): t for n, t in tensors.items() if n.startswith(_PREFIX)}
        if not found:
            return None
        k = found["mean"].numel() if "mean" in found else 0
        bands = tuple(found.get("bands", torch.zeros(0)).flatten().long().tolist())
        if not bands or bands[-1] != k or list(bands) != sorted(set(bands)) or bands[0] < 1:
            raise ValueError(f"reference: inputs.bands must rise to the descriptors' width {k}, got {bands}")
        for name, shape in {"mean": (k,), "basis": (k, k), "band_energy": (len(bands),)}.items():
            if name not in found or tuple(found[name].shape) != shape or not found[name].isfinite().all():
                raise ValueError(f"reference: inputs.{name} is missing, not finite or not of shape {shape}")
        if not bool((found["band_energy"] > 0).all()):
            raise ValueError("reference: inputs.band_energy must be above 0; build the reference without inputs")
        mean, basis, energy = (found[name].to("cpu", torch.float64) for name in ("mean", "basis", "band_energy"))
        return cls(mean, basis, bands, energy)
