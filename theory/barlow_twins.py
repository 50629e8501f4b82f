r"""Redundancy reduction: Barlow Twins beside InfoNCE in the same toys.

Barlow Twins has no negatives. It standardises every output over the batch, forms the cross-correlation C between the
outputs of two views and asks it to be the identity:

    L = Σ_i (1 − C_ii)² + λ Σ_{i≠j} C_ij² .

The second term punishes redundant outputs directly, so one expects more rank. Depth: yes. Where InfoNCE loses
dimensions layer by layer (implicit-regularization), Barlow Twins keeps most of them.

Strong augmentation: it depends on λ, and one can say how. Let m of d inputs carry noise of variance k in both views
and the rest be clean, data N(0, σ²I). A linear encoder has two extreme choices.

- Use the d − m clean directions only. All C_ii = 1, but d outputs in d − m dimensions cannot be uncorrelated: for
  unit vectors Σ_ij C_ij² ≥ d²/(d − m) (Welch), so the loss is at least λ(d²/(d − m) − d) = λ d m/(d − m).
- Use all directions, one an output. No redundancy, but the noisy outputs correlate only σ²/(σ² + k) between the views:
  the loss is m(k/(σ² + k))². (Below λ = 1 a rotation that mixes all of them evenly costs m/d + λ(d − m)/d of that.)

Full rank is the better of the two if

    λ > λ_c = ((d − m)/d) (k/(σ² + k))² .

The published λ = 0.0051 belongs to 8192 outputs. Redundancy has d(d − 1) terms and invariance d, so the balance of the
two goes with λd: the same balance at d outputs is λ = 0.0051·8192/d ≈ 42/d. In a small toy λ = 0.0051 is far below
λ_c and Barlow Twins collapses like InfoNCE; with 42/d it does not.

Between the extremes the rank rises smoothly, and for λ ≤ 1 the best encoder is known in closed form. Let
q = σ²/(σ² + k), and let the outputs' d units of variance be shared out, a for a clean and b for a noisy direction. The
best share is

    b = λ(m/(d−m) + q) / ((1−λ)m(1−q)²/d + λ(m/(d−m) + q²)),    a = (d − mb)/(d − m),

and the effective rank that of a spectrum with d − m eigenvalues a and m eigenvalues b. λ_c is the middle of this slope,
not a cliff. An encoder whose loss exceeds the least by E, for whatever reason, has a share within √(E/mA) of b, A the
denominator above; for λ > 1 the same holds with λ = 1. The effective rank has bounds of the same kind. So the claims
about rank and share need no end of the descent: they are as sharp as its loss is near to the least. A claim about the
loss itself needs an end: between a half of the steps and all of them it moves by less than 2 %. The loss on a batch is
known too, entry by entry, from the law of the correlation of two normal variables over so many rows.

The rescaled λ has a price. From a batch of B rows even independent outputs show Σ C_ij² ≈ d(d − 1)/B, so redundancy
adds a noise of λd(d − 1)/B that does not carry information. With several layers this noise costs rank again (the
picture's third curve): what cures strong augmentation does not cure depth at the same step size and batch.

## What it means for someone serving embeddings

A hyperparameter copied from a paper with another embedding dimension can silently halve the rank. When you shrink the
projector of a redundancy-reduction method, scale λ with 1/d, and check the effective rank rather than the loss.

## Source

Zbontar, Jing, Misra, LeCun, Deny, *Barlow Twins*, ICML 2021, arXiv:2103.03230. The toys are those of Jing et al.,
arXiv:2110.09348. λ_c, the closed form and the scaling are derived here; Hotelling, *New light on the correlation
coefficient*, 1953, has the moments of a correlation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from theory.implicit_regularization import DEEPER, descend, forward, mean_infonce, of_many, stack
from theory.lab import Claim, Line, Panel, ParameterError, Result, Settings, about, above, below, parameter, where
from theory.redundancy import Best, batch_loss, best, endless_loss, outputs, reachable
from theory.strong_augmentation import largest_rate
from theory.toys import F64, batches, normal, rank_of

EXAMPLE = "--penalty 0.5 --amplitude 2"
PUBLISHED, PUBLISHED_OUTPUTS = 0.0051, 8192
THRESHOLD = 2.0  # InfoNCE gives a direction up from k = 2 sigma^2 on; see strong-augmentation
# The most that an end moves in the second half of the steps. An exponential approach falls in it by the factor by which
# it fell in the first: the square of this, 4e-4, is left then.
STILL = 0.02
# Times before which a figure that stands still has not ended but not begun, in units of d: what a sweep of random
# parameters showed, not a law. W must grow to its size first.
BEGUN, GROWN = 3, 8
FRESH = 200  # batches over which the loss is averaged


class Parameters(Settings):
    dimension: int = parameter(16, "width d of every layer", low=4, high=128)
    depth: int = parameter(4, "deepest network", low=2, high=6)
    penalty: float = parameter(1.0, "a λ of your own for the strong-augmentation sweep", low=0, open_low=True, high=20)
    amplitude: float = parameter(4.0, "variance k of the strong augmentation noise", low=0.1, high=20)
    noisy: int = parameter(8, "how many coordinates carry it", low=1)
    batch: int = parameter(128, "batch size, at least 4 per dimension", low=32, high=1024)
    rate: float = parameter(0.1, "learning rate", low=0, open_low=True)
    steps: int = parameter(1500, "steps of gradient descent", low=100, high=100_000)

    def check(self) -> None:
        if self.noisy >= self.dimension:
            raise ParameterError(f"noisy must be below dimension ({self.dimension}), not {self.noisy}")
        if self.batch < 4 * self.dimension:
            raise ParameterError(f"batch must be at least 4 per dimension ({4 * self.dimension}), not {self.batch}")


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """C (..., d, d) between the outputs of two views (..., n, d), each standardised over its rows."""

    def standard(z: Tensor) -> Tensor:
        centred = z - z.mean(-2, keepdim=True)
        scaled: Tensor = centred / centred.norm(dim=-2, keepdim=True)
        return scaled

    return standard(first).mT @ standard(second)


def barlow(first: Tensor, second: Tensor, penalty: Tensor | float) -> Tensor:
    """The loss, one value per leading index; penalty is λ, a number or (k,)."""
    c = correlation(first, second)
    diagonal = c.diagonal(dim1=-2, dim2=-1)
    redundancy = c.square().sum((-2, -1)) - diagonal.square().sum(-1)
    return (1 - diagonal).square().sum(-1) + penalty * redundancy


def noised_views(given: Parameters, scale: Tensor, generator: torch.Generator) -> Callable[[], tuple[Tensor, Tensor]]:
    """Batches of N(0, I) without replacement, noise of standard deviation scale (d,) on both views."""
    stream = batches(normal(generator, 10_000, given.dimension), given.batch, generator)

    def draw() -> tuple[Tensor, Tensor]:
        x = next(stream)
        return x + scale * normal(generator, *x.shape), x + scale * normal(generator, *x.shape)

    return draw


def ranks_of(weights: Tensor, rectified: Tensor, x: Tensor) -> list[float]:
    """Effective rank of each network's standardised outputs."""
    z = forward(weights, x, rectified)
    return [rank_of(each) for each in correlation(z, z)]


