r"""The predictor learns the eigenvectors of the representation.

In the linear model of BYOL (see noncontrastive-dynamics) let F = WXWᵀ be the correlation matrix of the representation
and W_p the linear predictor. For isotropic inputs and augmentation and a symmetric predictor both move together,

    Ẇ_p = −(α_p/2)(1 + σ²){W_p, F} + α_p F − ηW_p
    Ḟ   = −(1 + σ²){W_p², F} + {W_p, F} − 2ηF ,          {A, B} = AB + BA,

and their commutator obeys, exactly,

    d/dt [F, W_p] = −K[F, W_p] − [F, W_p]K,    K = (1 + σ²)(α_p F/2 + W_p² − W_p/(1 + σ²)) + (3η/2) I .

When K ⪰ λ₀ > 0 the commutator shrinks at least like e^{−2λ₀t}: **predictor and correlation matrix come to share their
eigenvectors**, and the flow falls apart into independent modes. This is what makes the one-number-per-mode analysis of
the other labs legitimate. Near the stable point F = p₊²/α_p I, W_p = p₊ I, where p₊ − (1 + σ²)p₊² = η, the rate 2K is
p₊ itself, whatever α_p is.

The alignment is measured as in the paper: for every eigenvector u_j of F, how far does W_p rotate it? 1 means not at
all. The lab's predictors, the identity and a random matrix, begin with a mean of 0.8 to 0.9, which has a closed form:
they were drawn without a look at F. They end at 1. That holds beyond the theorem's assumptions: with an augmentation
that differs along directions, so that the s_j are different and the eigenvectors mean something, and with a predictor
nobody symmetrised. A direction that has died carries no gradient, so only surviving ones are counted.

With `--run PATH` the lab also reads the log of a training run (JSON lines) and shows the measured alignment of a real
network's linear predictor over its epochs; the log must hold `predictor_alignment` (list of |cos|) beside `epoch`. The
paper's figure is of 100 epochs of STL-10, so that 0.9 is asked of a run of at least 50. The run on this page is BYOL
with a linear predictor on CIFAR-10 (`python -m benchmarks.experiments E`: a ResNet-18 of width 16, one seed). The mean
rises from 0.73 after the first epoch to 0.95 after the third and 0.998 after the last.

## What it means for someone serving embeddings

The eigenbasis of the representation is not an accident of the measurement: training organises itself along it. This is
why the monitor compares band energies in the *reference eigenbasis* that is stored with the encoder. A direction that
went missing is missing there, while in a basis recomputed from today's traffic every tail looks alike.

## Source

Tian, Chen, Ganguli, ICML 2021, arXiv:2102.06810, theorem 3 and figure 2. The printed bound is checked with K along the
path: ‖[F, W_p]‖ ≤ exp(−2∫λ_min(K)dt) times its value at t = 0.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

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
    above,
    below,
    finite,
    parameter,
    where,
)
from theory.linear_byol import Model, fixed_points, integrate
from theory.toys import F64, normal, runge_kutta, stride

EXAMPLE = "--weight-decay 0.02 --predictor-rate 3"
DEAD = 1e-3  # of the largest eigenvalue of F
# Time of either flow, at most: chosen, so that a run stays within seconds. A claim whose wait is longer is outside.
LONGEST = 600.0
FOLDS = 12.0  # e-folds that the commutator is given: 9.2 are asked, the rest is for a start with K not yet positive
DRAWS = 200  # random predictors of which the mean |cos| is taken
LONG = 50  # epochs of a run of which alignment is asked


class Parameters(Settings):
    dimension: int = parameter(16, "input and embedding dimension d", low=2, high=128)
    augmentation: float = parameter(0.25, "variance σ² of the augmentation", low=0)
    strongest: float = parameter(1.0, "largest σ_j² of the anisotropic augmentation", low=0.1)
    weight_decay: float = parameter(0.04, "weight decay η", low=0, open_low=True)
    predictor_rate: float = parameter(1.0, "learning rate α_p of the predictor", low=0.05, high=20)
    step: float = parameter(0.05, "time step of the integration", low=0, open_low=True, high=0.5)
    run: str = parameter("", "JSON-lines log of a training run with a linear predictor")


def commutator(a: Tensor, b: Tensor) -> Tensor:
    return a @ b - b @ a


def symmetric_flow(given: Parameters, f: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """(Ḟ, Ẇ_p) for X = I, X' = σ²I, W_a = W and symmetric W_p."""
    gain, eta, rate = 1 + given.augmentation, given.weight_decay, given.predictor_rate
    square = p @ p
    f_dot = -gain * (square @ f + f @ square) + p @ f + f @ p - 2 * eta * f
    p_dot = -rate / 2 * gain * (p @ f + f @ p) + rate * f - eta * p
    return f_dot, p_dot


