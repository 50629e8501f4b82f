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
α does not depend on them, so their block of X is (2σ² − k) Σ_i(1 − α_ii) times the identity, on average. Ignoring them
is stable when **k > 2σ²**, and unstable below. (In the paper's units the covariance of a pair's difference is the
identity and the threshold is 1.) Below the threshold the noisy singular values shrink too, but settle at a finite
value. Near it everything slows down, so nothing is said of dead dimensions between σ² and 2σ².

Gradient descent takes steps of a finite rate η along an X that a batch of B rows estimates. A step multiplies the noisy
block by I + ηX/B, of mean u = 1 + η(2σ² − k)(1 − ⟨α_ii⟩), and the noise s² of its entries and c² of its coupling to the
clean coordinates (both follow from α, σ² and k) have a say at second order: the m smallest log σ change by
ln u − s²(m + 1)/2u² − c²(1/u + ½) a step on average, the slowest by at most ½ ln(u² + s²(m + 1)). Three domains follow.

- If u² + s²(m + 1) > 1, which at α = 0 and k ≥ 2σ² is η > 2(k − 2σ²)/((k − 2σ²)² + (k² + 4σ⁴)(m + 1)/B), the noise of
  the batch wins and W grows without bound. Such a rate is refused.
- The mean law is claimed from the time on when the m smallest singular values are the noisy block's (nine tenths of the
  square of each of their right singular vectors lie in the noisy coordinates) and the block moves no logit by more than
  0.1, k Σσ²/2 < 0.1, and while the noise is less than a third of it. The noise must be small in size too, not only in
  every entry: the row of the batch with the most open gate multiplies the block by I − h eeᵀ, h = ηk(1 − α_ii)/B, where
  |e|² is m on average. If hm comes near u, the step can make the block singular and its log σ fall without bound, which
  no second order knows. The law is claimed while this kick hm/u is below a quarter.
- That all m are dead at the end is claimed if the slowest, followed by its bound from that time or from the start, is
  dead with four standard deviations to spare.

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
import statistics
from dataclasses import dataclass

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
from theory.noisy_steps import steps_of, variance
from theory.toys import F64, attention, batches, covariance, infonce, normal, rank_of, runge_kutta

EXAMPLE = "--amplitude 1 --dimension 24 --noisy 6"
DEAD = 1e-3  # of the largest singular value
RECORDS = 50
EVERY = 5  # steps between two looks at the attention, at most; short runs, which change fast, are looked at more often
LINEAR = 0.1  # change of a logit by the noisy block, below which the block's equation is linear
KICK = 0.25  # below it the second order is right to an eighth of what one row moves: see `noisy_steps`
OVERLAP = 0.9  # squared cosine to the noisy coordinates from which on a direction of W counts as the noisy block's


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
        # the sweep goes to k = 8σ²
        most = largest_rate(max(8.0, self.amplitude / self.variance), self.noisy, self.batch)
        if self.rate > most:
            raise ParameterError(
                f"rate must be at most {most:.3g} for this amplitude, batch and noisy, not {self.rate:g}"
            )


def largest_rate(ratio: float, noisy: int, batch: int) -> float:
    """The rate, in units of 1/σ², beyond which an ignored noisy block grows instead of dying at k = ratio σ² > 2σ²."""
    pull, noise = ratio - 2, (ratio * ratio + 4) * (noisy + 1) / batch
    return min(1.6 / ratio, 2 * pull / (pull * pull + noise)) if pull > 0 else 1.6 / max(ratio, 1.0)


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


@dataclass(frozen=True)
class Course:
    """A training: W's singular values over time (RECORDS + 1, amplitudes, d), and what the attention says of a step.

    overlap: squared cosine of the largest angle between the m smallest right singular vectors and the noisy
    coordinates, (RECORDS + 1, amplitudes).
    mean, taken, slowest, fastest and spread are sums of the laws of `noisy_steps` over each record, (RECORDS,
    amplitudes); `roughest` and `kick` are the largest correction and the largest kick of a step in each, and `last` the
    last W (amplitudes, d, d).
    """

    history: Tensor
    overlap: Tensor
    mean: Tensor
    taken: Tensor
    slowest: Tensor
    fastest: Tensor
    spread: Tensor
    roughest: Tensor
    kick: Tensor
    last: Tensor