@dataclass(frozen=True)
class Ended:
    """A figure after half of the steps and after all."""

    half: float
    end: float

    @property
    def still(self) -> bool:
        """Whether the second half of the steps moved it by less than STILL."""
        return abs(self.half / self.end - 1) < STILL


def halfway(steps: int) -> tuple[list[Tensor], Callable[[int, Tensor], None]]:
    """A list that will hold the weights at the half of the run, and the watch that puts them there."""
    kept: list[Tensor] = []
    return kept, lambda step, weights: kept.append(weights) if step >= steps // 2 and not kept else None


def by_depth(given: Parameters, penalties: list[float]) -> tuple[list[Ended], list[list[Ended]]]:
    """Effective ranks for depths 1, 2, …: InfoNCE's, and Barlow Twins' for every λ; same data law, same start law."""
    d, generator, depths = given.dimension, given.generator(), list(range(1, given.depth + 1))
    weak, test = torch.full((d,), 0.1, dtype=F64), normal(generator, 4000, d)
    found = []
    for loss, lam in ((None, penalties[:1]), (barlow, penalties)):
        copies = depths * len(lam)
        start, trained, rectified = stack(copies, [False] * len(copies), d, generator)
        spread = torch.tensor(lam, dtype=F64).repeat_interleave(len(depths))
        views = noised_views(given, weak, generator)
        chosen = mean_infonce if loss is None else lambda a, b, spread=spread: barlow(a, b, spread)
        half, watch = halfway(given.steps)
        final = descend(chosen, start, trained, rectified, views, given.rate, given.steps, watch)
        ranks = ended_ranks(half[0], final, rectified, test)
        found.append([ranks[i : i + len(depths)] for i in range(0, len(ranks), len(depths))])
    return found[0][0], found[1]


def ended_ranks(half: Tensor, final: Tensor, rectified: Tensor, x: Tensor) -> list[Ended]:
    return [Ended(*pair) for pair in zip(*(ranks_of(w, rectified, x) for w in (half, final)), strict=True)]


