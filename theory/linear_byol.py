"""The linear model of BYOL that three labs share: its flow, the integration of it, its fixed points and its times.

The equations are those of noncontrastive-dynamics. On the balanced curve s = p²/α_p a mode is one number p with

    ṗ = p(p − η − gp²) = −gp(p − p₋)(p − p₊),    g = 1 + σ² .

DirectPred without ε has the same law for p = √s. Its middle 1/2g = (p₋ + p₊)/2 lies in neither end's reach: a mode that
lives ends above it, one that dies ends below it. Above the threshold η_c = 1/4g the law reads
(ln p)˙ = −(η − η_c) − g(p − 1/2g)².
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from theory.lab import Claim, finite, where
from theory.toys import F64, runge_kutta, stride

WATCHED = 100  # stretches between two states that a `watch` sees


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

    @cached_property
    def gain(self) -> Tensor:
        """1 + σ_j² as a row, (1, d) or (k, 1, d)."""
        return 1 + self.noise.unsqueeze(-2)


def velocity(model: Model, w: Tensor, p: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(Ẇ, Ẇ_p, Ẇ_a) of equations 4 to 6, for X = I."""
    target = w if model.target is None else a
    residual = torch.addcmul(target, p @ w, model.gain, value=-1)
    w_dot = p.mT @ residual - model.decay * w
    if not model.stop_gradient:  # the target branch's own gradient: W_a = W moves towards the prediction
        w_dot = w_dot - (w * model.gain - p @ w)
    p_dot = model.rate * (residual @ w.mT) - model.decay * p if model.predictor else torch.zeros_like(p)
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


@torch.inference_mode()
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

    stretches = 1 if watch is None else WATCHED
    for part in range(stretches):
        if watch is not None:
            watch(state[0], state[1])
        left = until / stretches
        while left > 0:
            finite(state[0], "W", (part + 1) * until / stretches - left)
            longest = min(step, fraction * longest_step(model, state[0], state[1]))
            taken, length, left = stride(left, longest, 16)
            for _ in range(taken):
                moved = runge_kutta(field, [value for value, moves in zip(state, moving, strict=True) if moves], length)
                state = whole(moved)
    if watch is not None:
        watch(state[0], state[1])
    return finite(state[0], "W", until), finite(state[1], "W_p", until)


def fixed_points(noise: float, decay: float) -> tuple[float, float]:
    """(p₋, p₊) for τ = 1; NaN above the threshold."""
    root = float(torch.tensor(1 - 4 * decay * (1 + noise), dtype=F64).sqrt())
    return 2 * decay / (1 + root), (1 + root) / (2 * (1 + noise))  # 1 - root itself drowns in rounding


def farthest(values: Tensor, centre: float) -> float:
    """The entry of `values` farthest from `centre`: if it is close, all are."""
    return float(values[(values - centre).abs().argmax()])


def passage(start: float, end: float, noise: float, decay: float) -> float:
    """How long a balanced mode takes from p = `start` to p = `end`, both on one side of p₋ and of p₊.

    From the partial fractions of 1/(p(p − p₋)(p − p₊)).
    """
    low, high = fixed_points(noise, decay)

    def clock(p: float) -> float:
        near_low = math.log(abs(p - low)) / (low * (low - high))
        return math.log(p) / (low * high) + near_low + math.log(abs(p - high)) / (high * (high - low))

    return (clock(start) - clock(end)) / (1 + noise)


def time_to_balance(imbalance: float, noise: float, decay: float) -> float:
    """When |WWᵀ − W_pᵀW_p/α_p|, `imbalance` at the start, has left a thousandth in s; in units of s = p₊²/α_p.

    It falls at 2η and drives p, which relaxes at λ = p₊√(1 − 4ηg). With μ the lesser of 2η and λ the deviation of s is
    at most (1 + 2ηt)exp(−μt) times the imbalance at the start; the time is that of two iterations of t = ln(…)/μ.
    """
    high = fixed_points(noise, decay)[1]
    slower = max(min(2 * decay, high * math.sqrt(1 - 4 * decay * (1 + noise))), 1e-12)
    folds = math.log(1e3 * max(imbalance, 1.0))
    for _ in range(2):
        time = folds / slower
        folds = math.log(1e3 * max(imbalance, 1.0) * (1 + 2 * decay * time))
    return folds / slower


def time_to_die(spread: Tensor, decay: float) -> float:
    """How long the slowest mode above the threshold takes to its middle 1/2g; infinite at the threshold itself.

    From (ln p)˙ = −(η − η_c) − g(p − 1/2g)², with 1/p below 2g on the way, the time from any start is below
    π√(g/(η − η_c)). It is 0 if no mode is above the threshold.
    """
    over = [(float(gain), decay - 1 / (4 * float(gain))) for gain in 1 + spread if decay >= (1 - 1e-9) / (4 * gain)]
    return max((math.pi * math.sqrt(gain / by) if by > 1e-9 else math.inf for gain, by in over), default=0.0)


def after_death(spread: Tensor, decay: float, until: float, claim: Claim) -> Claim:
    """`claim`, where every mode above the threshold has had the time to die."""
    slowest = time_to_die(spread, decay)
    return where(slowest < until, f"a direction next to the threshold takes a time of {slowest:.0f}", claim)
