r"""How fast a direction dies under gradient steps whose matrix is estimated from a batch.

The rows of W on the m noisy coordinates, once they are too small to move the attention α, are multiplied from the
right by I + ηM in every step (η is the rate per batch row). M has the mean (2σ² − k) Σ_i(1 − α_ii) I and, given α and
the clean coordinates, independent noise: off the diagonal its entries have the variance
v = k² Σ_i(1 − α_ii)² + σ⁴ tr L², where L = D − α − αᵀ, α without its diagonal and D the row sums of α + αᵀ; on the
diagonal twice that. With the clean coordinates x it is coupled by σ² |Lx|²_F in all. So with

    u = 1 + η(2σ² − k) Σ_i(1 − α_ii),    s² = η² v,    c² = η² σ² |Lx|²_F

second-order perturbation of the singular values gives, a step,

    mean of the m smallest log σ    ln u − s²(m + 1)/2u² − c²(1/u + 1/2)
    the last of them                ln u − s²(3m − 1)/2u² − c²(1/u + 1/2),

and for the first of them, without any expansion, E ln |Au| ≤ ln E|Au|² / 2 for a fixed direction:

    the first of them             ≤ ln(u² + s²(m + 1)) / 2 .

The expansion needs more than small entries: one row i of the batch multiplies the block by I − h eeᵀ, h = ηk(1 − α_ii),
where |e|² is χ²_m, and if h|e|² comes near u the matrix is singular. All of its ln |det| is known:

    m ln(1 + h/u) + E ln |1 − h|e|²/(u + h)|    instead of the second order's    −h²m(m + 1)/2u² .

Of what the row moves, hm/u, the two differ by an eighth at most while **its kick hm/u is below a quarter**; at two
thirds they differ by up to a half. The pairs of Σ̂₀ have the other sign and come near no singular matrix.

The continuous law (2σ² − k)(1 − ⟨α_ii⟩) is the limit of small steps and large batches of all three. If the last
bound is positive, the noise of the batch feeds the directions that the mean would kill, and gradient descent diverges.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Steps:
    """What one step does to the noisy block, each (amplitudes,): u, s², c² and the largest kick of the docstring."""

    factor: Tensor
    noise: Tensor
    coupling: Tensor
    kick: Tensor
    noisy: int

    def mean(self) -> Tensor:
        """The mean change of the m smallest log σ; -inf or NaN where the step overshoots."""
        return self.factor.log() - self.correction()

    def correction(self) -> Tensor:
        """What the noise of the batch takes from ln u, for the mean."""
        return self.noise * (self.noisy + 1) / (2 * self.factor.square()) + self._coupled()

    def slowest(self) -> Tensor:
        """The upper bound on the change of the largest of them."""
        return (self.factor.square() + self.noise * (self.noisy + 1)).log() / 2

    def fastest(self) -> Tensor:
        """The change of the smallest of them, to second order."""
        lost = self.noise * (3 * self.noisy - 1) / (2 * self.factor.square())
        return self.factor.log() - lost - self._coupled()

    def spread(self) -> Tensor:
        """The variance of a log σ's change in one step, at most."""
        return 2 * self.noise / (self.factor.square() + self.noise * (self.noisy + 1))

    def _coupled(self) -> Tensor:
        return self.coupling * (1 / self.factor.abs() + 0.5)


def laplacian(alpha: Tensor) -> Tensor:
    """L (..., n, n) of an attention matrix (..., n, n)."""
    off = alpha - torch.diag_embed(alpha.diagonal(dim1=-2, dim2=-1))
    both = off + off.mT
    return torch.diag_embed(both.sum(-1)) - both


def variance(alpha: Tensor, amplitude: Tensor, unit: float) -> Tensor:
    """v, the variance of an entry of M off the diagonal; alpha (..., n, n), k (...) and σ²."""
    gates = 1 - alpha.diagonal(dim1=-2, dim2=-1)
    spread: Tensor = laplacian(alpha).square().sum((-2, -1))
    return amplitude.square() * gates.square().sum(-1) + unit**2 * spread


def steps_of(alpha: Tensor, clean: Tensor, amplitude: Tensor, unit: float, rate: float, noisy: int) -> Steps:
    """The step of gradient descent at attention (amplitudes, n, n), clean coordinates (n, d − m), k (amplitudes,)."""
    scale = rate / alpha.shape[-1]
    closed = alpha.diagonal(dim1=-2, dim2=-1)
    gates, heaviest = (1 - closed).sum(-1), 1 - closed.amin(-1)
    coupled = (laplacian(alpha) @ clean).square().sum((-2, -1))
    factor = 1 + scale * (2 * unit - amplitude) * gates
    return Steps(
        factor,
        scale**2 * variance(alpha, amplitude, unit),
        scale**2 * unit * coupled,
        scale * amplitude * heaviest * noisy / factor.abs(),
        noisy,
    )
