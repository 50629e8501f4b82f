"""Reference of the inputs: small descriptors of healthy images, to tell other traffic from a broken model.

A model that breaks changes the embeddings while the inputs stay what they were. Other traffic changes both.
"""

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fullrank import profile
from fullrank.descriptors import describe, thumbnail_part, thumbnails
from fullrank.moments import Moments
from fullrank.profile import band_sums, merged_bands

# No texture counts as farther away than so many standard deviations, so that a few odd images move no mean far.
TEXTURE_REACH = 2.0
# A direction of descriptors that holds less than this share of the mean variance says nothing.
_FLOOR_SHARE = 1e-4
# Two inputs whose squared distance is below this share of the usual one count as the same picture.
SAME_PICTURE = 0.01
_PREFIX = "inputs."
_STEPS = 20  # of which each leaves the share of descriptors that are bounded
_TEXTURE = "texture."


@dataclass(frozen=True)
class InputReading:
    """How inputs differ from the reference's; NaN where that is not known.

    distance: 0 where they are alike; variance_ratio: their total variance over the reference's; weakest_band: the least
    of that ratio over bands. Where a share of the inputs are near-copies of one, it is about what the others make up.
    All three of the thumbnails. texture_shift: by how many standard deviations of the reference's the mean of their
    textures, each bounded, has moved along each direction, the root mean square: 0 where they are alike, 2 at most.
    """

    distance: float = math.nan
    variance_ratio: float = math.nan
    weakest_band: float = math.nan
    texture_shift: float = math.nan


