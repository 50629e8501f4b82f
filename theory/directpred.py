r"""DirectPred: setting the predictor instead of training it.

In the linear model of BYOL a trained predictor ends with the eigenvectors of the correlation matrix F = WXWᵀ of the
representation, and with p_j = √s_j for F's eigenvalues s_j (at equal learning rates). So why train it? DirectPred sets

    F̂ = U diag(s) Uᵀ  (a moving average: F̂ ← ρF̂ + (1 − ρ)F),
    W_p = U diag(p) Uᵀ,   p_j = √s_j + ε·max s         every `frequency` steps,

and DirectCopy skips even the eigenvectors: W_p = F̂ + εI, that is p_j = s_j + ε. F is the correlation, not the centred
covariance. With ṡ = 2ps[1 − (1 + σ²)p] − 2ηs every fixed point has p = p₊ (see noncontrastive-dynamics), hence

    DirectPred   √s + ε s = p₊   ⇒   s = ((√(1 + 4εp₊) − 1) / 2ε)²,   s = p₊² for ε = 0
    DirectCopy   s = p₊ − ε .

**ε revives dead directions.** A direction with s → 0 has p → ε·max s (DirectPred) or p = ε (DirectCopy), and grows
again if p(1 − (1 + σ²)p) > η. Without ε the closed forms are subject to the same threshold as the trained predictor:
modes with 1 + σ_j² > 1/(4η) die.

**How seldom it may be set.** Held for the time h, with the memory ρ, the predictor lets a mode settle only while
hλ(1 − ρ) < 2(1 + ρ), where λ is the rate at which the mode relaxes under a predictor that is always new. Beyond that
the modes swing about their fixed point, and may fall out of its basin.

The authors' release normalises first, p_j = √(s_j / max s) + ε. The two differ by more than scale. In this model,
which does not normalise its outputs, equal modes get p = 1 + ε whatever s is, and then s decays at the rate
2(η − p(1 − (1 + σ²)p)) to nothing; networks that normalise their outputs do not feel the scale of p. The recipes of
CIFAR, STL-10 and ImageNet take this form.

## What it means for someone serving embeddings

The predictor's job is to keep directions alive, and ε is a floor under that job. A model trained with ε = 0, or with
DirectCopy and strong weight decay, has had its weak directions removed deliberately: a low rank is then a choice of the
recipe, to be recorded with the encoder, not an accident to be paged for.

## Source

Tian, Chen, Ganguli, ICML 2021, arXiv:2102.06810, section 4 (DirectPred). Wang, Chen, Du, Tian, *Towards Demystifying
Representation Learning with Non-contrastive Self-supervision*, arXiv:2110.04947 (DirectCopy). The fixed points with ε
and the revival condition are derived here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
from theory.linear_byol import (
    Model,
    after_death,
    farthest,
    fixed_points,
    integrate,
    passage,
    time_to_balance,
    time_to_die,
)
from theory.toys import F64, orthogonal

EXAMPLE = "--epsilon 0.3 --frequency 20"
FOLDS = 12.0  # e-folds that a mode is given to relax: 6e-6 is left, and 2e-3 is asked
# Time that is waited for an end: chosen, so that a run stays within seconds. A claim whose wait is longer is outside.
LONGEST = 1000.0
Rule = Callable[[Tensor], Tensor]  # eigenvalues s (..., d) of F, ascending -> p (..., d)


class Parameters(Settings):
    dimension: int = parameter(16, "input and embedding dimension d", low=2, high=128)
    augmentation: float = parameter(0.25, "variance σ² of the augmentation", low=0)
    weight_decay: float = parameter(0.04, "weight decay η, below 1/(4(1 + σ²))", low=0, open_low=True)
    epsilon: float = parameter(0.1, "boost ε of the closed forms", low=0, open_low=True, high=1)
    memory: float = parameter(0.3, "weight ρ of the past in the moving average of F", low=0, high=0.999)
    frequency: int = parameter(1, "steps between two settings of the predictor", low=1, high=200)
    strongest: float = parameter(3.0, "largest σ_j² of the anisotropic augmentation", low=0)
    step: float = parameter(0.1, "time of one step", low=0, open_low=True, high=0.5)

    def check(self) -> None:
        threshold = 1 / (4 * (1 + self.augmentation))
        if self.weight_decay >= threshold:
            raise ParameterError(
                f"weight_decay must be below 1/(4(1 + σ²)) = {threshold:.4g}, not {self.weight_decay:g}: all modes die"
            )


def direct_pred(epsilon: float | Tensor) -> Rule:
    """epsilon: a number, or (k,) for k problems at once."""
    boost = torch.as_tensor(epsilon)[..., None]
    return lambda s: s.sqrt() + boost * s[..., -1:]


def normalised(epsilon: float) -> Rule:
    return lambda s: (s / s[..., -1:]).sqrt() + epsilon


def direct_copy(epsilon: float | Tensor) -> Rule:
    """epsilon: a number, or (k,) for k problems at once."""
    boost = torch.as_tensor(epsilon)[..., None]
    return lambda s: s + boost


def each(*rules: tuple[int, Rule]) -> Rule:
    """Several rules at once: the first for so many of the problems (k, d), the next for so many that follow."""
    counts = [count for count, _ in rules]
    return lambda s: torch.cat([rule(part) for (_, rule), part in zip(rules, torch.split(s, counts), strict=True)])


def predictor_of(rule: Rule, f: Tensor) -> Tensor:
    """W_p = U diag(p) Uᵀ for F (..., d, d)."""
    u: Tensor
    s, u = torch.linalg.eigh(f)
    return (u * rule(s.clamp(min=0)).unsqueeze(-2)) @ u.mT


@torch.inference_mode()
def follow(given: Parameters, model: Model, rule: Rule, start: Tensor, until: float, frequency: int) -> Tensor:
    """W (..., d, d) at `until` under the rule: W_p is set from F̂ every `frequency` steps and held in between.

    With W_p held the flow is linear, Ẇ = (W_p − η)W − W_p²WG with G = diag(1 + σ_k²), and is solved exactly: in the
    basis of W_p entry (j, k) of W grows at p_j − η − (1 + σ_k²)p_j².
    """
    w, f = start, start @ start.mT
    steps = math.ceil(until / given.step)
    step = until / steps
    for first in range(0, steps, frequency):
        f = given.memory * f + (1 - given.memory) * (w @ w.mT)
        s, u = torch.linalg.eigh(f)
        p = rule(s.clamp(min=0)).unsqueeze(-1)
        rates = p - model.decay - p.square() * model.gain
        w = u @ ((u.mT @ w) * (rates * (step * min(frequency, steps - first))).exp())
        finite(w, "W", first * step)
    return w


def fixed_size(p: float, epsilon: float) -> float:
    """s with √s + εs = p."""
    return p**2 if epsilon == 0 else ((math.sqrt(1 + 4 * epsilon * p) - 1) / (2 * epsilon)) ** 2


def radius(held: float, memory: float, rate: float) -> float:
    """By how much one setting of the predictor shrinks a deviation from the fixed point; 1 or more: it never settles.

    For a mode that relaxes at `rate` with a predictor that is always new, held for the time `held`: with κ = held·rate,
    φ the deviation of ln F̂ and y that of ln s, φ ← ρφ + (1 − ρ)y, then y ← y − κφ. The determinant is ρ.
    """
    trace = 1 + memory - held * rate * (1 - memory)
    root = trace**2 - 4 * memory
    return math.sqrt(memory) if root < 0 else (abs(trace) + math.sqrt(root)) / 2


@dataclass(frozen=True)
class Wait:
    """How long a claim about a fixed point must wait, and why it asserts nothing, if it does not."""

    until: float
    outside: str = ""


def wait(given: Parameters, smallest: float, frequency: int, epsilon: float, copy: bool = False) -> Wait:
    """For modes that start at s from `smallest` to 1. p₊ must be above `epsilon` for DirectCopy.

    Near the fixed point DirectPred's modes relax at √s r and, all together, at (√s + 2εs) r, DirectCopy's at 2s r, with
    r = √(1 − 4η(1 + σ²)). A predictor of the age τ = held/(1 − ρ) overshoots: a mode still grows, at 1/4(1 + σ²) − η at
    most, for the time τ after p₊, then it shrinks under the largest p for as long. It must not fall below p₋. From
    where it has fallen to DirectPred's rises as a balanced mode does. DirectCopy's rises to half of its end at twice
    p − η − (1 + σ²)p² or faster, which is concave in p: the lesser value of both ends. The predictor's age makes this
    longer by the part τ/8(1 + σ²), or twice that, since d(p − (1 + σ²)p²)/d ln p is 1/8(1 + σ²) at most.
    """
    eta, gain = given.weight_decay, 1 + given.augmentation
    low, high = fixed_points(given.augmentation, eta)
    size = high - epsilon if copy else fixed_size(high, epsilon)
    root, held = math.sqrt(1 - 4 * eta * gain), given.step * frequency
    late = held / (1 - given.memory)
    rates = [2 * size * root] if copy else [math.sqrt(size) * root, (math.sqrt(size) + 2 * epsilon * size) * root]
    shrinks = max(radius(held, given.memory, rate) for rate in rates)
    if shrinks >= 1:
        return Wait(100.0, f"set every {held:.3g}, the predictor swings about its fixed point")
    # In q = √s for DirectPred and q = s for DirectCopy, whose logarithm moves twice as fast.
    power = 2 if copy else 1
    most = max(1.0, size ** (power / 2) * math.exp(min(power * late * (1 / (4 * gain) - eta), 100)))
    q = torch.linspace(smallest ** (power / 2), most, 201, dtype=F64)
    p = q + (epsilon if copy else epsilon * most**2)
    fallen = float((q * (power * late * (p - eta - gain * p.square()).clamp(max=0)).exp()).min())
    begins = fallen + epsilon if copy else fallen
    if begins <= low:
        return Wait(100.0, f"the predictor is {late:.3g} old: the start outruns it")
    if copy:
        slowest = min(p - eta - gain * p**2 for p in (begins, epsilon + size / 2))
        rises = max(0.0, math.log(size / 2 / max(fallen, 1e-300))) / (2 * slowest)
    else:
        rises = passage(begins, 0.9 * high, given.augmentation, eta) if begins < 0.9 * high else 0.0
    falls = passage(1.0, 1.1 * high, given.augmentation, eta) if 1.1 * high < 1 else 0.0
    until = (1 + power * late / (8 * gain)) * max(rises, falls) + late + FOLDS * held / -math.log(shrinks)
    return Wait(until) if until <= LONGEST else Wait(100.0, f"its modes take a time of {until:.0f} to settle")


def survivors(given: Parameters, start: Tensor) -> list[Claim]:
    """ε = 0 and η = 0.1 under an augmentation that varies along the directions: which of them survive.

    All start at |w| = 1. Where p = |w| or, with DirectCopy, |w|², is held for the delay τ, |w| shrinks by
    exp(−((1 + σ_j²)p² − p + η)τ), and p must not fall below the middle of p₋ and p₊ in a direction that is to survive.
    On p a mode dies as on the balanced curve of noncontrastive-dynamics; DirectCopy's twice as fast. A survivor has
    p₊ > 2η, and what dies falls below that.
    """
    spread, eta, late = torch.linspace(0, given.strongest, given.dimension, dtype=F64), 0.1, given.step
    late /= 1 - given.memory
    rules = each((1, direct_pred(0)), (1, direct_copy(0)))
    until = min(max(10.0, 1.05 * time_to_die(spread, eta)), LONGEST)
    w = follow(given, Model(spread, eta), rules, start.expand(2, -1, -1), until, 1)
    alive = 1 + spread[1 + spread < 1 / (4 * eta)]
    claims = []
    for name, power, found in zip(("DirectPred", "DirectCopy"), (1, 2), torch.linalg.eigvalsh(w @ w.mT), strict=True):
        kept = bool((torch.exp(-power * late * (alive - 1 + eta)) > 1 / (2 * alive)).all())
        seen = int((found.clamp(min=0) ** (power / 2) > 2 * eta).sum())
        claim = exactly(f"{name}, ε = 0, η = 0.1: surviving dimensions", "#{j: 1 + σ_j² < 1/(4η)}", len(alive), seen)
        claim = where(kept, f"the predictor is {late:.3g} old: the start outruns it", claim)
        claims.append(after_death(spread, eta, until, claim))
    return claims


def trained(given: Parameters, model: Model, start: Tensor, high: float) -> list[Claim]:
    """A trained predictor ends as DirectPred with ε = 0 does.

    It starts at 1/2(1 + σ²), between p₋ and p₊, from s > p₋²: p cannot fall below p₋, since ṗ > 0 there, and as long as
    it is between the two s grows.
    """
    eta, gain = given.weight_decay, 1 + given.augmentation
    middle = torch.eye(len(start), dtype=F64) / (2 * gain)
    imbalance = float(torch.linalg.matrix_norm(start @ start.mT - middle @ middle, 2)) / high**2
    settles = FOLDS / (high * math.sqrt(1 - 4 * eta * gain))
    needed = max(2 * settles, time_to_balance(imbalance, given.augmentation, eta))
    w, predictor = integrate(model, start, middle, needed if needed <= LONGEST else 100.0, 1 / (2 * gain))
    norm = farthest(torch.linalg.eigvalsh(w @ w.mT), high**2)
    closed = predictor_of(direct_pred(0), w @ w.mT)
    gap = float((closed - predictor).norm() / predictor.norm())
    claims = [
        about("trained predictor, the same as DirectPred with ε = 0", "p₊²", high**2, norm, 5e-3),
        below("trained W_p against √F: relative distance", "0", 5e-3, gap),
    ]
    slow = f"predictor and encoder take a time of {needed:.0f} to balance and settle"
    return [where(needed <= LONGEST, slow, claim) for claim in claims]


def run(given: Parameters) -> Result:
    d, eta, noise, eps = given.dimension, given.weight_decay, given.augmentation, given.epsilon
    generator, gain = given.generator(), 1 + given.augmentation
    model = Model(torch.full((d,), noise, dtype=F64), eta)
    low, high = fixed_points(noise, eta)
    left, right = orthogonal(generator, d), orthogonal(generator, d)
    # Inside both basins: DirectPred's has √s above p₋, DirectCopy's s above p₋ − ε.
    smallest = max(0.09, 1.5 * low)
    start = left * torch.linspace(math.sqrt(smallest), 1.0, d, dtype=F64) @ right

    def sizes(rule: Rule, until: float, frequency: int = given.frequency, count: int = 1) -> Tensor:
        """Eigenvalues of WWᵀ in the end, (count, d), of so many problems at once from the same start."""
        w = follow(given, model, rule, start.expand(count, -1, -1), until, frequency)
        found: Tensor = torch.linalg.eigvalsh(w @ w.mT)
        return found

    plain = wait(given, smallest, given.frequency, 0)
    waits = [plain, wait(given, smallest, given.frequency, eps)]
    if eps < high:
        waits.append(wait(given, smallest, given.frequency, eps, copy=True))
    grid = [0.05, 0.2, 0.4]
    boosts = torch.tensor([0.0, eps, *grid], dtype=F64)
    rules = each((len(boosts), direct_pred(boosts)), (len(boosts) - 1, direct_copy(boosts[1:])))
    longest = max(waited.until for waited in waits)
    pred, copy = sizes(rules, longest, count=2 * len(boosts) - 1).tensor_split([len(boosts)])

    # While W_p is held the flow is that of noncontrastive-dynamics with a predictor that does not move. Its fastest
    # mode relaxes at (1 + σ²)(1 + ε)² at most, and Runge-Kutta takes 100 steps of the time.
    held, short = predictor_of(direct_pred(eps), start @ start.mT), min(given.step, 1 / (gain * (1 + eps) ** 2))
    reference, _ = integrate(Model(model.noise, eta, predictor=False), start, held, short, short / 100)
    error = float((follow(given, model, direct_pred(eps), start, short, 1) - reference).norm() / reference.norm())
    claims = [below("W under a held W_p, against Runge-Kutta on the gradients", "relative error", 1e-8, error)]

    ends = [
        ("DirectPred, ε = 0: eigenvalue of F farthest from", "p₊²", pred[0], high**2),
        (f"DirectPred, ε = {eps:g}", "((√(1 + 4εp₊) − 1)/2ε)²", pred[1], fixed_size(high, eps)),
        (f"DirectCopy, ε = {eps:g}", "p₊ − ε", copy[0], high - eps),
    ]
    for waited, (what, formula, found, expected) in zip(waits, ends, strict=False):
        claim = about(what, formula, expected, farthest(found, expected), 2e-3)
        claims.append(where(not waited.outside, waited.outside, claim))
    claims += trained(given, model, start, high)
    for frequency in (5, 20):
        waited = wait(given, smallest, frequency, 0)
        seen = farthest(sizes(direct_pred(0), waited.until, frequency)[0], high**2)
        claim = about(f"DirectPred set every {frequency} steps", "p₊²", high**2, seen, 2e-3)
        claims.append(where(not waited.outside, waited.outside, claim))

    # On both sides of the basin's edge. What lives rises above the middle of p₋ and p₊, later by the predictor's age.
    divided, middle = torch.where(torch.arange(d) < d // 2, low / 1.5, 1.5 * low), 1 / (2 * gain)
    age = given.step * given.frequency / (1 - given.memory)
    rises = passage(1.5 * low, middle, noise, eta) if 1.5 * low < middle else 0.0
    rises = 1.05 * rises * (1 + age / (8 * gain)) + age
    w = follow(given, model, direct_pred(0), left * divided @ right, min(rises, LONGEST), given.frequency)
    alive = int((torch.linalg.eigvalsh(w @ w.mT) > middle**2).sum())
    claim = exactly("DirectPred, ε = 0: directions that survive their start", "#{j: √s_j > p₋}", d - d // 2, alive)
    claim = where(rises <= LONGEST, f"a direction next to the edge rises in a time of {rises:.0f}", claim)
    claims.append(where(not plain.outside, plain.outside, claim))

    # Equal modes have p = 1 + ε, whatever their size. They are given 100 e-folds at most.
    p = 1 + eps
    decay = 2 * (eta - p * (1 - gain * p))
    same, short = 0.9 * orthogonal(generator, d), min(4.0, 100 / decay)
    w = follow(given, model, normalised(eps), same, short, given.frequency)
    seen = -float((w.square().sum() / same.square().sum()).log()) / short
    formula = "2(η − p(1 − (1+σ²)p)), p = 1 + ε"
    claims.append(about("√(s/max s) + ε, equal modes: decay rate of s", formula, decay, seen, 1e-4))

    claims += survivors(given, left)

    # one mode nearly dead, DirectCopy: it grows at 2(ε(1 − (1+σ²)ε) − η), so it revives above a computable ε
    tiny = torch.eye(d, dtype=F64) * 1e-6
    w = follow(given, model, direct_copy(eps), tiny, 2.0, 1)
    growth, seen = 2 * (eps * (1 - gain * eps) - eta), float((w.square().sum() / tiny.square().sum()).log()) / 2
    what, formula = "DirectCopy: growth rate of a nearly dead mode", "2(ε(1 − (1+σ²)ε) − η)"
    claims.append(Claim(what, formula, "≈", growth, seen, 1e-3 * (eps + eta)))

    fine = torch.linspace(0.01, 0.4, 40).tolist()
    rates = torch.linspace(0, 0.6, 61).tolist()
    return Result(
        claims,
        [
            Panel(
                "Fixed points against ε",
                "ε",
                "eigenvalue s of F",
                [
                    Line("DirectPred", grid, pred[2:].median(1).values.tolist(), marks=True),
                    Line("DirectCopy", grid, copy[1:].median(1).values.tolist(), marks=True),
                    Line("((√(1 + 4εp₊) − 1)/2ε)²", fine, [fixed_size(high, boost) for boost in fine], dashed=True),
                    Line("p₊ − ε", fine, [high - boost for boost in fine], dashed=True),
                ],
            ),
            Panel(
                "DirectCopy: growth of a nearly dead direction",
                "ε",
                "rate",
                [
                    Line(
                        "2(ε(1 − (1+σ²)ε) − η)",
                        rates,
                        [2 * (e * (1 - (1 + noise) * e) - eta) for e in rates],
                        dashed=True,
                    ),
                    Line("integrated", [eps], [seen], marks=True),
                ],
            ),
        ],
    )