@dataclass(frozen=True)
class Strong:
    """One linear layer under strong augmentation, trained for each λ of `penalties`."""

    penalties: list[float]
    ranks: list[float]
    endless: list[float]  # loss on endless data
    on_batches: list[Ended]  # expected loss on a batch
    shares: list[float]  # of a noisy direction
    errors: float  # largest deviation of a sampled batch loss from its expectation, in standard errors
    contrasted: Ended  # InfoNCE's effective rank
    best: list[Best]

    @property
    def within(self) -> list[float]:
        """How far from the best one the share can be, at each λ's loss."""
        return [it.share_within(loss) for it, loss in zip(self.best, self.endless, strict=True)]

    def at(self, penalty: float) -> int:
        return self.penalties.index(penalty)


def sampled(given: Parameters, weights: Tensor, lam: Tensor, scale: Tensor, generator: torch.Generator) -> float:
    """The mean loss of encoders (k, d, d) on new batches against its expectation: the worst in standard errors."""
    losses = []
    for _ in range(FRESH):
        x = normal(generator, given.batch, given.dimension)
        first, second = (x + scale * normal(generator, *x.shape) for _ in range(2))
        losses.append(barlow(first @ weights.mT, second @ weights.mT, lam))
    seen = torch.stack(losses)
    expected = batch_loss(outputs(weights, given.noisy, given.amplitude)[0], lam, given.batch)
    worst = float(((seen.mean(0) - expected) / seen.std(0)).abs().max())
    return worst * math.sqrt(FRESH)


def under_strong_augmentation(given: Parameters, penalties: list[float]) -> Strong:
    """Train one linear layer for each λ, and one with InfoNCE."""
    d, m, k, generator = given.dimension, given.noisy, given.amplitude, given.generator()
    scale, test = torch.zeros(d, dtype=F64), normal(generator, 4000, d)
    scale[-m:] = k**0.5
    lam, views = torch.tensor(penalties, dtype=F64), noised_views(given, scale, generator)
    test = test + scale * normal(generator, 4000, d)
    start, trained, rectified = stack([1] * len(penalties), [False] * len(penalties), d, generator)
    half, watch = halfway(given.steps)
    final = descend(lambda a, b: barlow(a, b, lam), start, trained, rectified, views, given.rate, given.steps, watch)
    cross, spread = outputs(final[:, 0], m, k)
    losses = [batch_loss(c, lam, given.batch) for c in (outputs(half[0][:, 0], m, k)[0], cross)]
    kept, watch = halfway(given.steps)
    plain = start[:1], trained[:1], rectified[:1]
    # As in strong-augmentation only the second view is noised; with both, 2σ² + 2k − 2k > 0 and nothing dies.
    stream = batches(normal(generator, 10_000, d), given.batch, generator)

    def one_noised() -> tuple[Tensor, Tensor]:
        x = next(stream)
        return x, x + scale * normal(generator, *x.shape)

    rate = min(given.rate, largest_rate(k, m, given.batch))
    contrasted = descend(mean_infonce, *plain, one_noised, rate, given.steps, watch)
    return Strong(
        penalties,
        [rank_of(each) for each in spread],
        endless_loss(cross, lam).tolist(),
        [Ended(*pair) for pair in zip(*(it.tolist() for it in losses), strict=True)],
        spread.diagonal(dim1=-2, dim2=-1)[:, -m:].mean(1).tolist(),
        sampled(given, final[:, 0], lam, scale, generator),
        ended_ranks(kept[0], contrasted, rectified[:1], test)[0],
        [best(d, m, k, each) for each in penalties],
    )


def nearest(seen: Strong) -> list[Claim]:
    """What holds of any encoder: its loss is above the least, and its share near to the best one's."""
    excess = min(loss / it.loss for loss, it in zip(seen.endless, seen.best, strict=True))
    pairs = zip(seen.shares, seen.best, seen.within, strict=True)
    off = max(abs(share - it.share) / within for share, it, within in pairs)
    order = itertools.combinations(zip(seen.best, seen.within, seen.shares, strict=True), 2)
    steps = [high[2] - low[2] for low, high in order if high[0].share - high[1] > low[0].share + low[1]]
    law = "closed form for λ ≤ 1, and its value at 1 above"
    told_apart = "the losses leave no two shares apart: descent has not come near enough to the least"
    return [
        below("batch loss of the trained encoders: deviation in standard errors", "the law of r", 5, seen.errors),
        above("loss on endless data over the least there is, smallest of the sweep", law, 1 - 1e-12, excess),
        below("share of a noisy direction: |b − b*| over what the loss allows", "√(E/mA)", 1 + 1e-9, off),
        where(bool(steps), told_apart, above("share b as λ grows: smallest step", "rises", 0, min(steps, default=0.0))),
    ]