def restoring(given: Parameters, f: Tensor, p: Tensor) -> Tensor:
    """K of theorem 3."""
    gain, eye = 1 + given.augmentation, torch.eye(len(f), dtype=F64)
    return gain * (given.predictor_rate * f / 2 + p @ p - p / gain) + 1.5 * given.weight_decay * eye


def cosines(f: Tensor, p: Tensor) -> Tensor:
    """|cos(u_j, W_p u_j)| (..., d) for the eigenvectors of F, largest eigenvalue first; dead directions read NaN."""
    s, u = torch.linalg.eigh(f)
    moved = p @ u
    found = (u * moved).sum(-2).abs() / moved.norm(dim=-2)
    return torch.where(s > DEAD * s[..., -1:], found, torch.nan).flip(-1)


def untrained(dimension: int, centre: float, along: float, across: float) -> float:
    """The mean |cos| of a vector z e + y to the unit vector e, for z ~ N(centre, along) and y ~ N(0, across) beside e.

    With 1/√q = (2/√π) ∫ exp(−qu²)du the mean over y is (1 + 2 across u²)^(−(d − 1)/2), and the mean of |z|exp(−z²u²)
    is that of a folded normal with the variance along·k and the mean centre·k, times √k exp(−centre²u²k), where
    k = 1/(1 + 2 along u²). u = e^x makes the trapezoidal rule exact to 1e-8.
    """
    x = torch.linspace(-20, 20, 4001, dtype=F64)
    u2 = (2 * x).exp()
    k = 1 / (1 + 2 * along * u2)
    mean, spread = centre * k, (along * k).sqrt()
    z = mean / spread
    folded = spread * math.sqrt(2 / math.pi) * (-z.square() / 2).exp() + mean * torch.erf(z / math.sqrt(2))
    beside = (1 + 2 * across * u2) ** (-(dimension - 1) / 2)
    integrand = k.sqrt() * (-(centre**2) * u2 * k).exp() * folded * beside * x.exp()
    return float(2 / math.sqrt(math.pi) * torch.trapezoid(integrand, x))


def predictors(generator: torch.Generator, dimension: int, count: int) -> tuple[Tensor, Tensor]:
    """Random predictors, symmetric and not, (count, d, d) each."""
    a = normal(generator, count, dimension, dimension) / dimension**0.5
    eye = torch.eye(dimension, dtype=F64)
    return 0.3 * (a + a.mT) + 0.7 * eye, 0.5 * a + 0.7 * eye


def before(given: Parameters, f: Tensor) -> list[Claim]:
    """No predictor that was drawn without a look at F is aligned with it: the mean |cos| of many is that of the law."""
    d = given.dimension
    laws = {"symmetric": (0.36 / d, 0.18 / d), "any": (0.25 / d, 0.25 / d)}  # variances along u_j and beside it
    claims = []
    for (name, (along, across)), drawn in zip(laws.items(), predictors(given.generator(), d, DRAWS), strict=True):
        means = cosines(f, drawn).nanmean(-1)
        expected, error = untrained(d, 0.7, along, across), float(means.std()) / DRAWS**0.5
        what = f"{name} predictors before training: mean |cos|"
        claims.append(Claim(what, "E|z|/√(z² + |y|²)", "≈", expected, float(means.mean()), 4.5 * error))
    return claims


