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
λ_c and Barlow Twins collapses like InfoNCE; with 42/d it does not. Between the two the rank rises smoothly, since
encoders in between mix both choices; λ_c is the middle of a slope, not a cliff. The slope is shallow: at a fortieth of
λ_c some 7 % of the noisy directions' rank is still there. Far above λ_c a little rank is lost again, to the noise of
the batch.

All of this is about where descent ends. A claim about an end is asserted if the run has one: between a half of its
steps and all of them the rank, or the loss, moves by less than 2 %.

The rescaled λ has a price. From a batch of B rows even independent outputs show Σ C_ij² ≈ d(d − 1)/B, so redundancy
adds a noise of λd(d − 1)/B that does not carry information. With several layers this noise costs rank again (the
picture's third curve): what cures strong augmentation does not cure depth at the same step size and batch.

## What it means for someone serving embeddings

A hyperparameter copied from a paper with another embedding dimension can silently halve the rank. When you shrink the
projector of a redundancy-reduction method, scale λ with 1/d, and check the effective rank rather than the loss.

## Source

Zbontar, Jing, Misra, LeCun, Deny, *Barlow Twins*, ICML 2021, arXiv:2103.03230. The toys are those of Jing et al.,
arXiv:2110.09348. λ_c and the scaling are derived here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from theory.implicit_regularization import DEEPER, descend, forward, mean_infonce, of_many, stack
from theory.lab import Claim, Line, Panel, ParameterError, Result, Settings, about, above, below, parameter, where
from theory.strong_augmentation import largest_rate
from theory.toys import F64, batches, normal, rank_of

EXAMPLE = "--penalty 0.5 --amplitude 2"
PUBLISHED, PUBLISHED_OUTPUTS = 0.0051, 8192
THRESHOLD = 2.0  # InfoNCE gives a direction up from k = 2 sigma^2 on; see strong-augmentation
STILL = 0.02  # the most that an end moves in the second half of the steps
FAR = 40.0  # the slope is shallow below lambda_c: at a tenth of it 15 % of the lost directions are still there


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


def under_strong_augmentation(given: Parameters, penalties: list[float]) -> tuple[list[Ended], list[Ended], Ended]:
    """One linear layer: effective rank and mean loss for each λ, and InfoNCE's effective rank."""
    d, generator = given.dimension, given.generator()
    scale, test = torch.zeros(d, dtype=F64), normal(generator, 4000, d)
    scale[-given.noisy :] = given.amplitude**0.5
    lam, views = torch.tensor(penalties, dtype=F64), noised_views(given, scale, generator)
    test = test + scale * normal(generator, 4000, d)
    start, trained, rectified = stack([1] * len(penalties), [False] * len(penalties), d, generator)
    half, watch = halfway(given.steps)
    final = descend(lambda a, b: barlow(a, b, lam), start, trained, rectified, views, given.rate, given.steps, watch)
    sums = torch.zeros(2, len(lam), dtype=F64)
    for _ in range(50):
        first, second = views()
        for total, weights in zip(sums, (half[0], final), strict=True):
            total += barlow(forward(weights, first, rectified), forward(weights, second, rectified), lam) / 50
    kept, watch = halfway(given.steps)
    plain = start[:1], trained[:1], rectified[:1]
    # As in strong-augmentation only the second view is noised; with both, 2σ² + 2k − 2k > 0 and nothing dies.
    stream = batches(normal(generator, 10_000, d), given.batch, generator)

    def one_noised() -> tuple[Tensor, Tensor]:
        x = next(stream)
        return x, x + scale * normal(generator, *x.shape)

    rate = min(given.rate, largest_rate(given.amplitude, given.noisy, given.batch))
    contrasted = descend(mean_infonce, *plain, one_noised, rate, given.steps, watch)
    losses = [Ended(*pair) for pair in zip(*sums.tolist(), strict=True)]
    return (
        ended_ranks(half[0], final, rectified, test),
        losses,
        ended_ranks(kept[0], contrasted, rectified[:1], test)[0],
    )


def rises(penalties: list[float], ranks: list[Ended], edge: float, ended: Callable[..., Claim]) -> Claim:
    """The rank grows with λ up to λ_c. Steps of less than a half in λ are skipped: the starts differ by chance."""
    path = [pair for pair in zip(penalties, ranks, strict=True) if pair[0] <= edge]
    pairs = [(low, high) for low, high in itertools.combinations(path, 2) if high[0] >= 1.5 * low[0]]
    step = min(high[1].end - low[1].end for low, high in pairs)
    claim = above("effective rank as λ grows to λ_c: smallest step", "rises", 0, step)
    return ended(claim, *(rank for _, rank in path))


def run(given: Parameters) -> Result:
    d, m, k, deepest = given.dimension, given.noisy, given.amplitude, given.depth
    scaled = PUBLISHED * PUBLISHED_OUTPUTS / d
    infonce, (published, rescaled) = by_depth(given, [PUBLISHED, scaled])
    edge = (d - m) / d * (k / (1 + k)) ** 2
    penalties = sorted({PUBLISHED, edge / 4, edge, 3 * edge, scaled, given.penalty})
    ranks, losses, contrasted = under_strong_augmentation(given, penalties)
    at = dict(zip(penalties, zip(ranks, losses, strict=True), strict=True))
    sampling = d * (d - 1) / (given.batch - 1)  # what independent outputs still show in a batch, times λ
    clean, whole = d * m / (d - m), m * (k / (1 + k)) ** 2
    excess = max(
        loss.end / (min(lam * clean, whole) + lam * sampling)
        for lam, loss in zip(penalties, losses, strict=True)
        if lam > 0
    )

    def ended(claim: Claim, *figures: Ended) -> Claim:
        # A slow descent hardly moves between its half and its end either: W needs the time to grow to its size.
        there = all(it.still for it in figures) and given.rate * given.steps >= 3 * d
        return where(there, f"descent has not ended after {given.steps} steps", claim)

    more = (d - published[-1].end) / (d - infonce[-1].end)
    # As implicit-regularization claims, every layer costs 15 % of the rank, and one layer alone some 10 %.
    lost = below(
        f"InfoNCE: effective rank at {deepest} layers over d",
        "deeper, lower",
        0.65 if deepest > 2 else 0.9 * DEEPER,
        infonce[-1].end / d,
    )
    claims = [
        of_many(d, lost),
        of_many(
            d,
            ended(
                below(
                    f"{deepest} layers: rank that Barlow Twins, λ = 0.0051, loses, over what InfoNCE loses",
                    "redundancy reduction keeps rank",
                    2 / 3,
                    more,
                ),
                published[-1],
            ),
        ),
        ended(
            about(
                "λ = 42/d: the loss it ends with",
                "m(k/(1+k))² min(1, m/d + λ(d−m)/d) + λd(d−1)/(batch−1)",
                whole * min(1, m / d + scaled * (d - m) / d) + scaled * sampling,
                at[scaled][1].end,
                0.1,
            ),
            at[scaled][1],
        ),
        ended(
            below(
                "loss over that of the better extreme, worst λ of the sweep",
                "min(λdm/(d−m), m(k/(1+k))²) + λd(d−1)/(batch−1)",
                1.15,
                excess,
            ),
            *losses,
        ),
        rises(penalties, ranks, edge, ended),
    ]
    if k >= 1.5 * THRESHOLD:
        law = "d − m, if k > 2σ²"
        claim = about("strong augmentation, InfoNCE: effective rank", law, d - m, contrasted.end, 0.1)
        enough = given.rate * given.steps >= 8 * d
        moves = f"W still changes: rate times steps is below 8 d = {8 * d}"
        claims.append(where(enough, moves, ended(claim, contrasted)))
    for name, lam in (("λ = 0.0051", PUBLISHED), ("λ = 42/d", scaled), (f"your λ = {given.penalty:g}", given.penalty)):
        if lam < edge / FAR:
            law, rank = "d − m, if λ ≪ λ_c", d - m
        elif lam > 6 * edge:
            law, rank = "d, if λ ≫ λ_c", d
        else:
            continue
        claim = about(f"strong augmentation, {name}: effective rank", law, rank, at[lam][0].end, 0.1)
        noisy_batch = f"the batch's own noise costs rank: fewer than 8 rows a dimension, {given.batch} for {d}"
        claims.append(where(rank < d or given.batch >= 8 * d, noisy_batch, ended(claim, at[lam][0])))
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
                    Line("Barlow Twins", penalties, [it.end for it in ranks]),
                    Line("λ_c", [edge, edge], [d - m, d], dashed=True),
                    Line("InfoNCE", [penalties[0], penalties[-1]], [contrasted.end] * 2),
                ],
                log_x=True,
            ),
        ],
    )
