r"""Frustrated samples collapse classes slowly; a shared head with stop-gradient keeps them apart.

After Yao, Li and Liu's minimal model, from its abstract: what follows is our derivation, not a reproduction of their
text. The smallest model of representation learning has no network at all. Sample embeddings x_i and label embeddings
y_c are free vectors, a row-stochastic matrix A says which sample has which label, and the loss is

    L = ½ Σ_ic A_ic |x_i − y_c|² .

A **frustrated** sample has two labels that cannot both be satisfied (A_ic = ½ twice; or 1/C on all). With
B = Aᵀ normalised to rows that sum to 1, and learning rates 1 for samples and 1/n_c for labels, gradient descent is heat
flow on the graph of samples and labels, ẋ = −(x − AY), ẏ = −(y − BX). Its modes decay at 1 − √ν_k, ν_k the
eigenvalues of BA. The number of modes that never decay is the number of connected components:

- no frustrated sample: C components, every class keeps its place, **no collapse**;
- a single frustrated sample per pair of classes: one component, and only the common mean survives. The fast alignment
  of samples with labels looks like success for a while; then everything contracts at the rate 1 − √ν₂, which is
  **1 − √(1 − φ) ≈ φ/2** if a fraction φ of the samples carries all labels.

A linear head W shared by both sides and trained at rate α_p/2N does not help by itself: the full gradient of
½|Wx − y|² + ½|Wy − x|² still collapses. Stop-gradient does not help by itself either: without a head it is the plain
flow, and with a twin head, ½|Wx − Wy|², its gradient is the same with and without it. (A fast twin head moves the
collapse into itself: W dies along the contested directions, the outputs Wx collapse, and x contracts more slowly. Of a
mode of size F with w² = u and α_pF = v both u̇ and v̇ are −2(1 − √ν)uv. So u − v stays, and the output √(uv) falls
exponentially, but for u = v, where it falls like 1/(1 + 2(1 − √ν)t) only. From w = 1 less than 1/(2(1 − √ν)t) is left.)
**Both together** give

    ẋ = −Wᵀ(Wx − AY),   ẏ = −Wᵀ(Wy − BX),   Ẇ = −(α_p/2N)[Σ_i(Wx_i − (AY)_i)x_iᵀ + Σ_c n_c(Wy_c − (BX)_c)y_cᵀ],

where a mode a_k stands still as soon as W a_k = √ν_k a_k, *at any amplitude*: the head absorbs the contraction that
the embeddings would have to make. F − WᵀW/α_p with F = (Σxxᵀ + Σn_c yyᵀ)/2N is conserved. It needs room for
independent modes, so dimension ≥ classes + 2 here.

What collapses is of use no more: read through noise of a fixed size, the nearest class mean is right nearly always at
t = 8 and at chance, 1/C, at t = 200, although nothing but the scale has changed. With head and stop-gradient it stays
right.

The same happens if the samples are x = Uξ, a linear student of inputs ξ whose classes a teacher drew. Its directions
follow at the variance of the inputs along them, a quarter for the weakest here.

## What it means for someone serving embeddings

Contradictory labels (duplicates with different tags, near-duplicates across classes) do not show in the training curve:
separation first rises, as if all were well, and the contraction comes later at a rate you can compute from the
fraction. Judge an encoder by the trend of its separation or effective rank over the last epochs, not by its peak.

## Source

After Yao, Li, Liu, *A Minimal Model of Representation Collapse: Frustration, Stop-Gradient, and Dynamics*,
arXiv:2604.09979. Loss, head placement, rates and parameters are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from theory import readout
from theory.lab import (
    Claim,
    Line,
    Panel,
    ParameterError,
    Result,
    Settings,
    about,
    above,
    below,
    finite,
    parameter,
    where,
)
from theory.label_graph import (
    assignment,
    class_means,
    other_modes,
    separation,
    spectrum,
    student_rate,
    teacher_inputs,
    twin_head,
)
from theory.toys import F64, normal, squared_distances

EXAMPLE = "--frustrated 0.2 --classes 4"
Variant = Literal["plain", "head", "head + stop-gradient", "twin head", "twin head + stop-gradient"]
EARLY, LATE = 8.0, 200.0
ROUNDING = 1e-12  # of a distance, below which float64 shows nothing
# The smallest distance at t = 8 may be of two classes that differ least in the slowest mode. Then others take its place
# in the ratio, up to this factor.
OTHERS = 5
OTHER_MODES = 0.05  # of a difference: their rates add that share of the rates' ratio, and 10 % is allowed
EVEN = 1.03  # the rate seen is one between the slowest and the fastest mode's: 3 of the 5 % that the claim allows


class Parameters(Settings):
    samples: int = parameter(200, "samples N", low=10, high=5000)
    classes: int = parameter(5, "classes C", low=2, high=50)
    dimension: int = parameter(16, "embedding dimension d, at least classes + 2", low=4, high=256)
    frustrated: float = parameter(0.1, "fraction φ of frustrated samples", low=0, high=1)
    head_rate: float = parameter(10.0, "learning rate α_p of the head", low=0, open_low=True, high=15)
    step: float = parameter(0.1, "time step of gradient descent", low=0, open_low=True, high=0.2)

    def check(self) -> None:
        if self.dimension < self.classes + 2:
            raise ParameterError(f"dimension must be at least classes + 2 = {self.classes + 2}, not {self.dimension}")
        if self.samples < 4 * self.classes:
            raise ParameterError(f"samples must be at least 4 per class ({4 * self.classes}), not {self.samples}")


def loss(variant: Variant, a: Tensor, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """The training loss of a variant; x (N, d), y (C, d), w (d, d)."""

    def cost(left: Tensor, right: Tensor) -> Tensor:
        return 0.5 * (a * squared_distances(left, right)).sum()

    match variant:
        case "plain":
            return cost(x, y)
        case "head":
            return cost(x @ w.T, y) + cost(x, y @ w.T)
        case "head + stop-gradient":
            return cost(x @ w.T, y.detach()) + cost(x.detach(), y @ w.T)
        case "twin head":
            return cost(x @ w.T, y @ w.T)
        case "twin head + stop-gradient":
            return cost(x @ w.T, (y @ w.T).detach()) + cost((x @ w.T).detach(), y @ w.T)


def gradients(variant: Variant, a: Tensor, x: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the loss for x, y and w, by autograd; zero for a w that the variant does not use."""
    leaves = [value.detach().requires_grad_() for value in (x, y, w)]
    found = torch.autograd.grad(loss(variant, a, *leaves), leaves, materialize_grads=True)
    return found[0], found[1], found[2]


