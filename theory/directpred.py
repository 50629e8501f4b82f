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

A variant in circulation normalises first, p_j = √(s_j / max s) + ε. The two differ by more than scale. In this model,
which does not normalise its outputs, equal modes get p = 1 + ε whatever s is, and then s decays at the rate
2(η − p(1 − (1 + σ²)p)) to nothing; networks that normalise their outputs do not feel the scale of p.

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

import torch
from torch import Tensor

from theory.lab import Claim, Line, Panel, ParameterError, Result, Settings, about, exactly, finite, parameter, where
from theory.noncontrastive_dynamics import ALIVE, Model, after_death, farthest, fixed_points, integrate
from theory.toys import F64, orthogonal, runge_kutta

EXAMPLE = "--epsilon 0.3 --frequency 20"
FOLDS = 12.0  # e-folds that a mode is given to relax
LONGEST = 1000.0  # time that is waited for it
LATEST = 4.0  # the oldest predictor of which a claim is made
Rule = Callable[[Tensor], Tensor]


class Parameters(Settings):
    dimension: int = parameter(16, "input and embedding dimension d", low=2, high=128)
    augmentation: float = parameter(0.25, "variance σ² of the augmentation", low=0)
    weight_decay: float = parameter(0.04, "weight decay η, below 1/(4(1 + σ²))", low=0, open_low=True)
    epsilon: float = parameter(0.1, "boost ε of the closed forms", low=0, open_low=True, high=1)
    memory: float = parameter(0.3, "weight ρ of the past in the moving average of F", low=0, high=0.999)
    frequency: int = parameter(1, "steps between two settings of the predictor", low=1, high=200)
    strongest: float = parameter(3.0, "largest σ_j² of the anisotropic augmentation", low=0)
    step: float = parameter(0.1, "time step of the integration", low=0, open_low=True, high=0.5)

    def check(self) -> None:
        threshold = 1 / (4 * (1 + self.augmentation))
        if self.weight_decay >= threshold:
            raise ParameterError(
                f"weight_decay must be below 1/(4(1 + σ²)) = {threshold:.4g}, not {self.weight_decay:g}: all modes die"
            )


def spectral(of: Callable[[Tensor], Tensor]) -> Rule:
    """The rule F -> U diag(of(s)) Uᵀ; s (..., d) ascending."""

    def rule(f: Tensor) -> Tensor:
        u: Tensor
        s, u = torch.linalg.eigh(f)
        return (u * of(s.clamp(min=0)).unsqueeze(-2)) @ u.mT

    return rule


def direct_pred(epsilon: float | Tensor) -> Rule:
    """epsilon: a number, or (k,) for k problems at once."""
    boost = torch.as_tensor(epsilon)[..., None]
    return spectral(lambda s: s.sqrt() + boost * s[..., -1:])


def normalised(epsilon: float) -> Rule:
    return spectral(lambda s: (s / s[..., -1:]).sqrt() + epsilon)


def direct_copy(epsilon: float | Tensor) -> Rule:
    """epsilon: a number, or (k,) for k problems at once."""
    boost = torch.as_tensor(epsilon)[..., None, None]
    return lambda f: f + boost * torch.eye(f.shape[-1], dtype=F64)


def each(*rules: tuple[int, Rule]) -> Rule:
    """Several rules at once: the first for so many of the problems (k, d, d), the next for so many that follow."""
    counts = [count for count, _ in rules]
    return lambda f: torch.cat([rule(part) for (_, rule), part in zip(rules, torch.split(f, counts), strict=True)])


def follow(
    given: Parameters, model: Model, rule: Rule, start: Tensor, until: float, frequency: int, finest: float = math.inf
) -> tuple[Tensor, Tensor]:
    """(W, W_p) at `until` under the rule: W flows with W_p held, W_p is set from F̂ every `frequency` steps.

    start (..., d, d). No step is longer than `finest`. With W_p held the flow is linear, Ẇ = (W_pᵀ − η)W − W_pᵀW_p WG
    with G = diag(1 + σ_j²).
    """
    w, f = start, start @ start.mT
    p = rule(f)
    gain, decay = 1 + model.noise, model.decay * torch.eye(start.shape[-1], dtype=F64)
    steps = math.ceil(until / min(given.step, finest))
    step = until / steps
    for index in range(steps):
        if index % frequency == 0:
            f = given.memory * f + (1 - given.memory) * w @ w.mT
            p = rule(f)
            grows, shrinks = p.mT - decay, p.mT @ p
            # Its fastest mode relaxes at λ_max(W_pᵀW_p)(1 + max σ_j²), which the largest row sum bounds.
            fastest = float(shrinks.abs().sum(-1).max() * gain.max())
            finer = max(1, math.ceil(step * fastest)) if math.isfinite(fastest) else 1
        for _ in range(finer):
            w = runge_kutta(lambda now: [grows @ now[0] - shrinks @ (now[0] * gain)], [w], step / finer)[0]  # noqa: B023
        if index % 200 == 0:
            finite(w, "W", index * step)
    return finite(w, "W", until), p


