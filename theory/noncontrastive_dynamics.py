r"""Why a predictor and a stop-gradient keep BYOL from collapsing.

The smallest model of BYOL and SimSiam is linear: online encoder W, predictor W_p, target encoder W_a, two views x₁, x₂
of the same input, and the loss J = ½E|W_p W x₁ − stop_gradient(W_a x₂)|². There are no negatives, and W = 0 is a
perfect minimum. Why is it not reached? With X = E[x̄x̄ᵀ] (mean of an input's views) and X' (their variance), gradient
flow with weight decay η and predictor rate α_p is

    Ẇ_p = α_p(−W_p W(X + X') + W_a X)Wᵀ − ηW_p
    Ẇ   = W_pᵀ(−W_p W(X + X') + W_a X) − ηW
    Ẇ_a = β(W − W_a)                     (BYOL; SimSiam has W_a = W)

**Balance.** WWᵀ − W_pᵀW_p/α_p = e^{−2ηt}C: weight decay makes encoder and predictor tell the same story.

**Take one part away.** Without stop-gradient the flow is d vec(W)/dt = −H vec(W) with
H = X'⊗(W_pᵀW_p + I) + X⊗(W_p − I)ᵀ(W_p − I) + ηI, positive definite: W → 0. With X = I, X' = σ²I the slowest rate of a
mode s = w² is at least 2(η + σ² + σ²/(1 + σ²)), the minimum of H over p. Without the predictor W decays at exactly
η + σ².

**With both.** In a common eigenbasis each mode has one number p in W_p and one number s in WWᵀ, and

    ṗ = α_p s[1 − (1 + σ²)p] − ηp,        ṡ = 2ps[1 − (1 + σ²)p] − 2ηs .

On the balanced curve s = p²/α_p there are three fixed points: 0 and p₊ are stable, p₋ is the edge between them,

    p± = [1 ± √(1 − 4η(1 + σ²))] / (2(1 + σ²)) ,

and if η > 1/(4(1 + σ²)) only 0 is left: **too much weight decay collapses every mode**. If the augmentation varies
more along some directions, σ_j² takes the place of σ², and the modes with 1 + σ_j² > 1/(4η) die one by one. That is
*dimensional* collapse, and it can be counted beforehand.

**The knobs.** A larger α_p makes the collapsed basin smaller, but the fixed point s = p₊²/α_p smaller too. A slower
target (smaller β) does not move the fixed points; growth waits for the target, and the collapsed basin grows.

The flow does not show everything: networks without a moving target and with a symmetric predictor collapse in practice
(20 % on CIFAR-10), while this model survives from moderate starts. That failure needs finite steps and nonlinearity.

## What it means for someone serving embeddings

A non-contrastive encoder can lose a known number of dimensions to weight decay alone, without any sign in its training
loss. Check its effective rank before serving it; a later fine-tune with more weight decay or stronger augmentation may
have fewer dimensions than the model it replaces.

## Source

Tian, Chen, Ganguli, *Understanding Self-Supervised Learning Dynamics without Contrastive Pairs*, ICML 2021,
arXiv:2102.06810, theorems 1 and 2, section 3. The rates of the two ablations are derived here.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from theory.lab import Claim, Line, Panel, Result, Settings, about, above, below, exactly, parameter, where
from theory.linear_byol import (
    Model,
    after_death,
    farthest,
    fixed_points,
    integrate,
    passage,
    time_to_balance,
    time_to_die,
    velocity,
)
from theory.toys import F64, normal, orthogonal

EXAMPLE = "--weight-decay 0.1 --augmentation 0.5"
# Longest time step, over 1 + σ², where only the side of an edge is asked on which a mode ends: a mode grows at the rate
# p − η − (1 + σ²)p² at most, which is below 1/4(1 + σ²): a quarter of an e-fold a step.
COARSE = 1.0
# Time that is waited for an end: chosen, so that a run stays within seconds. A claim whose wait is longer is outside.
LONGEST = 1000.0
FOLDS = 8.0  # e-folds that a slow target is given: 3e-4 is left
# The rate of a decay that Runge-Kutta gives in steps h is off by (rate h)^4/120 of it: 3e-5 at a quarter.
QUARTER, RATE_ERROR = 0.25, 1e-4


class Parameters(Settings):
    dimension: int = parameter(16, "input and embedding dimension d", low=2, high=128)
    augmentation: float = parameter(0.25, "variance σ² of the augmentation", low=0)
    weight_decay: float = parameter(0.04, "weight decay η", low=0, open_low=True)
    predictor_rate: float = parameter(1.0, "learning rate α_p of the predictor over the encoder's", low=0.05, high=20)
    target_rate: float = parameter(0.5, "rate β of the moving target", low=0, open_low=True)
    strongest: float = parameter(3.0, "largest σ_j² of the anisotropic augmentation", low=0)
    step: float = parameter(1.0, "longest time step of the integration", low=0, open_low=True)


def gradient_errors(given: Parameters) -> tuple[float, float]:
    """Relative errors of the flow against autograd on sampled views, all pairs: with and without stop-gradient."""
    generator, d = given.generator(), given.dimension
    means = normal(generator, 4 * d, d)
    means = torch.linalg.qr(means)[0] * (4 * d) ** 0.5  # X = I exactly
    signs = torch.tensor([-1.0, 1.0], dtype=F64)
    scale = given.augmentation**0.5
    # views x̄ ± σ√d e_j for j = 1..d: their mean is x̄ and their variance σ²I exactly
    views = (means[:, None, None] + signs[:, None, None] * scale * d**0.5 * torch.eye(d, dtype=F64)).reshape(
        -1, 2 * d, d
    )
    model = Model(torch.full((d,), given.augmentation, dtype=F64), 0.0)
    errors = []
    for stop in (True, False):
        w, p = ((normal(generator, d, d) / d**0.5).requires_grad_() for _ in range(2))
        prediction, target = views @ w.T @ p.T, views @ w.T
        target = target.detach() if stop else target
        # mean over pairs of |f − g|² = mean|f|² + mean|g|² − 2 mean f·mean g, per input
        cross = (prediction.mean(1) * target.mean(1)).sum(-1)
        loss = 0.5 * (prediction.square().sum(-1).mean(1) + target.square().sum(-1).mean(1) - 2 * cross).mean()
        found = torch.autograd.grad(loss, [w, p])
        flow = velocity(Model(model.noise, 0.0, stop_gradient=stop), w.detach(), p.detach(), w.detach())
        errors.append(max(float((g + v).norm() / g.norm()) for g, v in zip(found, flow, strict=False)))
    return errors[0], errors[1]


def edges(
    given: Parameters, p: Tensor, s: Tensor, rates: Tensor, until: float, targets: Tensor | None = None
) -> list[float]:
    """For each of k problems the start p that divides survival from collapse by `until`, of one-dimensional modes.

    A mode is alive above the middle of p₋ and p₊. p, s: (k, n) starts, p increasing along a row; rates: (k,) α_p;
    targets: (k,) β of a target that starts at zero.
    """
    k, n = p.shape
    gain = 1 + given.augmentation

    def column(values: Tensor) -> Tensor:
        return values[:, None].expand(k, n).reshape(-1, 1, 1)

    flat = torch.full((1,), given.augmentation, dtype=F64)
    model = Model(flat, given.weight_decay, column(rates), None if targets is None else column(targets))
    w, start = s.sqrt().reshape(-1, 1, 1), p.reshape(-1, 1, 1)
    final, _ = integrate(model, w, start, until, COARSE * gain, target=torch.zeros_like(w))
    alive = final.square().reshape(k, n) * rates[:, None] > 1 / (2 * gain) ** 2
    last_dead = n - 1 - (~alive).flip(1).int().argmax(1)
    found = []
    for row, last, some in zip(p, last_dead.tolist(), (~alive).any(1).tolist(), strict=True):
        found.append(float(row[last] + row[min(last + 1, n - 1)]) / 2 if some else float(row[0]))
    return found


def parts(given: Parameters) -> tuple[list[Claim], Panel]:
    """Both parts present, a moving target, then predictor and stop-gradient taken away one at a time.

    The start is in no common basis with W_p, and α_p WWᵀ ⪰ 0.8² ⪰ W_pᵀW_p, which by the law of balance stays so. A
    mode then has α_p s ≥ p² for ever, hence ṗ ≥ p(p − η − (1 + σ²)p²): from p ≥ 0.4, which is above p₋ below nine
    tenths of the threshold, it cannot fall below p₋.
    """
    d, eta, noise, rate = given.dimension, given.weight_decay, given.augmentation, given.predictor_rate
    generator, eye = given.generator(), torch.eye(given.dimension, dtype=F64)
    flat = torch.full((d,), noise, dtype=F64)
    sizes = torch.linspace(0.8, 1.6, d, dtype=F64) / rate**0.5
    start = orthogonal(generator, d) * sizes @ orthogonal(generator, d)
    basis = orthogonal(generator, d)
    predictor = basis * torch.linspace(0.4, 0.8, d, dtype=F64) @ basis.T
    step = given.step
    traces: dict[str, list[float]] = {}

    def median(name: str) -> Callable[[Tensor, Tensor], None]:
        return lambda w, p: traces.setdefault(name, []).append(float(torch.linalg.svdvals(w)[d // 2] ** 2))

    both, moving, open_, bare = (
        Model(flat, eta, rate),
        Model(flat, eta, rate, given.target_rate),
        Model(flat, eta, rate, stop_gradient=False),
        Model(flat, eta, predictor=False),
    )
    early_w, early_p = integrate(both, start, predictor, 10.0, step, fraction=0.05)
    constant = start @ start.mT - predictor.mT @ predictor / rate
    balance = early_w @ early_w.mT - early_p.mT @ early_p / rate - math.exp(-20 * eta) * constant
    error = float(balance.norm() / constant.norm())
    claims = [below("balance: WWᵀ − W_pᵀW_p/α_p = e^(−2ηt)C, at t = 10", "relative error", 1e-6, error)]

    first, threshold = float(sizes[-1]) ** 2, 1 / (4 * (1 + noise))
    if eta > threshold:
        # W_p + W_pᵀ − 2(1 + σ²)W_pᵀW_p ⪯ 1/2(1 + σ²), whatever W_p is: W shrinks at η − 1/4(1 + σ²) or faster.
        dies = 2 * (eta - threshold)
        until = later = min(math.log(1e6) / dies, LONGEST)
        w, _ = integrate(both, start, predictor, until, step, median("both"), fraction=QUARTER)
        integrate(moving, start, predictor, later, step, median("moving target"))
        bound, law = first * math.exp(-(1 - RATE_ERROR) * dies * until), "s₀ exp(−2(η − 1/(4(1 + σ²)))t)"
        what = f"η is above the threshold: largest eigenvalue of WWᵀ at t = {until:.3g}"
        claims.append(below(what, law, bound, float(torch.linalg.matrix_norm(w, 2)) ** 2))
    else:
        # Of the imbalance C, in units of the fixed point's s = p₊²/α_p, a thousandth is to be left in s.
        high, distance = fixed_points(noise, eta)[1], max(math.sqrt(1 - eta / threshold), 1e-9)
        imbalance = float(torch.linalg.matrix_norm(constant, 2)) * rate / high**2
        # A least wait, here 100, can only make a claim's end more certain; it keeps the pictures' time axes alike.
        balances = max(100.0, time_to_balance(imbalance, noise, eta))
        # A slow target follows at β r/(1 + r), r = √(1 − 4η(1 + σ²)): W moves by 1/(1 + r) of what W_a moves.
        follows = max(balances, 100 + FOLDS * (1 + distance) / (distance * given.target_rate))
        until, later = (time if time <= LONGEST else 100.0 for time in (balances, follows))
        w, p = integrate(both, start, predictor, until, step, median("both"))
        slow, _ = integrate(moving, start, predictor, later, step, median("moving target"))
        if eta < 0.9 * threshold:
            s, near, root = high**2 / rate, 3e-3, "p₊ = (1 + √(1 − 4η(1+σ²))) / 2(1+σ²)"
            values = (
                torch.linalg.eigvals(p).real,
                torch.linalg.eigvalsh(w @ w.mT),
                torch.linalg.eigvalsh(slow @ slow.mT),
            )
            settled = [
                about("the eigenvalue of W_p farthest from", root, high, farthest(values[0], high), near),
                about("the eigenvalue of WWᵀ farthest from", "p₊²/α_p", s, farthest(values[1], s), near),
                about("the same with a moving target", "p₊²/α_p", s, farthest(values[2], s), 4 * near),
            ]
            for claim, time in zip(settled, (balances, balances, follows), strict=True):
                slowly = f"encoder, predictor and target take a time of {time:.0f} to balance and settle"
                claims.append(where(time <= LONGEST, slowly, claim))

    # Neither of the two that follow is given more than 100 e-folds: W stays far above the smallest float.
    slowest = eta + noise + noise / (1 + noise)
    short = min(25.0, 50 / slowest)
    w, _ = integrate(open_, start, predictor, short, step, median("no stop-gradient"), fraction=QUARTER)
    left = float(torch.linalg.svdvals(w)[0] ** 2)
    what, law = f"no stop-gradient: largest eigenvalue of WWᵀ at t = {short:.3g}", "s₀ exp(−2(η + σ² + σ²/(1+σ²))t)"
    claims.append(below(what, law, first * math.exp(-2 * slowest * short), left))
    long = min(50.0, 100 / (eta + noise))
    w, _ = integrate(bare, start, eye, long, step, median("no predictor"), fraction=QUARTER)
    seen = float((start.norm() / w.norm()).log()) / long
    claims.append(about("no predictor: decay rate of W", "η + σ²", eta + noise, seen, RATE_ERROR))
    ends = {"both": until, "moving target": later, "no stop-gradient": short, "no predictor": long}
    lines = [
        Line(name, torch.linspace(0, ends[name], len(trace)).tolist(), [max(value, 1e-14) for value in trace])
        for name, trace in traces.items()
    ]
    return claims, Panel("The median eigenvalue of WWᵀ", "time", "s", lines, log_y=True)


def threshold_of_decay(given: Parameters) -> tuple[list[Claim], Panel]:
    """One mode, many weight decays: where survival ends, and the edge of the basin at the given one.

    What lives at the threshold has p above the middle 1/2g of p₋ and p₊, g = 1 + σ², and what dies falls below it, 2 %
    above the threshold in a time of π√(g/(η − η_c)) = 44g (see `time_to_die`). The picture gets twice that. At the
    given weight decay a mode that starts 2 % above the edge rises to the middle in a time known in closed form.
    """
    noise, rate, eta = given.augmentation, given.predictor_rate, given.weight_decay
    gain = 1 + noise
    threshold, middle = 1 / (4 * gain), 1 / (2 * gain)
    ratios = torch.linspace(0.5, 1.5, 51, dtype=F64)
    top = torch.full((51, 1, 1), 1 / gain, dtype=F64)
    model = Model(torch.full((1,), noise, dtype=F64), (ratios * threshold)[:, None, None], rate)
    w, _ = integrate(model, top / rate**0.5, top, 2 * math.pi * gain / math.sqrt(0.02 / 4), COARSE * gain)
    s = w.flatten().square()
    dead = ratios[s * rate < middle**2] * threshold
    smallest = float(dead.min()) if len(dead) else math.nan
    claims = [about("smallest weight decay that collapses", "1/(4(1 + σ²))", threshold, smallest, 0.03)]
    if eta < 0.9 * threshold:
        low = fixed_points(noise, eta)[0]
        p = low * torch.linspace(0.5, 1.5, 51, dtype=F64)[None]
        rises = passage(1.02 * low, middle, noise, eta)
        until = min(1.05 * rises, LONGEST * gain)
        found = edges(given, p, p.square() / rate, torch.tensor([rate], dtype=F64), until)[0]
        claim = about("edge of the collapsed basin on s = p²/α_p", "p₋", low, found, 0.03)
        claims.append(where(rises <= until, f"a mode next to it rises in a time of {rises:.0f}", claim))
    curve = [fixed_points(noise, float(each) * threshold)[1] ** 2 / rate for each in ratios]
    lines = [
        Line("integrated", ratios.tolist(), s.tolist(), marks=True),
        Line("p₊²/α_p", ratios.tolist(), curve, dashed=True),
    ]
    return claims, Panel("Weight decay: what survives", "η / threshold", "s at the end", lines)


def knobs(given: Parameters) -> tuple[list[Claim], Panel]:
    """The basin's edge against the predictor's rate (from a small encoder) and the target's (from a zero target)."""
    noise, eta = given.augmentation, given.weight_decay
    rates = torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0], dtype=F64)
    speeds = torch.tensor([2.0, 0.5, 0.2, 0.1], dtype=F64)
    grid = torch.logspace(-4, 0, 81, dtype=F64)
    low, until = fixed_points(noise, min(eta, 0.2 / (1 + noise)))[0], 100 * (1 + noise)
    by_rate = edges(given, grid.expand(5, -1), torch.full((5, 81), low**2, dtype=F64), rates, until)
    p = grid.expand(4, -1)
    by_speed = edges(given, p, p.square(), torch.ones(4, dtype=F64), until, speeds)
    claims = []
    if eta < 0.8 / (4 * (1 + noise)):
        what = "smallest surviving start p: α_p = 1/4 over α_p = 4, from s = p₋²"
        claim = above(what, "larger α_p, smaller collapsed basin", 1.0, by_rate[0] / by_rate[-1])
        claims.append(in_view(grid, by_rate[0], by_rate[-1], claim))
        what = "smallest surviving start p: β = 0.1 over β = 2, target from zero"
        claim = above(what, "slower target, larger collapsed basin", 1.0, by_speed[-1] / by_speed[0])
        claims.append(in_view(grid, by_speed[-1], by_speed[0], claim))
    lines = [
        Line("α_p, from s = p₋²", rates.tolist(), by_rate),
        Line("β, from W_a = 0", speeds.tolist(), by_speed),
    ]
    return claims, Panel("Start p needed to survive", "α_p, or β of the target", "p", lines, log_x=True, log_y=True)


