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
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from theory.lab import (
    Claim,
    Line,
    Panel,
    Result,
    Settings,
    about,
    above,
    below,
    exactly,
    finite,
    parameter,
    where,
)
from theory.toys import F64, normal, orthogonal, runge_kutta, stride

EXAMPLE = "--weight-decay 0.1 --augmentation 0.5"
ALIVE = 1e-3
COARSE = 0.5  # longest time step where only which side of an edge a mode ends on is asked
LONGEST = 1000.0  # time that is waited for an end
FOLDS = 8.0  # e-folds that a slow target is given
WATCHED = 100  # stretches between two states that a `watch` sees


class Parameters(Settings):
    dimension: int = parameter(16, "input and embedding dimension d", low=2, high=128)
    augmentation: float = parameter(0.25, "variance σ² of the augmentation", low=0)
    weight_decay: float = parameter(0.04, "weight decay η", low=0, open_low=True)
    predictor_rate: float = parameter(1.0, "learning rate α_p of the predictor over the encoder's", low=0.05, high=20)
    target_rate: float = parameter(0.5, "rate β of the moving target", low=0, open_low=True)
    strongest: float = parameter(3.0, "largest σ_j² of the anisotropic augmentation", low=0)
    step: float = parameter(0.1, "time step of the integration", low=0, open_low=True)


@dataclass(frozen=True)
class Model:
    """The constants of the flow. `noise` is the diagonal of X', (d,) or (k, d); X is the identity.

    Scalars may be (k, 1, 1) tensors: k independent problems at once. `target` None means W_a = W.
    """

    noise: Tensor
    decay: Tensor | float
    rate: Tensor | float = 1.0
    target: Tensor | float | None = None
    stop_gradient: bool = True
    predictor: bool = True