def train(given: Parameters, amplitudes: list[float], start: Tensor) -> Course:
    """Gradient descent for every amplitude at once, same data and noise directions."""
    rate = given.rate / given.variance
    generator = given.generator()
    data = normal(generator, 10_000, given.dimension) * given.variance**0.5
    k = torch.tensor(amplitudes, dtype=F64)
    w = start.expand(len(amplitudes), -1, -1).clone()
    every = given.steps // RECORDS
    apart = min(EVERY, max(1, every // 10))
    history, sums = [w], torch.zeros(5, RECORDS, len(amplitudes), dtype=F64)
    looks, most = torch.zeros(RECORDS, 1, dtype=F64), torch.zeros(2, RECORDS, len(amplitudes), dtype=F64)
    for step, x in enumerate(itertools.islice(batches(data, given.batch, generator), every * RECORDS), start=1):
        noise = torch.zeros_like(x)
        noise[:, -given.noisy :] = normal(generator, given.batch, given.noisy)
        augmented = x + k.sqrt()[:, None, None] * noise
        if step % apart == 0:
            alpha = attention(x @ w.mT, augmented @ w.mT)
            law = steps_of(alpha, x[:, : -given.noisy], k, given.variance, rate, given.noisy)
            laws = (law.mean(), law.correction(), law.slowest(), law.fastest(), law.spread())
            record = (step - 1) // every
            sums[:, record] += torch.stack(laws)
            most[:, record] = torch.maximum(most[:, record], torch.stack((law.correction(), law.kick)))
            looks[record] += 1
        w = w - rate * gradient(w, x.expand(len(amplitudes), -1, -1), augmented) / given.batch
        if step % every == 0:
            history.append(finite(w, "W", step * rate))
    mean, taken, slowest, fastest, spread = sums * every / looks  # a record need not hold a whole number of looks
    _, sizes, vectors = torch.linalg.svd(torch.stack(history))
    overlap = torch.linalg.svdvals(vectors[..., -given.noisy :, -given.noisy :])[..., -1].square()
    return Course(sizes, overlap, mean, taken, slowest, fastest, spread, most[0], most[1], w)


@dataclass(frozen=True)
class Growth:
    """Growth rate of a nearly ignored noisy block at k = ratio σ²: seen, by the formula, and its standard error."""

    ratio: float
    seen: float
    formula: float
    error: float
    gate: float


def growth_rates(given: Parameters, ratios: list[float]) -> list[Growth]:
    """The rate observed and (2σ² − k)(1 − ⟨α_ii⟩), for each k = ratio σ².

    W is a multiple of the identity, 1e-6 of it on the noisy coordinates. The observed rate is the
    change of log |W_noisy|² projected on its start, per unit of time, averaged over fresh batches.
    """
    generator, d, m, batch = given.generator(), given.dimension, given.noisy, given.batch
    sigma = given.variance**0.5
    w = torch.eye(d, dtype=F64) * (8 / (d - m)) ** 0.5 / sigma  # so that distances, hence α, do not depend on d
    w[:, -m:] *= 1e-6
    found = []
    for ratio in ratios:
        k = torch.tensor(ratio * given.variance, dtype=F64)
        rates, gates, variances = [], [], []
        for _ in range(100):
            x = normal(generator, batch, d) * sigma
            augmented = x.clone()
            augmented[:, -m:] += k.sqrt() * normal(generator, batch, m)
            slope = -gradient(w, x, augmented)[:, -m:] / batch
            rates.append(float((slope * w[:, -m:]).sum() / w[:, -m:].square().sum()))
            alpha = attention(x @ w.T, augmented @ w.T)
            gates.append(float(1 - alpha.diagonal().mean()))
            # the mean of m diagonal entries, each of variance 2v
            variances.append(2 * float(variance(alpha, k, given.variance)) / (m * batch**2))
        gate = statistics.fmean(gates)
        formula = (2 - ratio) * given.variance * gate
        found.append(Growth(ratio, statistics.fmean(rates), formula, math.sqrt(sum(variances)) / len(rates), gate))
    return found


def crossing(found: list[Growth], unit: float) -> tuple[float, float]:
    """The k where the line through the rates over their gates is zero, and its standard error."""
    x = torch.tensor([each.ratio for each in found], dtype=F64)
    y = torch.tensor([each.seen / (each.gate * unit) for each in found], dtype=F64)
    weight = torch.tensor([(each.gate * unit / each.error) ** 2 for each in found], dtype=F64)
    design = torch.stack([torch.ones_like(x), x - 2], 1)
    covariance_of = torch.linalg.inv(design.T @ (weight[:, None] * design))
    level, slope = covariance_of @ design.T @ (weight * y)
    return float(2 - level / slope) * unit, float(covariance_of[0, 0].sqrt() / slope.abs()) * unit


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


def linear_from(given: Parameters, course: Course, i: int, k: float) -> int | None:
    """The record from which on the m smallest singular values are the noisy block, and too small to move a logit."""
    sizes = course.history[:, i]
    block = sizes[:, -given.noisy :]
    # A random W has small singular values of its own, which are not the noisy block's.
    is_block = (sizes[:, -given.noisy - 1] > 3 * block[:, 0]) & (course.overlap[:, i] > OVERLAP)
    ready = (k * block.square().sum(-1) / 2 < LINEAR) & is_block
    late = (~ready).nonzero()
    first = int(late[-1]) + 1 if len(late) else 0
    return first if first < len(sizes) else None


def mean_law(given: Parameters, course: Course, i: int, k: float, name: str) -> Claim:
    """The mean change of the m smallest log σ against the law of discrete, noisy steps."""
    m, sizes = given.noisy, course.history[:, i]
    visible = int((sizes[:, -1] > 1e-11 * sizes[:, 0]).sum()) - 1  # below that svd returns rounding
    early = linear_from(given, course, i, k)
    first = visible if early is None or early > visible else early
    expected, taken = float(course.mean[first:visible, i].sum()), float(course.taken[first:visible, i].sum())
    change = sizes[visible, -m:].log().mean() - sizes[first, -m:].log().mean()
    error = 4 * math.sqrt(float(course.spread[first:visible, i].sum()) / m)
    what, law = f"the m smallest log σ of W, mean change, k = {name}", "Σ ln u − s²(m+1)/2u² − c²(1/u + ½)"
    claim = Claim(what, law, "≈", expected, float(change), max(0.15 * abs(expected), error))
    if first == visible:
        return where(False, "the noisy block is never small, or at once too small for float64", claim)
    if not math.isfinite(expected) or taken > abs(expected) / 3:
        return where(False, "the noise of the batch is more than a third of the law", claim)
    # The law is of second order in the noise of a step; the terms left out are some 3t of the correction t of a step.
    once = float(course.roughest[first:visible, i].max())
    claim = where(once < 0.05, f"the noise of one batch moves log σ by {once:.2g}: more than second order", claim)
    kick = float(course.kick[first:visible, i].max())
    claim = where(
        kick < KICK, f"one row's noise moves the block by {kick:.2g} of itself: more than second order", claim
    )
    return where(expected < -1, "the noisy block hardly shrank in this time", claim)


def count_of_dead(given: Parameters, course: Course, i: int, k: float, claim: Claim) -> Claim:
    """`claim` on the number of dead dimensions, in its domain: where the laws say that all, or none, must be dead."""
    sizes, m = course.history[:, i], given.noisy
    need, top = math.log(DEAD), float(sizes[-1, 0].log())
    if k > 2 * given.variance:
        # From the start the bound holds as well: α that feels the noise shrinks the block faster than α that does not.
        froms = [(0, float(sizes[0, 0].log()))]
        if (early := linear_from(given, course, i, k)) is not None:
            froms.append((early, float(sizes[early, -m].log())))
        ends = [
            largest - top + float(course.slowest[at:, i].sum()) + 4 * math.sqrt(float(course.spread[at:, i].sum()))
            for at, largest in froms
        ]
        return where(min(ends) < need, "the slowest direction need not be dead yet", claim)
    if k > given.variance:
        return where(False, "near the threshold everything is slow: k is between σ² and 2σ²", claim)
    half = RECORDS // 2
    drift, noise = (float(each[half:, i].sum()) for each in (course.fastest, course.spread))
    grown = float(sizes[0, -1].log()) - top + float(course.fastest[:, i].sum())
    alive = drift > noise and grown - 4 * math.sqrt(float(course.spread[:, i].sum())) > need
    return where(alive, "the noise of the batch, or the start, can take a direction that the mean would keep", claim)


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
    *growth, own = growth_rates(given, [*ratios, k / unit])
    threshold, uncertain = crossing(growth, unit)

    start = 4 * (2 * torch.rand(d, d, dtype=F64, generator=generator) - 1) / (d * unit**0.5)
    sweep = [0.5 * unit, unit, 4 * unit, 8 * unit, k]
    course = train(given, sweep, start)
    history, last = course.history, course.last[3]
    spectra = history[-1]
    data = normal(generator, 4000, d) * unit**0.5
    eigenvalues = torch.linalg.eigvalsh(covariance(data @ last.T))
    lost = int((eigenvalues < DEAD**2 * eigenvalues[-1]).sum())

    claims: list[Claim] = [
        below("the loss' gradient is −WX", "|G + W(Σ̂₀−Σ̂₁)| / |G|", 1e-10, identity),
        below("fixed X: W follows the exponential", "|W(t) − W(0)exp(Xt)| / |W|", 1e-6, error),
        about("fixed X: W dies along X's negative eigenvector at its eigenvalue", "λ_min(X)", eigenvalue, slope, 1e-6),
        Claim(
            "growth rate of an ignored noisy direction at your k",
            "(2σ² − k)(1 − ⟨α_ii⟩)",
            "≈",
            own.formula,
            own.seen,
            max(0.01 * abs(own.formula), 4 * own.error),
        ),
        Claim(
            "amplitude where that rate changes sign",
            "k = 2σ²",
            "≈",
            2 * unit,
            threshold,
            max(0.02 * unit, 4 * uncertain),
        ),
        count_of_dead(
            given,
            course,
            3,
            8 * unit,
            exactly("k = 8σ²: the embeddings' covariance loses as many ranks (corollary 1)", "λ < 1e-6 λ₁", m, lost),
        ),
        where(
            given.rate * given.steps >= 15 * d,
            f"W still changes: rate times steps is below 15 d = {15 * d}",
            about("k = 8σ²: effective rank of WWᵀ", "d − noisy", d - m, rank_of(last @ last.T), 0.12),
        ),
    ]
    for i, name in enumerate(("σ²/2", "σ²", "4σ²", "8σ²", f"{k:g} (yours)")):
        if i == 4 and k in sweep[:4]:
            continue
        if sweep[i] > 2 * unit:
            claims.append(mean_law(given, course, i, sweep[i], name))
        dead = int((spectra[i] < DEAD * spectra[i, 0]).sum())
        law = "noisy if k > 2σ², else 0"
        claim = exactly(f"dead dimensions, k = {name}", law, m if sweep[i] > unit else 0, dead)
        claims.append(count_of_dead(given, course, i, sweep[i], claim))

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
                [
                    Line("measured", ratios, [each.seen for each in growth], marks=True),
                    Line("formula", ratios, [each.formula for each in growth], dashed=True),
                ],
            ),
        ],
    )
