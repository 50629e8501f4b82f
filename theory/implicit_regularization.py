r"""Depth alone costs dimensions: implicit regularisation.

Without strong augmentation, and with a single linear layer, InfoNCE keeps every dimension. Put a second linear layer
behind the first, z = W₂W₁x: the set of functions is the same, the gradient flow is not. With G = −W₂W₁X
(X = Σ̂₀ − Σ̂₁ as in strong-augmentation, here positive definite) it is

    Ẇ₁ = −W₂ᵀG,   Ẇ₂ = −GW₁ᵀ,   and   W₁W₁ᵀ − W₂ᵀW₂   is conserved.

Two things follow. **The layers align**: with singular value decompositions W₁ = U₁S₁V₁ᵀ, W₂ = U₂S₂V₂ᵀ the matrix
V₂ᵀU₁ tends to the identity, for those modes that have grown. And **large singular values grow faster than small ones**:
once aligned,

    σ̇₁ᵏ = σ₁ᵏ (σ₂ᵏ)² x_k,    x_k = v₁ᵏᵀ X v₁ᵏ .

For L balanced layers that is σ̇ = σ^{2L−1} x_k, with the solution

    σ(t) = σ₀ exp(x_k t)  for L = 1,        σ(t) = σ₀ (1 − (2L−2) σ₀^{2L−2} x_k t)^{−1/(2L−2)}  for L ≥ 2.

One layer grows all modes by a common factor; from two layers on the growth is faster than exponential, the head start
of the largest singular values becomes a lead, and the smallest stay near zero. **The deeper, the lower the rank.** The
contrastive loss stops growing directions once pairs are told apart, so a finite number of modes has made it by then.
ReLU networks do the same.

A word on alignment: when singular values coincide their vectors are arbitrary and |V₂ᵀU₁| need not look like the
identity. The cosine between the matrices W₁W₁ᵀ and W₂ᵀW₂ has no such problem and is used here beside the leading
entries of V₂ᵀU₁. Steps of a finite rate do not conserve the difference: a step (ΔW₁, ΔW₂) changes it by exactly ΔW₁ΔW₁ᵀ
− ΔW₂ᵀΔW₂, since the terms of first order cancel. Let D be the start's difference and those of all steps, without the
part along W₁W₁ᵀ, which only scales. The sine of the angle between the matrices is |D|/|W₂ᵀW₂|, and by Davis and Kahan a
vector whose eigenvalue is a distance g from all others of the other matrix turns by an angle of sine |D|/g at most: the
claims are made where the steps' share of |D| is below 0.03|W₂ᵀW₂|, and where |D| is below 0.14g. (The two norms differ
tenfold where a few long steps make only one of the layers large.) A mode of size σ needs the time 1/(4σ²) at least to
grow, since x ≤ 2; the gap is claimed to widen where the smallest has had less than half of it.

What is said of dead dimensions after training is said of the flow. A first step of a large rate can be the whole
training: a layer grows by a factor of 1 + 2η(1 − ⟨α_ii⟩) in it, all pairs are told apart at once, and the loss stops.
Then W is a random start times the X of one batch, which stretches only the directions that a few rows see; what was
dead at the start stays dead, and what the flow would kill is never reached. So the largest step's share of the growth
of log |W| is measured. Where **one step is more than all others together**, nothing is claimed.

## What it means for someone serving embeddings

A deep projection head in front of the loss, or an embedding taken from its output, has a low rank by construction: the
dimension of the vector is not the dimension of the information. Serve the layer *before* the head, and size indexes by
effective rank, not by length.

## Source

Jing, Vincent, LeCun, Tian, ICLR 2022, arXiv:2110.09348, section 5, theorems 2 and 3, figures 5, 6 and 11. The closed
form for L layers is derived here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from theory.lab import Claim, Line, Panel, Result, Settings, above, below, finite, parameter, where
from theory.toys import F64, batches, covariance, infonce, normal, orthogonal, rank_of, runge_kutta

EXAMPLE = "--depth 3 --dimension 24"
DEAD = 1e-2  # of the largest covariance eigenvalue
# Of the rank is left, at most, by layer L after L − 1. A random start alone leaves e^(−1/(L + 1)), .72 for the second
# layer and .82 for the fourth (the entropy of the Fuss-Catalan law is 1/2 + … + 1/(L + 1)), and training widens gaps.
DEEPER = 0.85
FEW = 8  # dimensions from which on the 15 % are more than one mode: 1/0.15 is 6.7, and one more or less is chance
ALIGNED = 300.0  # time that two layers are given to align
Loss = Callable[[Tensor, Tensor], Tensor]


class Parameters(Settings):
    depth: int = parameter(4, "deepest network", low=1, high=6)
    dimension: int = parameter(16, "width of every layer d", low=4, high=128)
    noise: float = parameter(0.01, "standard deviation of the augmentation noise", low=0, high=0.3)
    batch: int = parameter(64, "batch size", low=8, high=1024)
    rate: float = parameter(0.2, "learning rate", low=0, open_low=True)
    steps: int = parameter(2000, "steps of gradient descent", low=100, high=100_000)


def forward(weights: Tensor, x: Tensor, rectified: Tensor) -> Tensor:
    """k networks at once: weights (k, L, d, d), x (n, d) or (k, n, d), rectified (k, L) says where a ReLU follows."""
    z = x
    for layer in range(weights.shape[1]):
        z = z @ weights[:, layer].mT
        z = torch.where(rectified[:, layer, None, None], z.relu(), z)
    return z


def stack(
    depths: Sequence[int], relu: Sequence[bool], d: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights U(±1/√d) of networks of several depths, which of them are trained, and where a ReLU follows.

    Shallow networks are padded in front with identities that are not trained.
    """
    k, deepest = len(depths), max(depths)
    weights = torch.eye(d, dtype=F64).repeat(k, deepest, 1, 1)
    trained, rectified = torch.zeros(k, deepest, dtype=torch.bool), torch.zeros(k, deepest, dtype=torch.bool)
    for i, (depth, bent) in enumerate(zip(depths, relu, strict=True)):
        first = deepest - depth
        weights[i, first:] = (2 * torch.rand(depth, d, d, dtype=F64, generator=generator) - 1) / d**0.5
        trained[i, first:] = True
        rectified[i, first:-1] = bent
    return weights, trained, rectified


