r"""What each rank measure sees, and what it cannot see.

Let λ_1 ≥ … ≥ λ_d be the eigenvalues of the covariance of the embeddings and p_i = λ_i / Σλ. Three numbers are in use:

    effective rank        exp(−Σ p_i ln p_i)                      the entropy of the spectrum
    RankMe                the same of the singular values √λ_i     gives the tail more weight; usually uncentred
    participation ratio   (Σλ_i)² / Σλ_i²                          gives the tail almost no weight

All three are between 1 and d, and all three are easy to misread. This lab samples Gaussian rows whose spectrum is
known and compares what the measures say with what they must say.

**Too few rows.** The sample covariance of n rows has too uneven a spectrum, so every rank is too low. For isotropic
rows and m = n − 1 degrees of freedom the participation ratio is dm/(m + d + 1) (from E tr S² = tr Σ²(1 + 1/m) +
(tr Σ)²/m), and the effective rank is d·exp(−d/2m) for m ≥ d and m·exp(−m/2d) for m < d (the Marchenko–Pastur
law gives ∫ x ln x = d/2m). For any spectrum, to first order in 1/m, second-order perturbation of the entropy gives

    ln erank(n) ≈ H(1 + V) − V/2 + C − B,   with Σλ = 1 and H = −Σ λ ln λ,
    V = 2Σλ²/m,   C = 2Σλ²(1 + ln λ)/m,   B = (1 + Σ_ij λ_i λ_j ℓ_ij)/2m,
    ℓ_ij = (ln λ_i − ln λ_j)/(λ_i − λ_j),   ℓ_ii = 1/λ_i .

**Not centred.** A common offset μ of the rows adds the eigenvalue |μ|² to the second moment. Uncentred measures then
report a collapse that is not there; centred ones do not move.

**Scale.** Ranks do not change when all rows shrink. A completely collapsed encoder (one point plus a breath of
isotropic noise) has *full* effective rank; only the total variance, or the mean cosine, says that it is gone.

**One loud direction.** One direction with L times the variance drives the participation ratio to almost 1 while the
other d − 1 directions are as alive as before.

**A dead tail.** If the spectrum decays, the last directions carry so little variance that their death moves the
effective rank and the participation ratio hardly at all. The energy of a band, compared with its reference, shows it.

## What it means for someone serving embeddings

No single number is enough. Watch a rank for dimensional collapse, the total variance for complete collapse, the
energy per band for the tail; centre first; and know n: below a few times d rows a low rank is a property of your
sample. The service's monitor corrects for n where it can and says "insufficient data" where it cannot.

## Source

Roy and Vetterli, *The effective rank*, EUSIPCO 2007. Garrido et al., *RankMe*, ICML 2023, arXiv:2210.02885. The
isotropic entropy is Page's, Phys. Rev. Lett. 71, 1291 (1993). The first-order law above is derived here.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from theory.lab import Claim, Line, Panel, ParameterError, Result, Settings, about, below, parameter, where
from theory.toys import F64, covariance, normal, rank_of

EXAMPLE = "--samples 40 --loud 30"


class Parameters(Settings):
    dimension: int = parameter(64, "embedding dimension d", low=8, high=512)
    samples: int = parameter(256, "rows n for the small-sample claim", low=8, high=100_000)
    rows: int = parameter(8192, "rows for all other claims; ranks want 16 per dimension", low=128, high=200_000)
    shift: float = parameter(3.0, "common offset of the rows, in standard deviations of one coordinate", low=0)
    scale: float = parameter(1e-3, "factor that shrinks the rows", low=1e-9, high=1.0)
    loud: float = parameter(100.0, "variance of the loud direction, times that of the others", low=1)
    dead: int = parameter(16, "dead dimensions at the end of the spectrum", low=1)
    decay: float = parameter(2.0, "power of the decaying spectrum, λ_k = k^-decay", low=0, high=6)

    def check(self) -> None:
        if self.dead >= self.dimension:
            raise ParameterError(f"dead must be below dimension ({self.dimension}), not {self.dead}")


def participation(matrix: Tensor) -> float:
    """(tr C)² / tr C² of a symmetric matrix, no eigenvalues needed."""
    return float(matrix.trace() ** 2 / matrix.square().sum())


def participation_of(weights: Tensor) -> Tensor:
    """The same of eigenvalues."""
    return weights.sum().square() / weights.square().sum()


def entropy_of(weights: Tensor) -> Tensor:
    """exp of the entropy of non-negative weights, zeros allowed: the population value for a known spectrum."""
    p = weights / weights.sum()
    return torch.exp(-torch.xlogy(p, p).sum())


def entropy_rank(weights: Tensor) -> float:
    return float(entropy_of(weights))


def sampled_participation(eigenvalues: Tensor, n: int) -> float:
    """Expected (tr S)² over expected tr S² of the covariance S of n Gaussian rows with this spectrum."""
    total, squares, m = float(eigenvalues.sum()) ** 2, float(eigenvalues.square().sum()), n - 1
    return (total + 2 * squares / m) / (squares * (1 + 1 / m) + total / m)


def sampling_error(measure: Callable[[Tensor], Tensor], spectrum: Tensor, n: int, least: float) -> float:
    """Five relative standard deviations of a measure of n Gaussian rows, and at least `least`.

    First order, delta method: each eigenvalue is estimated with relative variance 2/m, m = n − 1, independently of the
    others. Second order, all that there is where the eigenvalues are equal: of k equal ones the logarithm of the
    effective rank falls by χ²/(km), and that of the participation ratio by twice as much, where χ² has
    f = (k − 1)(k + 2)/2 degrees of freedom. It exceeds f by 5√(2f) + 25 as rarely as a normal variable its mean by five
    standard deviations (Laurent and Massart, 2000, lemma 1).
    """
    logs = spectrum[spectrum > 0].log().requires_grad_()
    slope = torch.autograd.grad(measure(logs.exp()).log(), logs)[0]
    k = float(participation_of(spectrum))
    degrees = (k - 1) * (k + 2) / 2
    second = 2 * (5 * math.sqrt(2 * degrees) + 25) / (k * (n - 1))
    return max(least, 5 * float(slope.norm()) * math.sqrt(2 / (n - 1)) + second)


def isotropic_rank(d: int, n: int) -> float:
    """Expected effective rank of n isotropic Gaussian rows, by the Marchenko–Pastur law."""
    small, large = min(d, n - 1), max(d, n - 1)
    return small * math.exp(-small / (2 * large))


def sampled_rank(eigenvalues: Tensor, n: int) -> float:
    """Expected effective rank of n Gaussian rows with this spectrum, to first order in 1/n."""
    lam, m = eigenvalues[eigenvalues > 0], n - 1
    lam = lam / lam.sum()
    logs = lam.log()
    gaps = lam[:, None] - lam
    equal = gaps.abs() < 1e-12 * lam[:, None]
    slopes = torch.where(equal, 1 / lam[:, None], (logs[:, None] - logs) / torch.where(equal, 1.0, gaps))
    entropy = -(lam * logs).sum()
    curvature = ((lam[:, None] * lam * slopes).sum() + lam.sum()) / (2 * m)
    variance = 2 * lam.square().sum() / m
    cross = 2 * (lam.square() * (1 + logs)).sum() / m
    return float(torch.exp(entropy - variance / 2 + cross + variance * entropy - curvature))


def run(given: Parameters) -> Result:
    d, generator = given.dimension, given.generator()
    rotation: Tensor = torch.linalg.qr(normal(generator, d, d))[0]

    def sample(spectrum: Tensor, n: int) -> Tensor:
        return normal(generator, n, d) * spectrum.sqrt() @ rotation.T

    flat = torch.ones(d, dtype=F64)
    counts = [max(8, round(d * 2.0**power)) for power in range(-2, 7)]
    draws = 32
    few = [[covariance(sample(flat, n)) for _ in range(draws)] for n in [*counts, given.samples]]
    ranks = [sum(map(rank_of, some)) / draws for some in few]
    ratios = [sum(map(participation, some)) / draws for some in few]
    m = given.samples - 1

    rows = sample(flat, given.rows)
    centred = covariance(rows)
    shifted = rows + given.shift * d**0.5 * rotation[:, 0]
    raw = shifted.T @ shifted / given.rows
    second = flat.clone()
    second[0] += given.shift**2 * d
    moved = abs(rank_of(covariance(shifted)) / rank_of(centred) - 1)

    shrunk = covariance(rows * given.scale)
    point = rotation[:, 0] + given.scale * rows / d**0.5
    unit = point / point.norm(dim=1, keepdim=True)
    collapsed = covariance(unit)

    loud = flat.clone()
    loud[0] = given.loud
    noisy = covariance(sample(loud, given.rows))
    others = torch.linalg.eigvalsh(noisy)[:-1].mean()

    half_dead = flat.clone()
    half_dead[-given.dead :] = 0
    cut = covariance(sample(half_dead, given.rows))
    power = torch.arange(1, d + 1, dtype=F64) ** -given.decay
    maimed = power.clone()
    maimed[-given.dead :] = 0
    draw = normal(generator, given.rows, d)
    whole, broken = (covariance(draw * spectrum.sqrt() @ rotation.T) for spectrum in (power, maimed))
    band = rotation[:, -given.dead :]

    def tail(matrix: Tensor) -> float:
        return float((band.T @ matrix @ band).trace())

    def error(measure: Callable[[Tensor], Tensor], spectrum: Tensor, least: float = 0.03) -> float:
        return sampling_error(measure, spectrum, given.rows, least)

    def expanded(claim: Claim) -> Claim:
        """A claim whose prediction, or whose allowance for sampling error, leaves out terms beyond the first in 1/n."""
        reason = f"rows below 16 per dimension, {16 * d}: terms beyond the first in 1/n are not small"
        return where(given.rows >= 16 * d, reason, claim)

    energy = float(power[-given.dead :].sum())
    rounding = d * torch.finfo(F64).eps / energy

    def above_rounding(claim: Claim) -> Claim:
        """A claim on the tail's energy, beside which the rounding of the largest eigenvalue, which is 1, is nothing."""
        return where(rounding < 0.01, "the tail's energy drowns in float64's rounding", claim)

    first = "first order in 1/n"
    # Both laws are those of large d and n; the next terms are of the order of 1/min(d, m).
    few_rows_error = max(0.03, 1 / min(d, m))
    claims = [
        about(
            "isotropic rows, your n: effective rank is too low",
            "d e^(−d/2m), or m e^(−m/2d)",
            isotropic_rank(d, m + 1),
            ranks[-1],
            few_rows_error,
        ),
        about(
            "isotropic rows, your n: participation ratio is too low",
            "(m + 2/d)d / (m + d + 1)",
            sampled_participation(flat, given.samples),
            ratios[-1],
            few_rows_error,
        ),
        expanded(
            about(
                "shifted rows, uncentred effective rank",
                "entropy of (1 + |μ|², 1, …)",
                sampled_rank(second, given.rows),
                rank_of(raw),
                error(entropy_of, second),
            )
        ),
        expanded(
            about(
                "shifted rows, uncentred RankMe",
                "entropy of its square roots",
                entropy_rank(second.sqrt()),
                entropy_rank(torch.linalg.svdvals(shifted)),
                error(lambda lam: entropy_of(lam.sqrt()), second),
            )
        ),
        below("shifted rows, centred effective rank does not move", "relative change 0", 1e-9, moved),
        below(
            "shrunk rows: effective rank does not move",
            "relative change 0",
            1e-9,
            abs(rank_of(shrunk) / rank_of(centred) - 1),
        ),
        about(
            "shrunk rows: total variance sees it",
            "d scale²",
            d * given.scale**2,
            float(shrunk.trace()),
            error(torch.sum, flat),
        ),
        where(
            given.scale <= 0.1,
            "the breath is as large as the point: scale above 0.1",
            expanded(
                about(
                    "one point and a breath of noise: effective rank calls it healthy",
                    "sampled_rank(1, …, 1, 0)",
                    sampled_rank(flat[1:], given.rows),
                    rank_of(collapsed),
                    error(entropy_of, flat[1:], 0.05),
                )
            ),
        ),
        about(
            "one point and a breath of noise: total variance of normalised rows",
            "scale²(d − 1)/d / (1 + scale²)",
            given.scale**2 * (d - 1) / d / (1 + given.scale**2),
            float(collapsed.trace()),
            error(torch.sum, flat[1:]) + given.scale**2,
        ),
        expanded(
            about(
                "one loud direction: participation ratio",
                "(d − 1 + L)² / (d − 1 + L²)",
                sampled_participation(loud, given.rows),
                participation(noisy),
                error(participation_of, loud, 0.1),
            )
        ),
        expanded(
            about(
                "one loud direction: effective rank",
                f"entropy of (L, 1, …, 1), {first}",
                sampled_rank(loud, given.rows),
                rank_of(noisy),
                error(entropy_of, loud, 0.05),
            )
        ),
        expanded(
            about(
                "one loud direction: mean variance of the others, untouched",
                "1",
                1.0,
                float(others),
                error(torch.sum, flat[1:]),
            )
        ),
        expanded(
            about(
                "flat spectrum, dead tail: effective rank counts what is left",
                f"d − dead, {first}",
                sampled_rank(half_dead, given.rows),
                rank_of(cut),
                error(entropy_of, half_dead, 0.01),
            )
        ),
    ]
    claims += [
        expanded(
            about(
                "decaying spectrum, its tail dies: effective rank keeps",
                f"ratio of the entropies' exponentials, {first}",
                sampled_rank(maimed, given.rows) / sampled_rank(power, given.rows),
                rank_of(broken) / rank_of(whole),
                error(entropy_of, power, 0.02),
            )
        ),
        expanded(
            about(
                "decaying spectrum, its tail dies: participation ratio keeps",
                f"ratio of (Σλ)²/Σλ², {first}",
                sampled_participation(maimed, given.rows) / sampled_participation(power, given.rows),
                participation(broken) / participation(whole),
                error(participation_of, power, 0.02),
            )
        ),
        above_rounding(
            about(
                "the tail's band energy before",
                "Σ λ_k over the tail",
                energy,
                tail(whole),
                error(torch.sum, power[-given.dead :], 0.1),
            )
        ),
        above_rounding(
            below("the tail's band energy after, over before", "0", max(1e-9, rounding), tail(broken) / tail(whole))
        ),
    ]

    few_rows = [
        Line("effective rank", counts, ranks[:-1], marks=True),
        Line("participation ratio", counts, ratios[:-1], marks=True),
        Line("d e^(−d/2m) or m e^(−m/2d)", counts, [isotropic_rank(d, n) for n in counts], dashed=True),
        Line("dm / (m + d + 1)", counts, [d * (n - 1) / (n + d) for n in counts], dashed=True),
    ]
    levels = [2.0**power for power in range(0, 15)]
    voices = [torch.cat([torch.tensor([level], dtype=F64), flat[1:]]) for level in levels]
    index = list(range(1, d + 1))
    spectra = [torch.linalg.eigvalsh(matrix).flip(0).clamp(min=1e-12).tolist() for matrix in (whole, broken)]
    return Result(
        claims,
        [
            Panel("Isotropic rows, full rank: what n rows show", "rows n", "rank", few_rows, log_x=True),
            Panel(
                "One loud direction, all others alive",
                "its variance, times the others'",
                "rank",
                [
                    Line("effective rank", levels, [entropy_rank(voice) for voice in voices]),
                    Line("RankMe", levels, [entropy_rank(voice.sqrt()) for voice in voices]),
                    Line("participation ratio", levels, [participation(torch.diag(voice)) for voice in voices]),
                    Line("effective rank, sampled", [given.loud], [rank_of(noisy)], marks=True),
                    Line("participation ratio, sampled", [given.loud], [participation(noisy)], marks=True),
                ],
                log_x=True,
            ),
            Panel(
                f"A dead tail: effective rank {rank_of(whole):.2f} and {rank_of(broken):.2f}",
                "rank",
                "eigenvalue",
                [Line("whole", index, spectra[0]), Line(f"last {given.dead} dead", index, spectra[1])],
                log_y=True,
            ),
        ],
    )