def rank_left(name: str, penalty: float, seen: Strong) -> Claim:
    """The effective rank at λ, between its bounds at the loss; they must leave less open than the noisy directions."""
    index = seen.at(penalty)
    it, loss = seen.best[index], seen.endless[index]
    low, high = it.ranks(loss)
    law = "of a, b at the loss' distance from the least"
    what = f"strong augmentation, {name}: effective rank"
    claim = Claim(what, law, "≈", (low + high) / 2, seen.ranks[index], (high - low) / 2 + 1e-9)
    wide = f"the loss, {loss:.3g} against {it.loss:.3g} at least, leaves {high - low:.2g} dimensions open"
    return where(high - low < it.noisy, wide, claim)


def run(given: Parameters) -> Result:
    d, m, k, deepest = given.dimension, given.noisy, given.amplitude, given.depth
    scaled = PUBLISHED * PUBLISHED_OUTPUTS / d
    infonce, (published, rescaled) = by_depth(given, [PUBLISHED, scaled])
    edge = (d - m) / d * (k / (1 + k)) ** 2
    penalties = sorted({PUBLISHED, edge / 4, edge, 3 * edge, scaled, given.penalty})
    seen = under_strong_augmentation(given, penalties)
    sampling = d * (d - 1) / (given.batch - 1)  # what independent outputs still show in a batch, times λ
    excess = max(
        loss.end / (reachable(d, m, k, lam) + lam * sampling)
        for lam, loss in zip(penalties, seen.on_batches, strict=True)
    )

    def ended(claim: Claim, *figures: Ended) -> Claim:
        there = all(it.still for it in figures) and given.rate * given.steps >= BEGUN * d
        return where(there, f"descent has not ended after {given.steps} steps", claim)

    # 2/3 and 1.15 are chosen, not derived: what "keeps rank" and "comes near the best" are taken to mean.
    more = (d - published[-1].end) / (d - infonce[-1].end)
    deeper, kept = "deeper, lower", "redundancy reduction keeps rank"
    what = f"{deepest} layers: rank that Barlow Twins, λ = 0.0051, loses, over what InfoNCE loses"
    lost = f"InfoNCE: effective rank at {deepest} layers over that at one"
    claims = [
        of_many(d, below(lost, deeper, DEEPER ** (deepest - 1), infonce[-1].end / infonce[0].end)),
        of_many(d, ended(below(what, kept, 2 / 3, more), published[-1])),
        *nearest(seen),
        ended(
            below(
                "expected batch loss over that of the best encoder, worst λ of the sweep",
                "least loss, or m(k/(1+k))² for λ > 1, + λd(d−1)/(batch−1)",
                1.15,
                excess,
            ),
            *seen.on_batches,
        ),
    ]
    if k >= 1.5 * THRESHOLD:
        law = "d − m, if k > 2σ²"
        claim = about("strong augmentation, InfoNCE: effective rank", law, d - m, seen.contrasted.end, 0.1)
        enough = given.rate * given.steps >= GROWN * d
        moves = f"W still changes: rate times steps is below {GROWN} d = {GROWN * d}"
        claims.append(where(enough, moves, ended(claim, seen.contrasted)))
    named = (("λ = 0.0051", PUBLISHED), ("λ = 42/d", scaled), (f"your λ = {given.penalty:g}", given.penalty))
    claims += [rank_left(name, lam, seen) for name, lam in named]
    depths = list(range(1, deepest + 1))
    return Result(
        claims,
        [
            Panel(
                "Weak augmentation: rank against depth",
                "layers",
                "effective rank",
                [
                    Line("InfoNCE", depths, [it.end for it in infonce]),
                    Line("Barlow Twins, λ = 0.0051", depths, [it.end for it in published]),
                    Line("Barlow Twins, λ = 42/d", depths, [it.end for it in rescaled]),
                ],
            ),
            Panel(
                f"Strong augmentation, k = {k:g}, one layer",
                "λ",
                "effective rank",
                [
                    Line("Barlow Twins", penalties, seen.ranks, marks=True),
                    Line("the best encoder, λ ≤ 1", *closed_form(given, penalties[0]), dashed=True),
                    Line("λ_c", [edge, edge], [d - m, d], dashed=True),
                    Line("InfoNCE", [penalties[0], penalties[-1]], [seen.contrasted.end] * 2),
                ],
                log_x=True,
            ),
        ],
    )


def closed_form(given: Parameters, least: float) -> tuple[list[float], list[float]]:
    """λ from the least one to 1, and the best encoder's effective rank."""
    grid = torch.logspace(math.log10(least), 0, 60, dtype=F64).tolist()
    return grid, [best(given.dimension, given.noisy, given.amplitude, lam).rank() for lam in grid]