def descend(
    loss: Loss,
    weights: Tensor,
    trained: Tensor,
    rectified: Tensor,
    views: Callable[[], tuple[Tensor, Tensor]],
    rate: float,
    steps: int,
    watch: Callable[[int, Tensor], None] | None = None,
    every: int | None = None,
) -> Tensor:
    """Plain gradient descent of sum-over-networks loss(z, z') per batch row; returns the trained weights.

    `watch` sees the weights after every `every` steps, by default about 60 times.
    """
    mask = trained[:, :, None, None].to(F64)
    for step in range(steps):
        first, second = views()
        leaf = weights.detach().requires_grad_()
        value = loss(forward(leaf, first, rectified), forward(leaf, second, rectified)).sum()
        weights = weights - rate * mask * torch.autograd.grad(value, leaf)[0]
        if watch is not None and step % (every or max(1, steps // 60)) == 0:
            watch(step, weights)
        if step % 100 == 0:
            finite(weights, "a weight", step * rate)
    return finite(weights, "a weight", steps * rate)


def gaussian_views(given: Parameters, generator: torch.Generator) -> Callable[[], tuple[Tensor, Tensor]]:
    """Batches of N(0, I) without replacement; the second view adds weak noise."""
    stream = batches(normal(generator, 10_000, given.dimension), given.batch, generator)

    def draw() -> tuple[Tensor, Tensor]:
        x = next(stream)
        return x, x + given.noise * normal(generator, *x.shape)

    return draw


def mean_infonce(z: Tensor, pair: Tensor) -> Tensor:
    return infonce(z, pair) / z.shape[-2]


def layer_gradients(weights: Sequence[Tensor], field: Tensor) -> list[Tensor]:
    """Ẇ_l for the product W_L … W_1 with G = −W_L…W_1 X: (W_L…W_{l+1})ᵀ W X (W_{l−1}…W_1)ᵀ."""
    d = len(field)
    eye = torch.eye(d, dtype=F64)
    before = list(itertools.accumulate(weights, lambda done, w: w @ done, initial=eye))
    after = list(itertools.accumulate(reversed(weights), lambda done, w: done @ w, initial=eye))[::-1]
    pull = before[-1] @ field
    return [after[i + 1].T @ pull @ before[i].T for i in range(len(weights))]


def closed_form(given: Parameters) -> tuple[float, list[Line]]:
    """Balanced, aligned layers in a fixed field X: largest relative error of the integrated singular values."""
    generator, d, depth = given.generator(), given.dimension, given.depth
    bases = [orthogonal(generator, d) for _ in range(depth + 1)]
    sizes = 0.9 * torch.exp(-0.05 * torch.arange(d, dtype=F64))
    pull = torch.linspace(1.0, 0.3, d, dtype=F64)
    field = bases[0] @ torch.diag(pull) @ bases[0].T
    weights = [bases[i + 1] @ torch.diag(sizes) @ bases[i].T for i in range(depth)]
    power = 2 * depth - 2
    until = 2.0 if depth == 1 else 0.8 / (power * float(sizes[0]) ** power)
    worst, times, seen = 0.0, [], []
    for index in range(1, 401):
        weights = runge_kutta(lambda now: layer_gradients(now, field), weights, until / 400)
        if index % 20 == 0:
            t = until * index / 400
            exact = sizes * (
                torch.exp(pull * t) if depth == 1 else (1 - power * sizes**power * pull * t) ** (-1 / power)
            )
            values = torch.linalg.svdvals(weights[0])
            worst = max(worst, float(((values - exact) / exact).abs().max()))
            times.append(t)
            seen.append(values)
    lines = [Line("", times, [float(values[k]) for values in seen]) for k in range(d)]
    return worst, lines


def conserved(given: Parameters) -> float:
    """Relative drift of W₁W₁ᵀ − W₂ᵀW₂ along the gradient flow of the InfoNCE loss itself (autograd)."""
    generator, d = given.generator(), given.dimension
    x = normal(generator, 64, d)
    pair = x + given.noise * normal(generator, 64, d)
    rectified = torch.zeros(1, 2, dtype=torch.bool)

    def flow(state: Sequence[Tensor]) -> list[Tensor]:
        leaf = torch.stack(list(state))[None].requires_grad_()
        value = mean_infonce(forward(leaf, x, rectified), forward(leaf, pair, rectified)).sum()
        return list(-torch.autograd.grad(value, leaf)[0][0])

    start = [normal(generator, d, d) / d**0.5 for _ in range(2)]
    state = start
    for _ in range(200):
        state = runge_kutta(flow, state, 0.02)

    def balance(w: Sequence[Tensor]) -> Tensor:
        return w[0] @ w[0].T - w[1].T @ w[1]

    moved = float((state[0] - start[0]).norm() / start[0].norm())
    return float((balance(state) - balance(start)).norm() / balance(start).norm()) / min(1.0, moved)


def alignment(given: Parameters) -> tuple[list[Claim], Line]:
    """Two layers from unaligned bases and decaying singular values, trained with InfoNCE."""
    generator, d = given.generator(), given.dimension
    sizes = 0.3 * torch.exp(-0.2 * torch.arange(d, dtype=F64))
    start = torch.stack([orthogonal(generator, d) * sizes @ orthogonal(generator, d).T for _ in range(2)])[None]

    def difference(weights: Tensor) -> Tensor:
        return weights[0, 0] @ weights[0, 0].T - weights[0, 1].T @ weights[0, 1]

    def cosine(weights: Tensor) -> float:
        first, second = weights[0, 0] @ weights[0, 0].T, weights[0, 1].T @ weights[0, 1]
        return float((first * second).sum() / (first.norm() * second.norm()))

    trained, linear = torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 2, dtype=torch.bool)
    views, steps = gaussian_views(given, generator), round(ALIGNED / given.rate)
    cosines, previous, grown = [cosine(start)], start, torch.zeros(d, d, dtype=F64)

    def look(step: int, now: Tensor) -> None:
        nonlocal previous, grown
        grown = grown + difference(now - previous)
        previous = now
        if step % max(1, steps // 60) == 0:
            cosines.append(cosine(now))

    end = descend(mean_infonce, start, trained, linear, views, given.rate, steps, look, 1)
    u, values, _ = torch.linalg.svd(end[0, 0])
    _, second, vt = torch.linalg.svd(end[0, 1])
    count = max(1, d // 8)
    leading = float((vt @ u).diagonal().abs()[:count].min())
    squares = values.square()
    gram = end[0, 0] @ end[0, 0].T

    def along(part: Tensor) -> Tensor:
        return (part * gram).sum() / gram.square().sum()

    def across(part: Tensor) -> Tensor:
        return part - along(part) * gram

    turned = float(torch.linalg.matrix_norm(across(difference(start) + grown), 2))
    whole = float(across(grown).norm() / second.square().norm())
    loose = f"finite steps turn W₁W₁ᵀ − W₂ᵀW₂ by {whole:.2g} of |W₂ᵀW₂|"
    near = "a leading singular value lies too near to the next for what the layers' imbalance turns"
    # Davis and Kahan's gap: between a leading eigenvalue of W₁W₁ᵀ, scaled, and every other one of W₂ᵀW₂.
    gaps = ((1 - along(difference(start) + grown)) * squares[:, None] - second.square()).abs()
    apart = float(gaps.fill_diagonal_(torch.inf)[:count].min())
    slowest = 1 / (4 * float(sizes[-1]) ** 2)
    claims = [
        below("alignment before training: cosine of W₁W₁ᵀ and W₂ᵀW₂", "unaligned", 0.9, cosine(start)),
        where(
            whole < 0.03,  # cos is then above 0.9995, with room for the start's part
            loose,
            above("alignment after training", "→ 1", 0.999, cosine(end)),
        ),
        where(
            turned < 0.14 * apart,
            near,
            above("|V₂ᵀU₁| of the leading modes, smallest diagonal entry", "→ 1", 0.99, leading),
        ),
        where(
            slowest > 2 * ALIGNED,
            f"even the smallest mode has the time to grow: 1/(4σ²) = {slowest:.0f} is below {2 * ALIGNED:.0f}",
            above(
                "largest over smallest singular value of W₁, after over before",
                "the gap widens",
                2.0,
                float(values[0] / values[-1] / (sizes[0] / sizes[-1])),
            ),
        ),
    ]
    return claims, Line("cosine", [i * max(1, steps // 60) for i in range(len(cosines))], cosines)


def sizes_of(weights: Tensor, trained: Tensor) -> Tensor:
    """(k,) mean over the trained layers of log |W|, of k networks."""
    logs = weights.flatten(2).norm(dim=2).log()
    return torch.where(trained, logs, 0.0).sum(1) / trained.sum(1)


def as_flow(leap: float, claim: Claim) -> Claim:
    """`claim`, where descent is the flow's: the largest step's share `leap` of all growth is below a half."""
    return where(leap < 0.5, f"one step makes {leap:.0%} of all the growth: that is no gradient flow", claim)


def of_many(dimension: int, claim: Claim) -> Claim:
    """`claim`, where there are enough dimensions for one mode more or less not to decide it."""
    return where(dimension >= FEW, f"of fewer than {FEW} dimensions one mode more or less is a matter of chance", claim)


def run(given: Parameters) -> Result:
    d, generator = given.dimension, given.generator()
    error, growth = closed_form(given)
    aligned, line = alignment(given)
    depths = list(range(1, given.depth + 1))
    weights, trained, rectified = stack(depths * 2, [False] * len(depths) + [True] * len(depths), d, generator)
    views = gaussian_views(given, generator)
    sizes = [sizes_of(weights, trained)]

    def look(_: int, now: Tensor) -> None:
        sizes.append(sizes_of(now, trained))

    weights = descend(mean_infonce, weights, trained, rectified, views, given.rate, given.steps, look, 1)
    strides = torch.stack([*sizes, sizes_of(weights, trained)]).diff(dim=0)
    leaps = torch.where(strides.sum(0) > 0, strides.amax(0) / strides.sum(0), torch.inf).tolist()
    z = forward(weights, normal(generator, 4000, d), rectified)
    spectra = torch.linalg.eigvalsh(covariance(z)).flip(-1).clamp(min=1e-16)
    ranks = [rank_of(each) for each in covariance(z)]
    dead = (spectra < DEAD * spectra[:, :1]).sum(1).tolist()
    count = len(depths)
    law = "no collapse: e^(−1/2), a random W's (see measurement)"
    claims = [
        below(
            "singular values of L layers in a fixed field, integrated", "the closed form, relative error", 1e-6, error
        ),
        below("drift of W₁W₁ᵀ − W₂ᵀW₂ along the loss' gradient flow", "0 (conserved)", 1e-6, conserved(given)),
        *aligned,
        as_flow(
            leaps[0], above("one layer: effective rank of the embeddings over d", law, math.exp(-0.5), ranks[0] / d)
        ),
        as_flow(leaps[0], below("one layer: fraction of dead dimensions", "no collapse", 0.15, dead[0] / d)),
    ]
    for kind, first in (("linear", 0), ("ReLU", count)):
        for depth in range(2, count + 1):
            ratio = ranks[first + depth - 1] / ranks[first + depth - 2]
            what = f"{kind}: effective rank, {depth} layers over {depth - 1}"
            claims.append(of_many(d, below(what, "deeper, lower", DEEPER, ratio)))
        if count > 1:
            last = first + count - 1
            what, more = f"{kind}: dead dimensions, {count} layers minus 1", float(dead[last] - dead[first])
            claim = of_many(d, above(what, "deeper, more", d * (count - 1) / 12, more))
            claims.append(as_flow(max(leaps[first], leaps[last]), claim))
    index = list(range(1, d + 1))
    spectrum = [
        Line(f"{depth} layers" if depth > 1 else "1 layer", index, (spectra[i] / spectra[i, 0]).tolist())
        for i, depth in enumerate(depths)
    ]
    by_depth = [
        Line("linear", depths, ranks[:count], marks=True),
        Line("ReLU", depths, ranks[count:], marks=True),
    ]
    return Result(
        claims,
        [
            Panel("Embedding spectrum, linear networks", "rank", "λ / λ₁", spectrum, log_y=True),
            Panel("Effective rank of the embeddings", "layers", "effective rank", by_depth),
            Panel(f"Fixed field, {given.depth} aligned layers", "time", "singular values of W₁", growth),
            Panel("Two layers align", "step", "cos(W₁W₁ᵀ, W₂ᵀW₂)", [line]),
        ],
    )