def velocity(model: Model, w: Tensor, p: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(Ẇ, Ẇ_p, Ẇ_a) of equations 4 to 6, for X = I."""
    target = w if model.target is None else a
    residual = target - (p @ w) * (1 + model.noise.unsqueeze(-2))
    w_dot = p.mT @ residual - model.decay * w
    if not model.stop_gradient:  # the target branch's own gradient: W_a = W moves towards the prediction
        w_dot = w_dot - (w * (1 + model.noise.unsqueeze(-2)) - p @ w)
    p_dot = model.rate * residual @ w.mT - model.decay * p if model.predictor else torch.zeros_like(p)
    a_dot = torch.zeros_like(a) if model.target is None else model.target * (w - a)
    return w_dot, p_dot, a_dot


def longest_step(model: Model, w: Tensor, p: Tensor) -> float:
    """One over the rate at which the fastest mode relaxes in this state; Runge-Kutta is stable up to 2.78 times that.

    W_p relaxes at α_p(1 + σ²)λ_max(WWᵀ), W at (1 + σ²)λ_max(W_pᵀW_p), without stop-gradient at (1 + σ²) more, and a
    moving target at β.
    """

    def largest(value: Tensor | float) -> float:
        return float(torch.as_tensor(value).max())

    def norm(value: Tensor) -> float:
        return float((value.abs() if value.shape[-1] == 1 else torch.linalg.svdvals(value)).max()) ** 2

    gain = 1 + largest(model.noise)
    encoder = norm(p) + (not model.stop_gradient)
    predictor = largest(model.rate) * norm(w) if model.predictor else 0.0
    target = 0.0 if model.target is None else largest(model.target)
    return 1 / (max(gain * max(encoder, predictor), target) + largest(model.decay))


def integrate(
    model: Model,
    w: Tensor,
    p: Tensor,
    until: float,
    step: float,
    watch: Callable[[Tensor, Tensor], None] | None = None,
    target: Tensor | None = None,
    fraction: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The state (W, W_p) at time `until`; W_a starts at `target` or at W.

    No step is longer than `step`, nor than `fraction` of the longest that the state of the moment allows. `watch` sees
    101 states at equal distances.
    """
    # What does not move is not integrated.
    state = [w, p, w if target is None else target]
    moving = [True, model.predictor, model.target is not None]

    def whole(parts: Sequence[Tensor]) -> list[Tensor]:
        rest = iter(parts)
        return [next(rest) if moves else value for moves, value in zip(moving, state, strict=True)]

    def field(now: Sequence[Tensor]) -> list[Tensor]:
        return [slope for slope, moves in zip(velocity(model, *whole(now)), moving, strict=True) if moves]

    for part in range(WATCHED):
        if watch is not None:
            watch(state[0], state[1])
        left = until / WATCHED
        while left > 0:
            finite(state[0], "W", (part + 1) * until / WATCHED - left)
            longest = min(step, fraction * longest_step(model, state[0], state[1]))
            taken, length, left = stride(left, longest, 16)
            for _ in range(taken):
                state = whole(
                    runge_kutta(field, [value for value, moves in zip(state, moving, strict=True) if moves], length)
                )
    if watch is not None:
        watch(state[0], state[1])
    return finite(state[0], "W", until), finite(state[1], "W_p", until)


def fixed_points(noise: float, decay: float) -> tuple[float, float]:
    """(p₋, p₊) for τ = 1; NaN above the threshold."""
    root = torch.tensor(1 - 4 * decay * (1 + noise), dtype=F64).sqrt()
    return float((1 - root) / (2 * (1 + noise))), float((1 + root) / (2 * (1 + noise)))


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
    given: Parameters, p: Tensor, s: Tensor, rates: Tensor, targets: Tensor | None = None, until: float = 200.0
) -> list[float]:
    """For each of k problems the start p that divides survival from collapse by `until`, of one-dimensional modes.

    p, s: (k, n) starts, p increasing along a row; rates: (k,) α_p; targets: (k,) β of a target that starts at zero.
    """
    k, n = p.shape

    def column(values: Tensor) -> Tensor:
        return values[:, None].expand(k, n).reshape(-1, 1, 1)

    flat = torch.full((1,), given.augmentation, dtype=F64)
    model = Model(flat, given.weight_decay, column(rates), None if targets is None else column(targets))
    w, start = s.sqrt().reshape(-1, 1, 1), p.reshape(-1, 1, 1)
    final, _ = integrate(model, w, start, until, COARSE, target=torch.zeros_like(w))
    alive = final.square().reshape(k, n) > ALIVE / rates[:, None]
    last_dead = n - 1 - (~alive).flip(1).int().argmax(1)
    found = []
    for row, last, some in zip(p, last_dead.tolist(), (~alive).any(1).tolist(), strict=True):
        found.append(float(row[last] + row[min(last + 1, n - 1)]) / 2 if some else float(row[0]))
    return found


def farthest(values: Tensor, centre: float) -> float:
    """The entry of `values` farthest from `centre`: if it is close, all are."""
    return float(values[(values - centre).abs().argmax()])