def fixed_size(p: float, epsilon: float) -> float:
    """s with √s + εs = p."""
    return p**2 if epsilon == 0 else ((math.sqrt(1 + 4 * epsilon * p) - 1) / (2 * epsilon)) ** 2


def alignment(w: Tensor, p: Tensor) -> float:
    """The smallest |cos(u, W_p u)| over the eigenvectors u of WWᵀ."""
    u = torch.linalg.eigh(w @ w.mT)[1]
    moved = p @ u
    return float(((u * moved).sum(0).abs() / moved.norm(dim=0).clamp(min=1e-300)).min())


def survivors(given: Parameters, start: Tensor, until: float, late: float) -> list[Claim]:
    """ε = 0 and η = 0.1 under an augmentation that varies along the directions: which of them survive.

    All start at |w| = 1.2. Where p = |w| or, with DirectCopy, |w|², is held for the delay τ, |w| shrinks by
    exp(−((1 + σ_j²)p² − p + η)τ), and p must not fall below p₋ in a direction that is to survive. On p = √s a mode
    dies as on the balanced curve of noncontrastive-dynamics; DirectCopy's twice as fast.
    """
    spread, eta, size = torch.linspace(0, given.strongest, given.dimension, dtype=F64), 0.1, 1.2
    rules = each((1, direct_pred(0)), (1, direct_copy(0)))
    w, _ = follow(given, Model(spread, eta), rules, (size * start).expand(2, -1, -1), until, 1)
    expected = int((1 + spread < 2.5).sum())
    claims = []
    for name, power, found in zip(("DirectPred", "DirectCopy"), (1, 2), torch.linalg.eigvalsh(w @ w.mT), strict=True):
        p = size**power
        left = [size * math.exp(-((1 + float(noise)) * p**2 - p + eta) * late) for noise in spread[:expected]]
        edges = [fixed_points(float(noise), eta)[0] for noise in spread[:expected]]
        kept = all(end**power > edge for end, edge in zip(left, edges, strict=True))
        seen = int((found > ALIVE).sum())
        claim = exactly(f"{name}, ε = 0, η = 0.1: surviving dimensions", "#{j: 1 + σ_j² < 1/(4η)}", expected, seen)
        claim = where(kept, f"the predictor is {late:.3g} old: the start outruns it", claim)
        claims.append(after_death(spread, eta, until, claim))
    return claims