def theorem(given: Parameters, f: Tensor, p: Tensor) -> tuple[list[Claim], Panel]:
    """The symmetric flow: the commutator, its equation, its bound and its end.

    Where both of two directions live the commutator falls at p₊, where one dies at p₊/2 + 3η/2, and above the threshold
    2K = 3(1 + σ²)p² − 2p + 3η is at least 0.4/(1 + σ²). It is followed to the rounding of float64. Before that K need
    not be positive: a start with W_pᵀW_p far above α_p F takes F through zero and back, and the commutator with it. The
    theorem promises its end where the bound ends.
    """
    eta, gain = given.weight_decay, 1 + given.augmentation
    f_dot, p_dot = symmetric_flow(given, f, p)
    bracket, k = commutator(f, p), restoring(given, f, p)
    found = commutator(f_dot, p) + commutator(f, p_dot)
    identity = float((found + k @ bracket + bracket @ k).norm() / found.norm())
    lives = eta < 1 / (4 * gain)
    rate = fixed_points(given.augmentation, eta)[1] / 2 + 1.5 * eta if lives else 0.4 / gain
    # A least wait, 80 here and 200 below, can only make an end more certain; it keeps the pictures' time axes alike.
    until = min(max(80.0, FOLDS / rate), LONGEST)

    times, sizes, bounds, margin = [0.0], [float(bracket.norm())], [float(bracket.norm())], 0.0
    state, exponent, lowest = [f, p], 0.0, float(torch.linalg.eigvalsh(k)[0])
    while times[-1] < until and sizes[-1] > 1e-13 * sizes[0]:
        left = 1.0
        while left > 0:
            begun = times[-1] + 1 - left
            taken, step, left = stride(left, min(given.step, 0.5 / fastest(given, *state)), 8)
            for index in range(1, taken + 1):
                state = runge_kutta(lambda now: symmetric_flow(given, now[0], now[1]), state, step)
                field = restoring(given, *[finite(s, "F or W_p", begun + index * step) for s in state])
                now = float(torch.linalg.eigvalsh(field)[0])
                exponent, lowest = exponent + step * (lowest + now) / 2, now
        times.append(times[-1] + 1)
        sizes.append(float(commutator(state[0], state[1]).norm()))
        bounds.append(bounds[0] * math.exp(-2 * exponent))
        if sizes[-1] > 1e-13 * sizes[0]:
            margin = max(margin, sizes[-1] / bounds[-1])
    end = below("commutator at the end over its start", "→ 0", 1e-4, sizes[-1] / sizes[0])
    claims = [
        below("d/dt of the commutator is −K[F,W_p] − [F,W_p]K", "relative error", 1e-10, identity),
        below("commutator over its bound, the worst along the path", "exp(−2∫λ_min(K)dt)", 1 + 1e-3, margin),
        where(bounds[-1] < 1e-4 * bounds[0], f"the bound on it is {bounds[-1] / bounds[0]:.2g} there", end),
    ]
    lines = [Line("integrated", times, sizes), Line("bound of theorem 3", times, bounds, dashed=True)]
    return claims, Panel("Commutator of F and W_p", "time", "‖[F, W_p]‖", lines, log_y=True)


def full(given: Parameters, w: Tensor, starts: dict[str, Tensor]) -> tuple[list[Claim], Panel]:
    """The full flow, beyond the theorem: anisotropic augmentation, any predictor.

    What is left of C = WWᵀ − W_pᵀW_p/α_p after the time t, exp(−2ηt)C, turns an eigenvector of F by sin = |C|/s.
    """
    eta, rate = given.weight_decay, given.predictor_rate
    spread = torch.linspace(0, given.strongest, given.dimension, dtype=F64)
    predictor, f = torch.stack(list(starts.values())), w @ w.mT
    path: list[Tensor] = []
    imbalance = torch.linalg.matrix_norm(f - predictor.mT @ predictor / rate, 2)
    sizes = [fixed_points(float(noise), eta)[1] ** 2 / rate for noise in spread if eta < 1 / (4 * (1 + noise))]
    weakest = min((size for size in sizes if size > DEAD * sizes[0]), default=math.inf)
    needed = max(200.0, math.log(max(float(imbalance.max()) / (0.05 * weakest), 1.0)) / (2 * eta))
    until = needed if needed <= LONGEST else 200.0
    final, _ = integrate(
        Model(spread, eta, rate),
        w.expand_as(predictor),
        predictor,
        until,
        1.0,
        lambda now, p: path.append(cosines(now @ now.mT, p)),
    )
    seen = torch.stack(path)  # (states, starts, d)
    clock = torch.linspace(0, until, len(seen)).tolist()
    claims, mean, worst = [], [], []
    for index, name in enumerate(starts):
        s = torch.linalg.eigvalsh(final[index] @ final[index].mT)
        turned = float(imbalance[index]) * math.exp(-2 * eta * until) / float(s[s > DEAD * s[-1]][0])
        smallest = seen[:, index].nan_to_num(math.inf).amin(-1).tolist()
        claim = above(f"{name}: smallest |cos(u, W_p u)| of surviving directions", "→ 1", 0.99, smallest[-1])
        # Below sin 0.1 the cos is above 0.995. A direction survives if η < 1/(4(1 + σ_j²)), and the least σ_j² is 0.
        claim = where(turned < 0.1, f"what is left of the start's imbalance turns it by sin {turned:.2g}", claim)
        claims.append(where(eta < 0.25, "every direction dies: η is 1/4 or more", claim))
        mean.append(Line(name, clock, seen[:, index].nanmean(-1).tolist()))
        worst.append(Line(f"{name}, smallest", clock, smallest, dashed=True))
    return claims, Panel("Alignment, anisotropic augmentation", "time", "|cos(u, W_p u)|", [*mean, *worst])