def parts(given: Parameters) -> tuple[list[Claim], Panel]:
    """Both parts present, a moving target, then predictor and stop-gradient taken away one at a time.

    The start is in no common basis with W_p. Until W_p has relaxed to 1/(1 + σ²), at the rate (1 + σ²)s of the smallest
    s = 0.8², its largest eigenvalue λ shrinks W by about exp(−(λ((1 + σ²)λ − 1) + η)/((1 + σ²)0.8²)): the fixed point
    is claimed where 0.8 times that is above the basin's edge p₋.
    """
    d, eta, noise, rate = given.dimension, given.weight_decay, given.augmentation, given.predictor_rate
    generator, eye = given.generator(), torch.eye(given.dimension, dtype=F64)
    flat = torch.full((d,), noise, dtype=F64)
    sizes = torch.linspace(0.8, 1.6, d, dtype=F64) / rate**0.5  # inside the basin, in no common basis with W_p
    start = orthogonal(generator, d) * sizes @ orthogonal(generator, d)
    half = normal(generator, d, d) / d**0.5
    predictor = 0.5 * (eye + half @ half.T / 2)
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

    # Of the imbalance C, in units of the fixed point's s = p₊²/α_p, a thousandth is to be left.
    threshold = 1 / (4 * (1 + noise))
    high = fixed_points(noise, min(eta, 0.9 * threshold))[1]
    imbalance = float(torch.linalg.matrix_norm(constant, 2)) * rate / high**2
    until = min(max(100.0, 5 / eta, math.log(1e3 * max(imbalance, 1.0)) / (2 * eta)), LONGEST)
    settled = imbalance * math.exp(-2 * eta * until)
    # A slow target follows at β r/(1 + r), r = √(1 − 4η(1 + σ²)): W moves by 1/(1 + r) of what W_a moves.
    distance = math.sqrt(max(0.0, 1 - eta / threshold))
    relaxes = distance / (1 + distance) * given.target_rate
    later = min(max(until, 100 + FOLDS / max(relaxes, 1e-9)), LONGEST)
    w, p = integrate(both, start, predictor, until, step, median("both"))
    slow, _ = integrate(moving, start, predictor, later, step, median("moving target"))
    sizes = torch.linalg.eigvalsh(w @ w.mT)
    if eta < 0.9 * threshold:
        s, near = high**2 / rate, 2e-3 + settled
        top = float(torch.linalg.eigvalsh(predictor)[-1])
        left = 0.8 * math.exp(-(top * ((1 + noise) * top - 1) + eta) / ((1 + noise) * 0.64))
        in_basin = left > fixed_points(noise, eta)[0]
        beyond = "the start may fall below the edge of the collapsed basin before W_p has relaxed"
        values, slow_sizes = torch.linalg.eigvals(p).real, torch.linalg.eigvalsh(slow @ slow.mT)
        root = "p₊ = (1 + √(1 − 4η(1+σ²))) / 2(1+σ²)"
        found = [
            about("the eigenvalue of W_p farthest from", root, high, farthest(values, high), near),
            about("the eigenvalue of WWᵀ farthest from", "p₊²/α_p", s, farthest(sizes, s), near),
            about("the same with a moving target", "p₊²/α_p", s, farthest(slow_sizes, s), 4 * near),
        ]
        left_over = f"{settled:.2g} of the start's imbalance is left at t = {until:.0f}"
        found[2] = where(relaxes * later >= FOLDS, f"the target settles at the rate {relaxes:.2g} only", found[2])
        claims += [where(in_basin, beyond, where(settled < 0.01, left_over, claim)) for claim in found]
    elif eta > 1.1 * threshold:
        claims.append(below("η is above the threshold: largest eigenvalue of WWᵀ", "→ 0", 1e-6, float(sizes[-1])))

    first = float(torch.linalg.svdvals(start)[0] ** 2)
    bound = first * math.exp(-50 * (eta + noise + noise / (1 + noise)))
    w, _ = integrate(open_, start, predictor, 25.0, step, median("no stop-gradient"), fraction=0.25)
    left = float(torch.linalg.svdvals(w)[0] ** 2)
    law = "s₀ exp(−2(η + σ² + σ²/(1+σ²))t)"
    claims.append(below("no stop-gradient: largest eigenvalue of WWᵀ at t = 25", law, bound, left))
    # Runge-Kutta of step h has a rate that is off by (rate h)^4/120 of it: 3e-5 at a quarter.
    w, _ = integrate(bare, start, eye, 50.0, step, median("no predictor"), fraction=0.25)
    seen = float((start.norm() / w.norm()).log()) / 50
    claims.append(about("no predictor: decay rate of W", "η + σ²", eta + noise, seen, 1e-4))
    ends = {"both": until, "moving target": later, "no stop-gradient": 25.0, "no predictor": 50.0}
    lines = [
        Line(name, torch.linspace(0, ends[name], len(trace)).tolist(), [max(value, 1e-14) for value in trace])
        for name, trace in traces.items()
    ]
    return claims, Panel("The median eigenvalue of WWᵀ", "time", "s", lines, log_y=True)


