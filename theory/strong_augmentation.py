r"""Strong augmentation kills dimensions.

A linear encoder z = Wx is trained with InfoNCE. The second view adds noise of variance k to some of the
coordinates and leaves the others clean. Jing et al. write the loss with Euclidean distances,

    L = −Σ_i log α_ii,   α_ij ∝ exp(−|z_i − z_j|²/2) for j ≠ i,   α_ii ∝ exp(−|z_i − z'_i|²/2),   Σ_j α_ij = 1.

Differentiating gives a gradient with a very readable form:

    G = −W X,   X = Σ̂₀ − Σ̂₁,
    Σ̂₀ = Σ_{i,j} α_ij (x_i − x_j)(x_i − x_j)ᵀ      the spread of the data, weighted by attention,
    Σ̂₁ = Σ_i (1 − α_ii)(x'_i − x_i)(x'_i − x_i)ᵀ    the spread of the augmentation.

Gradient descent is dW/dt = WX. For a fixed X it is solved by W(t) = W(0) exp(Xt): along an eigenvector of X with
a negative eigenvalue λ, W dies like exp(−|λ|t). So a direction collapses when **the augmentation moves the data
further along it than the data differ among themselves**.

In this toy the threshold is exact. Let the data be N(0, σ²I), and look at noisy coordinates that W already ignores:
α does not depend on them, so their block of X is (2σ² − k) Σ_i(1 − α_ii) times the identity. Ignoring them is
stable when **k > 2σ²**, and unstable below. (In the paper's units the covariance of a pair's difference is the
identity and the threshold is 1.) Below the threshold the noisy singular values shrink too, but settle at a finite
value. Near it everything slows down, so the count of dead dimensions is claimed only for k ≤ σ² and k ≥ 4σ²; the
growth rate is claimed for every k.

Two traps. Batches drawn *with* replacement contain duplicates, which are negatives at distance zero, and W then
collapses at amplitudes far below the threshold. And a different loss (cosine logits at a temperature, both views
noised) shows no cliff at these amplitudes: the theorem is about this one.

## What it means for someone serving embeddings

If your encoder was trained to ignore something (colour, orientation, the corner of the image), that something is not
in the embedding, however large the embedding is: the dimensions are there and carry nothing. The effective rank of
your embeddings says how many directions are really in use; the band energies say which ones went.

## Source

Jing, Vincent, LeCun, Tian, *Understanding Dimensional Collapse in Contrastive Self-supervised Learning*, ICLR 2022,
arXiv:2110.09348, lemma 2, theorem 1, corollary 1 and figure 3. The threshold k = 2σ² is derived here.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from theory.lab import (
    Claim,
    Line,
    Panel,
    ParameterError,
    Result,
    Settings,
    about,
    below,
    exactly,
    finite,
    parameter,
    where,
)
from theory.toys import F64, attention, batches, covariance, infonce, normal, rank_of, runge_kutta

EXAMPLE = "--amplitude 1 --dimension 24 --noisy 6"
DEAD = 1e-3  # of the largest singular value
RECORDS = 50


class Parameters(Settings):
    amplitude: float = parameter(4.0, "variance k of the augmentation noise", low=0)
    dimension: int = parameter(16, "input and embedding dimension d", low=2, high=256)
    noisy: int = parameter(8, "how many coordinates are noised", low=1)
    variance: float = parameter(1.0, "variance σ² of the data", low=0, open_low=True)
    batch: int = parameter(128, "batch size", low=8, high=1024)
    rate: float = parameter(0.2, "learning rate, in units of 1/σ²", low=0, open_low=True)
    steps: int = parameter(3000, "steps of gradient descent", low=100, high=100_000)

    def check(self) -> None:
        if self.noisy >= self.dimension:
            raise ParameterError(f"noisy must be below dimension ({self.dimension}), not {self.noisy}")
        steepest = max(8.0, self.amplitude / self.variance)  # the sweep goes to k = 8σ²
        if self.rate * steepest > 1.6:  # beyond, a sampled noise covariance overshoots and the noise grows
            raise ParameterError(f"rate must be at most {1.6 / steepest:.3g} for this amplitude, not {self.rate:g}")


def gradient(w: Tensor, x: Tensor, augmented: Tensor) -> Tensor:
    """dL/dW for z = Wx, by differentiating the loss. w (..., p, d); x, augmented (..., n, d)."""
    with torch.enable_grad():
        weight = w.detach().requires_grad_()
        loss = infonce(x @ weight.transpose(-1, -2), augmented @ weight.transpose(-1, -2))
        return torch.autograd.grad(loss.sum(), weight)[0]


def contrast(w: Tensor, x: Tensor, augmented: Tensor) -> Tensor:
    """X = Σ̂₀ − Σ̂₁ of lemma 2, (d, d), by its formula."""
    alpha = attention(x @ w.T, augmented @ w.T)
    off = alpha - torch.diag(alpha.diagonal())
    both = off + off.T  # Σ_ij a_ij (x_i−x_j)(x_i−x_j)ᵀ = xᵀ(D − (a+aᵀ))x with D its row sums
    spread = x.T @ (torch.diag(both.sum(1)) - both) @ x
    moved = augmented - x
    return spread - moved.T @ ((1 - alpha.diagonal())[:, None] * moved)


def train(given: Parameters, amplitudes: list[float], start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient descent for every amplitude at once, same data and noise directions.

    Returns the singular values of W over time (RECORDS + 1, amplitudes, d), the integral of ⟨1 − α_ii⟩ over each record
    (RECORDS, amplitudes), sampled every fifth step, and the last W (amplitudes, d, d).
    """
    rate = given.rate / given.variance
    generator = given.generator()
    data = normal(generator, 10_000, given.dimension) * given.variance**0.5
    scales = torch.tensor(amplitudes, dtype=F64).sqrt()[:, None, None]
    w = start.expand(len(amplitudes), -1, -1).clone()
    every = given.steps // RECORDS
    history, gates = [w], torch.zeros(RECORDS, len(amplitudes), dtype=F64)
    for step, x in enumerate(itertools.islice(batches(data, given.batch, generator), every * RECORDS), start=1):
        noise = torch.zeros_like(x)
        noise[:, -given.noisy :] = normal(generator, given.batch, given.noisy)
        augmented = x + scales * noise
        if step % 5 == 0:
            alpha = attention(x @ w.mT, augmented @ w.mT)
            gates[(step - 1) // every] += (1 - alpha.diagonal(dim1=-2, dim2=-1).mean(-1)) * 5 * rate
        w = w - rate * gradient(w, x.expand(len(amplitudes), -1, -1), augmented) / given.batch
        if step % every == 0:
            history.append(finite(w, "W", step * rate))
    return torch.linalg.svdvals(torch.stack(history)), gates, w


def growth_rates(given: Parameters, ratios: list[float]) -> tuple[list[float], list[float]]:
    """Growth rate of a nearly ignored noisy block, observed and (2σ² − k)(1 − ⟨α_ii⟩), for each k = ratio σ².

    W is a multiple of the identity, 1e-6 of it on the noisy coordinates. The observed rate is the
    change of log |W_noisy|² projected on its start, per unit of time, averaged over fresh batches.
    """
    generator, d, m = given.generator(), given.dimension, given.noisy
    sigma = given.variance**0.5
    w = torch.eye(d, dtype=F64) * (8 / (d - m)) ** 0.5 / sigma  # so that distances, hence α, do not depend on d
    w[:, -m:] *= 1e-6
    observed, predicted = [], []
    for ratio in ratios:
        k, rates, gates = ratio * given.variance, [], []
        for _ in range(100):
            x = normal(generator, given.batch, d) * sigma
            augmented = x.clone()
            augmented[:, -m:] += k**0.5 * normal(generator, given.batch, m)
            slope = -gradient(w, x, augmented)[:, -m:] / given.batch
            rates.append(float((slope * w[:, -m:]).sum() / w[:, -m:].square().sum()))
            gates.append(float(1 - attention(x @ w.T, augmented @ w.T).diagonal().mean()))
        observed.append(sum(rates) / len(rates))
        predicted.append((2 - ratio) * given.variance * sum(gates) / len(gates))
    return observed, predicted


def fixed_contrast(given: Parameters) -> tuple[float, float, float]:
    """dW/dt = WX for one fixed X, integrated: (error against W(0)exp(Xt), observed slowest log-slope, λ_min)."""
    generator, d = given.generator(), given.dimension
    x = normal(generator, given.batch, d)
    augmented = x.clone()
    augmented[:, -given.noisy :] += max(given.amplitude / given.variance, 3.0) ** 0.5 * normal(
        generator, given.batch, given.noisy
    )
    start = normal(generator, d, d) / d**0.5
    field = contrast(start, x, augmented)
    field = field / torch.linalg.eigvalsh(field).abs().max()
    w, states = [start], []
    for _ in range(400):
        w = runge_kutta(lambda state: [state[0] @ field], w, 0.02)
        states.append(w[0])
    exact = start @ torch.matrix_exp(8.0 * field)
    values, vectors = torch.linalg.eigh(field)
    dying = torch.stack([(state @ vectors[:, 0]).norm() for state in (states[199], states[399])]).log()
    return float((w[0] - exact).norm() / exact.norm()), float(dying[1] - dying[0]) / 4.0, float(values[0])


def run(given: Parameters) -> Result:
    d, m, k, unit = given.dimension, given.noisy, given.amplitude, given.variance
    generator = given.generator()
    x = normal(generator, given.batch, d) * unit**0.5
    augmented = x + k**0.5 * normal(generator, given.batch, d)
    probe = normal(generator, d, d) / (unit * d) ** 0.5
    found = gradient(probe, x, augmented)
    identity = float((found + probe @ contrast(probe, x, augmented)).norm() / found.norm())

    error, slope, eigenvalue = fixed_contrast(given)
    ratios = [0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0]
    rates, formula = growth_rates(given, [*ratios, k / unit])
    crossing = next(i for i in range(len(ratios) - 1) if rates[i] > 0 >= rates[i + 1] or i == len(ratios) - 2)
    gap = rates[crossing] - rates[crossing + 1]
    threshold = (ratios[crossing] + (ratios[crossing + 1] - ratios[crossing]) * rates[crossing] / gap) * unit

    start = 4 * (2 * torch.rand(d, d, dtype=F64, generator=generator) - 1) / (d * unit**0.5)
    sweep = [0.5 * unit, unit, 4 * unit, 8 * unit, k]
    history, passed, last = train(given, sweep, start)
    spectra = history[-1]
    dead = (spectra < DEAD * spectra[:, :1]).sum(1).tolist()
    exponents = [2 * unit - value for value in sweep]
    reach = (torch.tensor(exponents) * passed.sum(0)).tolist()
    data = normal(generator, 4000, d) * unit**0.5
    eigenvalues = torch.linalg.eigvalsh(covariance(data @ last[3].T))

    claims: list[Claim] = [
        below("the loss' gradient is −WX", "|G + W(Σ̂₀−Σ̂₁)| / |G|", 1e-10, identity),
        below("fixed X: W follows the exponential", "|W(t) − W(0)exp(Xt)| / |W|", 1e-6, error),
        about("fixed X: W dies along X's negative eigenvector at its eigenvalue", "λ_min(X)", eigenvalue, slope, 1e-6),
        Claim(
            "growth rate of an ignored noisy direction at your k",
            "(2σ² − k)(1 − ⟨α_ii⟩)",
            "≈",
            formula[-1],
            rates[-1],
            0.05 * (abs(formula[-1]) + 0.2 * unit),
        ),
        about("amplitude where that rate changes sign", "k = 2σ²", 2 * unit, threshold, 0.05),
        exactly(
            "k = 8σ²: the embeddings' covariance loses as many ranks (corollary 1)",
            "eigenvalues < 1e-6 λ₁",
            m,
            int((eigenvalues < DEAD**2 * eigenvalues[-1]).sum()),
        ),
        where(
            given.rate * given.steps >= 15 * d,
            f"W still changes: rate times steps is below 15 d = {15 * d}",
            about("k = 8σ²: effective rank of WWᵀ", "d − noisy", d - m, rank_of(last[3] @ last[3].T), 0.12),
        ),
    ]
    for i, name in enumerate(("σ²/2", "σ²", "4σ²", "8σ²", f"{k:g} (yours)")):
        if i == 4 and k in sweep[:4]:
            continue
        visible = int((history[:, i, -1] > 1e-11 * history[:, i, 0]).sum()) - 1  # below that svd returns rounding
        if sweep[i] > 2 * unit and visible >= 4:
            early = visible // 2  # from here on the noisy block is small and the linear law applies
            logs = history[:, i, -m:].log().mean(-1)
            expected = exponents[i] * float(passed[early:visible, i].sum())
            what, law = f"the m smallest log σ of W, mean change, k = {name}", "(2σ² − k) ∫(1 − ⟨α_ii⟩)dt"
            claim = about(what, law, expected, float(logs[visible] - logs[early]), 0.2)
            claims.append(where(expected < -1, "the noisy block hardly shrank in this time", claim))
        if sweep[i] <= unit or reach[i] < 1.1 * math.log(DEAD):  # elsewhere the count still depends on the time
            count = m * (sweep[i] > unit)
            claims.append(exactly(f"dead dimensions, k = {name}", "noisy if k > 2σ², else 0", count, dead[i]))

    times = [index * (given.steps // RECORDS) for index in range(len(history))]
    index = list(range(1, d + 1))
    names = [f"k = {value:g}" for value in sweep]
    over_time = [Line("", times, history[:, 4, i].clamp(min=1e-16).tolist()) for i in range(d)]
    spectrum = [Line(name, index, (s / s[0]).clamp(min=1e-16).tolist()) for name, s in zip(names, spectra, strict=True)]
    return Result(
        claims,
        [
            Panel("Singular values of W after training", "rank", "σ / σ₁", spectrum, log_y=True),
            Panel(f"Singular values over time, k = {k:g}", "step", "σ", over_time, log_y=True),
            Panel(
                "Growth rate of an ignored noisy direction",
                "k / σ²",
                "rate",
                [Line("measured", ratios, rates[:-1], marks=True), Line("formula", ratios, formula[:-1], dashed=True)],
            ),
        ],
    )