def run(given: Parameters) -> Result:
    d, eta, noise, eps = given.dimension, given.weight_decay, given.augmentation, given.epsilon
    generator = given.generator()
    model = Model(torch.full((d,), noise, dtype=F64), eta)
    low, high = fixed_points(noise, eta)
    left, right = orthogonal(generator, d), orthogonal(generator, d)
    start = left * torch.linspace(max(0.3, 1.5 * low), 1.0, d, dtype=F64) @ right

    def delay(frequency: int) -> float:
        """How far F̂ lags behind F."""
        return given.step * frequency / (1 - given.memory)

    # Near its fixed point DirectPred's mode relaxes at p₊√(1 − 4η(1 + σ²)), DirectCopy's at 2(p₊ − ε) times that root.
    root = math.sqrt(1 - 4 * eta * (1 + noise))

    def settled(frequency: int) -> float:
        """Time until the fixed point. Beyond the longest delay of a claim nothing is waited for."""
        return min(max(100.0, FOLDS / (high * root)), LONGEST) + 30 * min(delay(frequency), LATEST)

    def sizes(rule: Rule, frequency: int = given.frequency, count: int = 1) -> Tensor:
        """Eigenvalues of WWᵀ in the end, (count, d), of so many problems at once from the same start."""
        w, _ = follow(given, model, rule, start.expand(count, -1, -1), settled(frequency), frequency)
        found: Tensor = torch.linalg.eigvalsh(w @ w.mT)
        return found

    def inside(claim: Claim, frequency: int = given.frequency) -> Claim:
        """A claim about fixed points: with a predictor that is too old, or next to the threshold, modes die first.

        The largest start is s = 1. While a predictor made for it, p = 1 + ε at most, is held for the delay τ, W shrinks
        by exp(−((1 + σ²)p² − p + η)τ), and must not fall below the basin's edge p₋.
        """
        late = delay(frequency)
        near = eta >= 0.85 / (4 * (1 + noise))
        first = (1 + noise) * (1 + eps) ** 2 - (1 + eps) + eta
        kept = late <= LATEST and first * late < -math.log(low)
        reason = (
            "η is within 15 % of its threshold" if near else f"the predictor is {late:.3g} old: the start outruns it"
        )
        found = where(not near and kept, reason, claim)
        return where(high * root * LONGEST >= FOLDS, f"modes relax at {high * root:.2g} only", found)

    grid = [0.02, 0.05, 0.1, 0.2, 0.3, 0.4]
    boosts = torch.tensor([0.0, eps, *grid], dtype=F64)
    rules = each((len(boosts), direct_pred(boosts)), (len(boosts) - 1, direct_copy(boosts[1:])))
    pred, copy = sizes(rules, count=2 * len(boosts) - 1).tensor_split([len(boosts)])

    def farthest_size(what: str, formula: str, found: Tensor, expected: float) -> Claim:
        return inside(about(what, formula, expected, farthest(found, expected), 2e-3))

    claims = [
        farthest_size("DirectPred, ε = 0: eigenvalue of F farthest from", "p₊²", pred[0], high**2),
        farthest_size(f"DirectPred, ε = {eps:g}", "((√(1 + 4εp₊) − 1)/2ε)²", pred[1], fixed_size(high, eps)),
    ]
    if eps < high:
        claim = farthest_size(f"DirectCopy, ε = {eps:g}", "p₊ − ε", copy[0], high - eps)
        relaxes = 2 * (high - eps) * root
        claims.append(
            where(relaxes * settled(given.frequency) >= FOLDS, f"its modes relax at {relaxes:.2g} only", claim)
        )
    # From p = 1/2(1 + σ²), which lies between p₋ and p₊, and s > p₋²: p cannot fall below p₋, since ṗ > 0 there, and as
    # long as it is between the two s grows.
    middle = torch.eye(d, dtype=F64) / (2 * (1 + noise))
    trained, predictor = integrate(model, start, middle, max(settled(1), 5 / eta), given.step)
    norm = farthest(torch.linalg.eigvalsh(trained @ trained.mT), high**2)
    claims.append(inside(about("trained predictor, the same as DirectPred with ε = 0", "p₊²", high**2, norm, 5e-3), 1))
    closed = direct_pred(0)(trained @ trained.mT)
    gap = float((closed - predictor).norm() / predictor.norm())
    claims.append(inside(Claim("trained W_p against √F: relative distance", "0", "<", 5e-3, gap), 1))
    for frequency in (5, 20):
        seen = farthest(sizes(direct_pred(0), frequency)[0], high**2)
        claim = about(f"DirectPred set every {frequency} steps", "p₊²", high**2, seen, 2e-3)
        claims.append(inside(claim, frequency))

    divided = torch.where(torch.arange(d) < d // 2, 0.8 * low, 1.25 * low)  # on both sides of the basin's edge
    w, _ = follow(given, model, direct_pred(0), left * divided @ right, 3 * settled(given.frequency), given.frequency)
    alive = int((torch.linalg.eigvalsh(w @ w.mT) > ALIVE).sum())
    claim = exactly("DirectPred, ε = 0: directions that survive their start", "#{j: √s_j > p₋}", d - d // 2, alive)
    claims.append(inside(claim))

    p = 1 + eps
    decay = 2 * (eta - p * (1 - (1 + noise) * p))
    same = 0.9 * orthogonal(generator, d)  # equal modes: p is 1 + ε for all of them
    # Runge-Kutta of step h has a rate that is off by (rate h)^4/120 of it: 3e-5 at a quarter.
    w, _ = follow(given, model, normalised(eps), same, 4.0, given.frequency, 0.5 / max(decay, 1e-3))
    seen = -float((w.square().sum() / same.square().sum()).log()) / 4
    claims.append(
        about("√(s/max s) + ε, equal modes: decay rate of s", "2(η − p(1 − (1+σ²)p)), p = 1 + ε", decay, seen, 1e-4)
    )

    claims += survivors(given, left, 3 * settled(1), delay(1))

    # one mode nearly dead, DirectCopy: it grows at 2(ε(1 − (1+σ²)ε) − η), so it revives above a computable ε
    tiny = torch.eye(d, dtype=F64) * 1e-4
    w, _ = follow(given, model, direct_copy(eps), tiny, 2.0, 1)
    growth, seen = 2 * (eps * (1 - (1 + noise) * eps) - eta), float((w.square().sum() / tiny.square().sum()).log()) / 2
    claims.append(about("DirectCopy: growth rate of a nearly dead mode", "2(ε(1 − (1+σ²)ε) − η)", growth, seen, 1e-3))

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