def threshold_of_decay(given: Parameters) -> tuple[list[Claim], Panel]:
    """One mode, many weight decays: where survival ends, and the edge of the basin at the given one.

    A mode 2 % above the threshold takes the time 2π√(g/(η − η_c)) = 89 g to die, g = 1 + σ² (see `survivors`); one that
    starts 2 % from the edge leaves it at the rate p₋√(1 − 4ηg), and 8 e-folds take it away.
    """
    noise, rate, eta = given.augmentation, given.predictor_rate, given.weight_decay
    threshold = 1 / (4 * (1 + noise))
    ratios = torch.linspace(0.5, 1.5, 51, dtype=F64)
    top = torch.full((51, 1, 1), 1 / (1 + noise), dtype=F64)
    model = Model(torch.full((1,), noise, dtype=F64), (ratios * threshold)[:, None, None], rate)
    w, _ = integrate(model, top / rate**0.5, top, max(400.0, 110 * (1 + noise)), COARSE)
    s = w.flatten().square()
    dead = ratios[s < ALIVE / rate] * threshold
    smallest = float(dead.min()) if len(dead) else math.nan
    too_small = f"what survives at the threshold is too small to be called alive: σ² = {noise:g}"
    seen = 1 / (2 * (1 + noise)) > 2 * ALIVE**0.5  # p at the threshold
    claim = about("smallest weight decay that collapses", "1/(4(1 + σ²))", threshold, smallest, 0.03)
    claims = [where(seen, too_small, claim)]
    if eta < 0.9 * threshold:
        low = fixed_points(noise, eta)[0]
        leaves = low * math.sqrt(1 - eta / threshold)
        p = low * torch.linspace(0.5, 1.5, 51, dtype=F64)[None]
        until = min(max(200.0, 8 / leaves), LONGEST)
        found = edges(given, p, p.square() / rate, torch.tensor([rate], dtype=F64), until=until)[0]
        claim = about("edge of the collapsed basin on s = p²/α_p", "p₋", low, found, 0.03)
        slow = f"the edge is left at the rate {leaves:.2g} only"
        claims.append(where(seen, too_small, where(leaves * until >= 8, slow, claim)))
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
    low = fixed_points(noise, min(eta, 0.2 / (1 + noise)))[0]
    by_rate = edges(given, grid.expand(5, -1), torch.full((5, 81), low**2, dtype=F64), rates)
    p = grid.expand(4, -1)
    by_speed = edges(given, p, p.square(), torch.ones(4, dtype=F64), speeds)
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


def time_to_die(spread: Tensor, decay: float) -> float:
    """How long the slowest mode above the threshold takes; infinite at the threshold itself, 0 if none is above.

    On the balanced curve (ln p)˙ = −(η − η_c) − g(p − 1/2g)² with g = 1 + σ_j² and η_c = 1/4g: the time is
    2π√(g/(η − η_c)).
    """
    over = [(float(gain), decay - 1 / (4 * float(gain))) for gain in 1 + spread if decay >= (1 - 1e-9) / (4 * gain)]
    return max((2 * math.pi * math.sqrt(gain / by) if by > 1e-9 else math.inf for gain, by in over), default=0.0)


def after_death(spread: Tensor, decay: float, until: float, claim: Claim) -> Claim:
    """`claim`, where every mode above the threshold has had the time to die."""
    slowest = time_to_die(spread, decay)
    return where(slowest < 0.9 * until, f"a direction next to the threshold takes a time of {slowest:.0f}", claim)


def survivors(given: Parameters) -> list[Claim]:
    """Dimensional collapse by weight decay under an augmentation that varies more along some directions.

    Above the threshold every mode must have had the time to die.
    """
    d, rate = given.dimension, given.predictor_rate
    spread = torch.linspace(0, given.strongest, d, dtype=F64)
    levels, until = sorted({0.08, 0.1, given.weight_decay}), 300.0
    start = orthogonal(given.generator(), d).expand(len(levels), -1, -1) / rate**0.5
    predictor = torch.eye(d, dtype=F64).expand(len(levels), -1, -1)
    model = Model(spread, torch.tensor(levels, dtype=F64)[:, None, None], rate)
    w, _ = integrate(model, start * 2, predictor, until, COARSE)
    claims = []
    for level, row in zip(levels, torch.linalg.eigvalsh(w @ w.mT), strict=True):
        what = f"surviving dimensions, σ_j² = 0 … {given.strongest:g}, η = {level:g}"
        expected, seen = int((1 + spread < 1 / (4 * level)).sum()), int((row > ALIVE / rate).sum())
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