def your_run(path: Path) -> tuple[Claim, Panel]:
    """The alignment that a training run has logged. Raises `ParameterError` as `read_run` does."""
    epochs, values = read_run(path)
    last = sum(values[-1]) / len(values[-1])
    claim = above("your run: mean |cos(u, W_p u)| at its last epoch", "→ 1", 0.9, last)
    claim = where(epochs[-1] >= LONG, f"the run has {epochs[-1]:g} epochs, fewer than {LONG}", claim)
    lines = [Line("mean over directions", epochs, [sum(row) / len(row) for row in values])]
    if any(len(row) > 1 for row in values):
        lines.append(Line("smallest", epochs, [min(row) for row in values], dashed=True))
        lines.append(Line("leading direction", epochs, [row[0] for row in values], dashed=True))
    return claim, Panel("Your run", "epoch", "|cos(u, W_p u)|", lines)


def read_run(path: Path) -> tuple[list[float], list[list[float]]]:
    """Epochs and |cos| values of a run's log. Raises `ParameterError` if the file or its fields are missing."""
    try:
        entries = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ParameterError(f"run: {path} cannot be read as JSON lines: {error}") from error
    usable = [e for e in entries if isinstance(e, dict) and e.get("predictor_alignment") and "epoch" in e]
    if not usable:
        raise ParameterError(
            f"run: no line of {path} has 'epoch' and 'predictor_alignment'; the run must have a linear predictor "
            "and log its alignment with the correlation matrix"
        )
    try:
        return [float(e["epoch"]) for e in usable], [[float(v) for v in e["predictor_alignment"]] for e in usable]
    except (TypeError, ValueError) as error:
        reason = "'epoch' must be a number, and 'predictor_alignment' a list of numbers"
        raise ParameterError(f"run: {path}: {reason} ({error})") from error


def fastest(given: Parameters, f: Tensor, p: Tensor) -> float:
    """The rate at which the fastest mode relaxes: W_p at α_p(1 + σ²)λ_max(F), and F at 4(1 + σ²)λ_max(W_p²)."""
    largest = [float(torch.linalg.matrix_norm(value, 2)) for value in (f, p)]
    return (1 + given.augmentation) * max(given.predictor_rate * largest[0], 4 * largest[1] ** 2)


def late_rate(given: Parameters, generator: torch.Generator) -> tuple[float, float]:
    """Decay rate of a small commutator near F = p₊²/α_p I, W_p = p₊ I: by the formula and as integrated."""
    d, high = given.dimension, fixed_points(given.augmentation, given.weight_decay)[1]
    f, p = (1e-3 * normal(generator, d, d) / d**0.5 for _ in range(2))
    eye = torch.eye(d, dtype=F64)
    state = [high**2 / given.predictor_rate * (eye + f + f.T), high * (eye + p + p.T)]
    first = float(commutator(*state).norm())
    for _ in range(200):
        state = runge_kutta(lambda now: symmetric_flow(given, now[0], now[1]), state, 0.02)
    return high, math.log(first / float(commutator(*state).norm())) / 4


def run(given: Parameters) -> Result:
    logged = [your_run(Path(given.run))] if given.run else []
    d, generator = given.dimension, given.generator()
    w = normal(generator, d, d) / d**0.5 + 0.5 * torch.eye(d, dtype=F64)
    symmetric, plain = (drawn[0] for drawn in predictors(generator, d, 1))
    f = w @ w.T
    sections = [theorem(given, f, symmetric), full(given, w, {"symmetric start": symmetric, "any start": plain})]
    claims = before(given, f) + sections[0][0]
    if given.weight_decay < 0.9 / (4 * (1 + given.augmentation)):
        expected, seen = late_rate(given, generator)
        formula = "2K = 3(1+σ²)p₊² − 2p₊ + 3η = p₊ there"
        claims.append(about("decay rate of a small commutator near the fixed point", formula, expected, seen, 0.02))
    claims += [*sections[1][0], *[claim for claim, _ in logged]]
    return Result(claims, [panel for _, panel in [*sections, *logged]])