@dataclass(frozen=True, eq=False)
class InputReference:
    """Descriptors of healthy inputs, float64: mean (k,), basis (k, k) by falling variance, band_energy per band.

    texture: the same of their textures, where they are images that `describe` described; the others are then of the
    thumbnails alone.
    """

    mean: Tensor
    basis: Tensor
    bands: tuple[int, ...]
    band_energy: Tensor
    texture: "InputReference | None" = None

    @classmethod
    def build(cls, descriptors: Tensor) -> Self:
        """From (n, k) finite descriptors, n well above k: one half chooses the directions, the other measures them.

        ValueError for descriptors of which fewer than 4 are finite, and for those that do not vary. Without textures
        where these alone do not, as those of images of one colour each.
        """
        first = thumbnail_part(descriptors.shape[1])
        made, rough = cls._of(descriptors[:, :first]), descriptors[:, first:]
        if first < descriptors.shape[1]:
            with suppress(ValueError):
                return replace(made, texture=cls._of(rough)._centred(rough[rough.isfinite().all(1)]))
        return made

    @classmethod
    def _of(cls, descriptors: Tensor) -> Self:
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

    def _centred(self, descriptors: Tensor) -> Self:
        """With the centre about which the bounded descriptors have mean 0: Huber's M-estimate (1964)."""
        most = self._most
        along = (descriptors.double() - self.mean) @ self.basis
        centre = torch.zeros_like(self.mean)
        for _ in range(_STEPS):
            centre = centre + (along - centre).clamp(-most, most).mean(0)
        return replace(self, mean=self.mean + self.basis @ centre)

    @property
    def _units(self) -> Tensor:
        """(k,) the mean variance within each direction's band: single eigenvalues of a sample are noisy."""
        sizes = profile.band_sizes(self.bands)
        return (self.band_energy / sizes).repeat_interleave(sizes)

    @property
    def _most(self) -> Tensor:
        """(k,) 2 standard deviations along each direction."""
        return TEXTURE_REACH * self._units.sqrt()

    def _bounded(self, descriptors: Tensor) -> Tensor:
        """(n, k) in float64, nowhere farther from the centre than 2 standard deviations along a direction."""
        most = self._most
        along = (descriptors.double() - self.mean) @ self.basis
        return along.clamp(-most, most) @ self.basis.T + self.mean

    def bounded(self, descriptors: Tensor) -> Tensor:
        """Descriptors (n, k) as they are measured: each texture at most 2 standard deviations from the centre along
        every direction. So a share p of the images, whatever they are, shifts the textures by at most 2 p."""
        if self.texture is None or descriptors.shape[1] != self.full_width:
            return descriptors
        own, rough = descriptors[:, : self.width], descriptors[:, self.width :]
        return torch.cat((own, self.texture._bounded(rough).to(own.dtype)), 1)

    @property
    def reach(self) -> float:
        """Squared distance up to which two inputs count as one picture: a hundredth of the usual one, 2 variances."""
        return SAME_PICTURE * 2 * float(self.band_energy.sum())

    @property
    def width(self) -> int:
        """Width k of the descriptors, without those of the textures."""
        return len(self.mean)

    @property
    def full_width(self) -> int:
        """Width of the descriptors with those of the textures, where it knows these."""
        return self.width + (0 if self.texture is None else self.texture.width)

    def fits(self, given: int) -> bool:
        """Whether it can be compared with descriptors of this width: its own, or its own with textures."""
        return self.width in (given, thumbnail_part(given))

    def project(self, descriptors: Tensor) -> Tensor:
        """Descriptors (n, k) about the mean along the directions; those of textures after the others."""
        own = (descriptors[:, : self.width] - self.mean) @ self.basis
        if self.texture is None:
            return own
        return torch.cat((own, self.texture.project(descriptors[:, self.width :])), 1)

    def read(self, moments: Moments | None) -> InputReading:
        """Compare descriptors' moments with these; unknown for fewer than 32 rows or descriptors of another width.

        The distance is the larger of the mean's shift, in standard deviations of the reference's total variance, and
        the largest |log ratio| of a band's energy: each 0 for inputs of the same law, up to sampling.
        """
        if moments is None or not self.fits(moments.dimension) or moments.count < 32:
            return InputReading()
        mean, covariance = moments.mean(), moments.covariance()
        parts = []
        for part, at in ((self, slice(self.width)), (self.texture, slice(self.width, None))):
            if part is not None and len(mean[at]):
                energies = profile.energies_of_covariance(covariance[at, at], part.basis)
                parts.append(((mean[at] - part.mean) @ part.basis, energies))
        shift, energies = (torch.cat(each) for each in zip(*parts, strict=True))
        return self.compare(shift, energies, moments.count)

    def compare(self, shift: Tensor, energies: Tensor, count: int) -> InputReading:
        """As `read`, of the shift (k,) of the mean of `count` descriptors along the columns of the reference's basis,
        and of their variance (k,) there; of thumbnails alone, or of thumbnails and textures."""
        own = energies[: self.width]
        variance = float(own.sum())
        total = float(self.band_energy.sum())
        along = shift[: self.width]
        moved = profile.mean_shift(along, torch.zeros_like(along), variance, count, total)
        ratios = band_sums(own, self.bands) / self.band_energy
        largest = float(ratios.clamp(min=1e-3).log().abs().max())
        texture_shift = math.nan
        if self.texture is not None and len(shift) > self.width:
            texture_shift = self.texture.shift(shift[self.width :], energies[self.width :], count)
        distance = max(math.sqrt(max(0.0, moved)), largest)
        return InputReading(distance, variance / total, float(ratios.min()), texture_shift)

    def shift(self, along: Tensor, energies: Tensor, count: int) -> float:
        """Root of the mean over directions of the squared shift `along` (k,) of the mean of `count` descriptors, in
        units of the reference's variance there, less what sampling adds; energies (k,): the descriptors' variance."""
        return math.sqrt(max(0.0, float(((along.square() - energies / count) / self._units).mean())))

    def tensors(self) -> dict[str, Tensor]:
        """Contiguous tensors for safetensors, named "inputs.mean", ..., and of textures "inputs.texture.mean", ..."""
        return {_PREFIX + name: tensor for name, tensor in self._named().items()}

    def _named(self) -> dict[str, Tensor]:
        named = {
            "mean": self.mean.contiguous(),
            "basis": self.basis.contiguous(),
            "bands": torch.tensor(self.bands, dtype=torch.int64),
            "band_energy": self.band_energy.contiguous(),
        }
        texture = {} if self.texture is None else self.texture._named()
        return named | {_TEXTURE + name: tensor for name, tensor in texture.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self | None:
        """The inverse of `tensors`; None where there are none. ValueError that names what is missing or misshapen."""
        found = _within(tensors, _PREFIX)
        if not found:
            return None
        made = cls._from_named(found, _PREFIX)
        rough = _within(found, _TEXTURE)
        if not rough:
            return made
        texture = cls._from_named(rough, _PREFIX + _TEXTURE)
        if thumbnail_part(made.width + texture.width) != made.width:
            raise ValueError(
                f"reference: inputs.mean and inputs.texture.mean have {made.width} and {texture.width} values, as no "
                "images' thumbnails and textures; build the reference again"
            )
        return replace(made, texture=texture)

    @classmethod
    def _from_named(cls, found: Mapping[str, Tensor], prefix: str) -> Self:
        k = found["mean"].numel() if "mean" in found else 0
        bands = tuple(found.get("bands", torch.zeros(0)).flatten().long().tolist())
        if not bands or bands[-1] != k or list(bands) != sorted(set(bands)) or bands[0] < 1:
            raise ValueError(f"reference: {prefix}bands must rise to the descriptors' width {k}, got {bands}")
        for name, shape in {"mean": (k,), "basis": (k, k), "band_energy": (len(bands),)}.items():
            if name not in found or tuple(found[name].shape) != shape or not found[name].isfinite().all():
                raise ValueError(f"reference: {prefix}{name} is missing, not finite or not of shape {shape}")
        if not bool((found["band_energy"] > 0).all()):
            raise ValueError(f"reference: {prefix}band_energy must be above 0; build the reference without inputs")
        mean, basis, energy = (found[name].to("cpu", torch.float64) for name in ("mean", "basis", "band_energy"))
        return cls(mean, basis, bands, energy)


def _within(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def describe_as(known: InputReference | None, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What a reference knows of images (n, c, s, s) uint8: all that `describe` says, or, of none and of those built
    before there were textures, the thumbnails."""
    return thumbnails(pixels) if known is None or known.texture is None else describe(pixels)