def slopes(
    variant: Variant, a: Tensor, counts: Tensor, x: Tensor, y: Tensor, w: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same by their formulas, a fifth of autograd's time; `identities` compares the two. None for an unused w.

    counts (C, 1) are the column sums of A; its rows sum to 1.
    """
    if variant == "plain":
        return x - a @ y, counts * y - a.T @ x, None
    left, right = x @ w.T, y @ w.T
    twin = variant in ("twin head", "twin head + stop-gradient")
    of_x = left - a @ (right if twin else y)
    of_y = counts * right - a.T @ (left if twin else x)
    gx, gy, gw = of_x @ w, of_y @ w, of_x.T @ x + of_y.T @ y
    if variant == "head":  # what stop-gradient would stop
        gx, gy = gx + x - a @ right, gy + counts * y - a.T @ left
    return gx, gy, gw


@dataclass(frozen=True)
class Path:
    """Smallest distance between two class means over time, and the state at the end."""

    times: list[float]
    separations: list[float]
    x: Tensor
    y: Tensor
    w: Tensor

    def at(self, time: float) -> float:
        return self.separations[min(range(len(self.times)), key=lambda i: abs(self.times[i] - time))]

    @property
    def kept(self) -> float:
        """Separation at the end over that when the samples have just aligned."""
        return self.separations[-1] / self.at(EARLY)

    def rate(self, start: float, end: float) -> float:
        return math.log(self.at(start) / self.at(end)) / (end - start)


def descend(
    given: Parameters,
    variant: Variant,
    a: Tensor,
    generator: torch.Generator,
    until: float = LATE,
    inputs: Tensor | None = None,
) -> Path:
    """Gradient descent on free embeddings, or on a linear student x = inputs Uᵀ if `inputs` (N, p) is given."""
    d, counts = given.dimension, a.sum(0)[:, None]
    y = normal(generator, given.classes, d) / d**0.5
    w = torch.eye(d, dtype=F64)
    if inputs is None:
        x, student = normal(generator, given.samples, d) / d**0.5, None
    else:
        student = 0.05 * normal(generator, d, inputs.shape[1]) / inputs.shape[1] ** 0.5
        x = inputs @ student.T
    times, seen = [0.0], [separation(a, x)]
    every = max(1, round(0.5 / given.step))
    for index in range(1, round(until / given.step) + 1):
        gx, gy, gw = slopes(variant, a, counts, x, y, w)
        y = y - given.step * gy / counts
        if gw is not None:
            w = w - given.step * given.head_rate / (2 * given.samples) * gw
        if student is None or inputs is None:
            x = x - given.step * gx
        else:
            student = student - given.step * gx.T @ inputs / given.samples
            x = inputs @ student.T
        if index % every == 0:
            times.append(index * given.step)
            seen.append(separation(a, finite(x, "x", index * given.step)))
    return Path(times, seen, x, y, finite(w, "W", until))


def identities(given: Parameters) -> list[Claim]:
    """Autograd against the formulas of the page, at a random state."""
    generator, d, n = given.generator(), given.dimension, given.samples
    a = assignment(n, given.classes, given.frustrated, "pair")
    x, y, w = normal(generator, n, d), normal(generator, given.classes, d), normal(generator, d, d) / d**0.5
    counts = a.sum(0)[:, None]

    def error(variant: Variant) -> float:
        pairs = zip(slopes(variant, a, counts, x, y, w), gradients(variant, a, x, y, w), strict=True)
        return max(float(g.norm()) if f is None else float((f - g).norm() / g.norm()) for f, g in pairs)

    flow = max(error(variant) for variant in get_args(Variant))
    gx, gy, gw = gradients("head + stop-gradient", a, x, y, w)
    grown = x.T @ gx + y.T @ gy
    turned = w.T @ gw
    conserved = float((grown + grown.T - turned - turned.T).norm() / grown.norm())
    once, twice = gradients("twin head", a, x, y, w), gradients("twin head + stop-gradient", a, x, y, w)
    same = max(float((f - g).norm() / g.norm()) for f, g in zip(once, twice, strict=True))
    return [
        below("head + stop-gradient: the loss' gradients are the flow", "relative error", 1e-10, flow),
        below("its invariant F − WᵀW/α_p does not move", "relative rate", 1e-10, conserved),
        below("twin head: stop-gradient changes no gradient", "relative difference", 1e-10, same),
    ]


def run(given: Parameters) -> Result:
    phi = round(given.frustrated * given.samples) / given.samples
    size = given.samples, given.classes
    calm, mixed, spread = assignment(*size, 0, "pair"), assignment(*size, phi, "pair"), assignment(*size, phi, "all")
    nu = spectrum(mixed)
    rates = (1 - nu.clamp(min=0, max=1).sqrt())[1:].tolist()
    slow = rates[0]
    connected = slow * (LATE - EARLY) > 4  # enough time to see it collapse

    def go(variant: Variant, a: Tensor, until: float = LATE) -> Path:
        return descend(given, variant, a, given.generator(), until)

    free, plain, head, held = (
        go("plain", calm),
        go("plain", mixed),
        go("head", mixed),
        go("head + stop-gradient", mixed),
    )
    twin = go("twin head", mixed)
    claims = [
        *identities(given),
        about("no frustration: separation kept from t = 8 to 200", "1 (C components)", 1.0, free.kept, 0.01),
    ]
    too_slow = f"at 1 − √ν₂ = {slow:.2g} too little contracts by t = {LATE:g}"
    peak = max(plain.separations) / plain.separations[0]
    start = min(100.0, 4 / max(slow, 1e-6))
    # Past 25 time constants the distances are rounding.
    end = min(LATE, start + min(60.0, 20 / max(slow, 1e-6)))
    one_rate = other_modes(mixed, start) < OTHER_MODES
    law, out = "5 exp(−(1 − √ν₂)·192)", separation(mixed, twin.x @ twin.w.T) / twin.at(EARLY)
    twin_law, left = "5/(2(1 − √ν₂)·192): the outputs collapse", twin_head(slow, LATE - EARLY)
    bound = max(OTHERS * math.exp(-slow * (LATE - EARLY)), ROUNDING)
    # Before anything contracts a class and its label meet half-way.
    begin = go("plain", mixed, 0.0)
    half_way = float(torch.pdist((class_means(mixed, begin.x) + begin.y) / 2).min()) / begin.separations[0]
    growth = where(
        slow < 0.15,
        "the contraction begins before the alignment ends: 1 − √ν₂ is above 0.15",
        above("plain: separation grows first, peak over start", "fast alignment comes first", 1.5, peak),
    )
    growth = where(half_way > 2, f"samples and labels meet at {half_way:.2g} times the start's separation", growth)
    contraction = where(
        one_rate,
        "modes of several rates are still alive",
        about("plain: late contraction rate", "1 − √ν₂ of the label graph", slow, plain.rate(start, end), 0.1),
    )
    collapse = [
        growth,
        below("plain: separation at t = 200 over t = 8", law, bound, plain.kept),
        contraction,
        below("head without stop-gradient: the same ratio", law, bound, head.kept),
        below("twin head: separation of Wx at t = 200 over x at t = 8", twin_law, OTHERS * left, out),
    ]
    claims += [where(connected, too_slow, claim) for claim in collapse]
    if 0 < phi < 1:
        graph = (1 - spectrum(spread).clamp(min=0, max=1).sqrt())[1:].tolist()
        start = min(40.0, 2 / graph[0])
        end = start + min(40.0, 6 / graph[0])
        what, rate = "frustrated samples on all labels: contraction rate", go("plain", spread, end).rate(start, end)
        law = "1 − √ν₂, which is 1 − √(1 − φ) for classes of one size"
        even = graph[-1] < EVEN * graph[0] and 0.02 <= phi < 0.9
        reason = "φ is not between 0.02 and 0.9, or the classes differ in size"
        claims.append(where(even, reason, about(what, law, graph[0], rate, 0.05)))
    # W takes the labels' span to the samples' and back, with ν; elsewhere it keeps much of the 1 that it started from.
    modes: Tensor = torch.linalg.qr(held.y.T)[0]
    w = torch.linalg.eigvals(modes.T @ held.w @ held.w @ modes).real.sort(descending=True).values.clamp(min=0).sqrt()
    gap = float((w - nu.clamp(min=0).sqrt()).abs().max())
    loss_of_size = absorbed(given, free, float(nu[-1]))
    slow_head = f"the head is too slow to absorb the contraction: head_rate {given.head_rate:g}"
    apart = [
        above("head + stop-gradient: separation at t = 200 over t = 8", "kept", 0.9, held.kept),
        below("head + stop-gradient: W on the labels' span against √ν_k", "largest difference 0", 1e-2, gap),
    ]
    apart = [where(loss_of_size < 0.6, slow_head, claim) for claim in apart]
    claims += [*apart, *readable(given, mixed, plain, held, where(connected, too_slow, collapse[1]), apart[0])]
    claims += student(given, calm, mixed, slow if connected else 0.0)
    named = {"no frustration": free, "plain": plain, "head": head, "twin head": twin, "head + stop-gradient": held}
    lines = [Line(name, path.times, path.separations) for name, path in named.items()]
    early = [Line(name, path.times[:40], path.separations[:40]) for name, path in named.items()]
    y = "smallest distance of class means"
    return Result(
        claims,
        [
            Panel(f"The first epochs look alike, φ = {phi:g}", "time", y, early),
            Panel("What comes later", "time", y, lines, log_y=True),
        ],
    )


def readable(given: Parameters, a: Tensor, plain: Path, held: Path, collapses: Claim, stays: Claim) -> list[Claim]:
    """What the collapse costs a classifier: the nearest class mean, read through noise of a sixth of that distance.

    The noise is fixed once, at t = 8, where a class is told from the nearest one in all but 0.1 % of the cases. The
    first and third claim have the domains of `collapses` and `stays`, which are about the distances themselves.
    """
    early = class_means(a, descend(given, "plain", a, given.generator(), EARLY).x)
    late = class_means(a, plain.x)
    noise = float(torch.pdist(early).min()) / 6
    generator = given.generator()
    (first, error), (last, other) = (readout.accuracy(means, noise, generator) for means in (early, late))
    kept, third = readout.accuracy(class_means(a, held.x), noise, generator)
    ceiling, floor = readout.at_most(late, noise), readout.at_least(early, noise)
    what, high = "accuracy of the nearest class mean", "1 − (C − 1) Q(δ/2s), the union bound"
    return [
        above(f"{what} at t = 8", high, floor - 4 * error, first),
        where(
            not collapses.outside and ceiling < first,
            collapses.outside or "the classes are still told apart",
            below(
                f"plain: {what} at t = 200", "1/C + (1 − 1/C)(1 − 2 Q(Δ/2s)), near chance", ceiling + 4 * other, last
            ),
        ),
        where(
            not stays.outside,
            stays.outside,
            above(f"head + stop-gradient: {what} at t = 200", "as at t = 8", floor - 0.02 - 4 * third, kept),
        ),
    ]


def absorbed(given: Parameters, aligned: Path, least: float) -> float:
    """The share of a mode's size that it loses until the head has absorbed its contraction: (1 − ν)/(α_p F).

    F − WᵀW/α_p is conserved, and W goes from 1 to √ν. `aligned` is a path whose classes keep their places; `least` the
    smallest ν of the label graph.
    """
    counts = assignment(given.samples, given.classes, 0, "pair").sum(0)[:, None]
    size = (aligned.x.T @ aligned.x + aligned.y.T @ (counts * aligned.y)) / (2 * given.samples)
    weakest = float(torch.linalg.eigvalsh(size).flip(0)[given.classes - 1])
    return (1 - least) / (given.head_rate * weakest)


def student(given: Parameters, calm: Tensor, mixed: Tensor, slow: float) -> list[Claim]:
    """The same with x = Uξ; `slow` is the contraction rate, 0 if nothing need collapse."""

    def go(variant: Variant, a: Tensor) -> Path:
        generator = given.generator()
        return descend(given, variant, a, generator, 120.0, teacher_inputs(a, generator))

    def kept(path: Path) -> float:
        return path.separations[-1] / path.at(4.0)

    free = go("plain", calm)
    claims = [about("linear student, no frustration: separation kept from t = 4 to 120", "1", 1.0, kept(free), 0.03)]
    if slow > 0:
        slow = student_rate(mixed, teacher_inputs(mixed, given.generator()))
        law, bound = "5 exp(−r·116), r the slowest rate of inputs and labels", max(OTHERS * math.exp(-slow * 116), 1e-3)
        claim = below("linear student, plain: the same ratio", law, bound, kept(go("plain", mixed)))
        claims.append(where(slow * 116 > 4, f"at the rate {slow:.2g} too little contracts by t = 120", claim))
    lost = absorbed(given, free, float(spectrum(mixed)[-1]))
    seen = kept(go("head + stop-gradient", mixed))
    claim = above("linear student, head + stop-gradient: the same ratio", "kept", 0.85, seen)
    # A mode that loses a share of its square keeps the root of what is left of its size, √0.75 = 0.87.
    return [*claims, where(lost < 0.25, f"the head absorbs the contraction by a share of {lost:.2g} of a mode", claim)]