def in_view(grid: Tensor, high: float, low: float, claim: Claim) -> Claim:
    """`claim` that `high` is above `low`, unless both lie beyond the same end of the grid of starts."""
    least, most = float(grid[0]), float(grid[-1])
    seen = not (high <= least and low <= least) and not (high >= most and low >= most)
    return where(seen, f"both edges lie outside the starts that were tried, {least:g} to {most:g}", claim)


def survivors(given: Parameters) -> list[Claim]:
    """Dimensional collapse by weight decay under an augmentation that varies more along some directions.

    Above the threshold every mode must have had the time to die. The start is balanced, s = p²/α_p with p = 1. With
    p₋ + p₊ = 1/(1 + σ_j²) a survivor has p₊ > 2η, and what dies falls below that.
    """
    d, rate = given.dimension, given.predictor_rate
    spread = torch.linspace(0, given.strongest, d, dtype=F64)
    levels = sorted({0.08, 0.1, given.weight_decay})
    times = [1.05 * time_to_die(spread, level) for level in levels]
    until = max([10.0, *(time for time in times if time <= LONGEST)])
    start = orthogonal(given.generator(), d).expand(len(levels), -1, -1) / rate**0.5
    predictor = torch.eye(d, dtype=F64).expand(len(levels), -1, -1)
    model = Model(spread, torch.tensor(levels, dtype=F64)[:, None, None], rate)
    w, _ = integrate(model, start, predictor, until, COARSE)
    claims = []
    for level, row in zip(levels, torch.linalg.eigvalsh(w @ w.mT), strict=True):
        what = f"surviving dimensions, σ_j² = 0 … {given.strongest:g}, η = {level:g}"
        expected, seen = int((1 + spread < 1 / (4 * level)).sum()), int((row * rate > (2 * level) ** 2).sum())
        claim = exactly(what, "#{j: 1 + σ_j² < 1/(4η)}", expected, seen)
        claims.append(after_death(spread, level, until, claim))
    return claims


def run(given: Parameters) -> Result:
    with_stop, without_stop = gradient_errors(given)
    gradients = [
        below("the loss' gradients are the flow", "relative error", 1e-10, with_stop),
        below("without stop-gradient: the gradient is −H vec(W)", "relative error", 1e-10, without_stop),
    ]
    sections = [parts(given), threshold_of_decay(given), knobs(given)]
    claims = [claim for found, _ in sections for claim in found]
    return Result([*gradients, *claims, *survivors(given)], [panel for _, panel in sections])
