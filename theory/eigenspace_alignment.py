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
all. It holds beyond the theorem's assumptions: with an augmentation that differs along directions, so that the s_j are
different and the eigenvectors mean something, and with a predictor nobody symmetrised. A direction that has died
carries no gradient, so only surviving ones are counted.

With `--run PATH` the lab also reads the log of a training run (JSON lines) and shows the measured alignment of a real
network's linear predictor over its epochs; the log must hold `predictor_alignment` (list of |cos|) beside `epoch`. The
paper's figure is of 100 epochs of STL-10, so that 0.9 is asked of a run of at least 50. A short run on Fashion-MNIST
(`fullrank train fashion-byol --option linear_predictor=true --option symmetric=true --epochs 6 --limit 8000`) went from
0.69 after one epoch to 0.82 after six, its leading direction from 0.98 to 0.99. Only two directions of F were alive
there, since F is not centred.

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

from theory.lab import Line, Panel, ParameterError, Result, Settings, about, above, below, finite, parameter, where
from theory.noncontrastive_dynamics import Model, fixed_points, integrate
from theory.toys import F64, normal, runge_kutta, stride

EXAMPLE = "--weight-decay 0.02 --predictor-rate 3"
DEAD = 1e-3  # of the largest eigenvalue of F
LONGEST = 600.0  # time of the full flow, at most
MANY = 12  # directions whose mean |cos| stays away from 1 by chance
UNTIL = 80  # time of the symmetric flow
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
    """|cos(u_j, W_p u_j)| for the eigenvectors of F, largest eigenvalue first; dead directions read NaN."""
    s, u = torch.linalg.eigh(f)
    moved = p @ u
    found = (u * moved).sum(0).abs() / moved.norm(dim=0)
    return torch.where(s > DEAD * s[-1], found, torch.nan).flip(0)


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
    return [float(e["epoch"]) for e in usable], [[float(v) for v in e["predictor_alignment"]] for e in usable]


def fastest(given: Parameters, f: Tensor, p: Tensor) -> float:
    """The rate at which the fastest mode relaxes: W_p at α_p(1 + σ²)λ_max(F), and F at 4(1 + σ²)λ_max(W_p²)."""
    largest = [float(torch.linalg.matrix_norm(value, 2)) for value in (f, p)]
    return (1 + given.augmentation) * max(given.predictor_rate * largest[0], 4 * largest[1] ** 2)


def late_rate(given: Parameters, generator: torch.Generator) -> tuple[float, float]:
    """Decay rate of a small commutator near F = p₊²/α_p I, W_p = p₊ I: by the formula and as integrated."""
    d, high = given.dimension, fixed_points(given.augmentation, given.weight_decay)[1]
    f, p = (1e-3 * normal(generator, d, d) for _ in range(2))
    eye = torch.eye(d, dtype=F64)
    state = [high**2 / given.predictor_rate * (eye + f + f.T), high * (eye + p + p.T)]
    first = float(commutator(*state).norm())
    for _ in range(200):
        state = runge_kutta(lambda now: symmetric_flow(given, now[0], now[1]), state, 0.02)
    return high, math.log(first / float(commutator(*state).norm())) / 4


def run(given: Parameters) -> Result:
    logged = read_run(Path(given.run)) if given.run else None
    d, generator = given.dimension, given.generator()
    w = normal(generator, d, d) / d**0.5 + 0.5 * torch.eye(d, dtype=F64)
    a = normal(generator, d, d) / d**0.5
    f, p = w @ w.T, 0.3 * (a + a.T) + 0.7 * torch.eye(d, dtype=F64)

    f_dot, p_dot = symmetric_flow(given, f, p)
    bracket, k = commutator(f, p), restoring(given, f, p)
    found = commutator(f_dot, p) + commutator(f, p_dot)
    identity = float((found + k @ bracket + bracket @ k).norm() / found.norm())

    times, sizes, bounds, margin = [0.0], [float(bracket.norm())], [float(bracket.norm())], 0.0
    state, exponent, lowest = [f, p], 0.0, float(torch.linalg.eigvalsh(k)[0])
    for part in range(UNTIL):
        left = 1.0
        while left > 0:
            begun = part + 1 - left
            taken, step, left = stride(left, min(given.step, 0.5 / fastest(given, *state)), 8)
            for index in range(1, taken + 1):
                state = runge_kutta(lambda now: symmetric_flow(given, now[0], now[1]), state, step)
                time = begun + index * step
                field = restoring(given, *[finite(s, "F or W_p", time) for s in state])
                now = float(torch.linalg.eigvalsh(field)[0])
                exponent, lowest = exponent + step * (lowest + now) / 2, now
            size = float(commutator(state[0], state[1]).norm())
            times.append(part + 1 - left)
            sizes.append(size)
            bounds.append(bounds[0] * math.exp(-2 * exponent))
            if size > 1e-13 * sizes[0]:
                margin = max(margin, size / bounds[-1])

    # the full flow, beyond the theorem: anisotropic augmentation, any predictor
    spread = torch.linspace(0, given.strongest, d, dtype=F64)
    model = Model(spread, given.weight_decay, given.predictor_rate)
    ends: dict[str, float] = {}
    turned: dict[str, float] = {}
    paths: dict[str, list[Tensor]] = {"symmetric start": [], "any start": []}
    for name, predictor in (("symmetric start", p), ("any start", 0.5 * a + 0.7 * torch.eye(d, dtype=F64))):

        def watch(w: Tensor, p: Tensor, path: list[Tensor] = paths[name]) -> None:
            path.append(cosines(w @ w.T, p))

        # What is left of C = WWᵀ − W_pᵀW_p/α_p after the time t, exp(−2ηt)C, turns an eigenvector of F by sin = |C|/s.
        imbalance = float(torch.linalg.matrix_norm(f - predictor.mT @ predictor / given.predictor_rate, 2))
        ends[name] = min(max(200.0, math.log(max(imbalance, 1.0) / 0.02) / (2 * given.weight_decay)), LONGEST)
        final, _ = integrate(model, w, predictor, ends[name], 0.2, watch)
        alive = torch.linalg.eigvalsh(final @ final.mT)
        alive = alive[alive > DEAD * alive[-1]]
        turned[name] = imbalance * math.exp(-2 * given.weight_decay * ends[name]) / float(alive[0])

    claims = [
        below("d/dt of the commutator is −K[F,W_p] − [F,W_p]K", "relative error", 1e-10, identity),
        below("commutator over its bound, the worst along the path", "exp(−2∫λ_min(K)dt)", 1 + 1e-3, margin),
        below("commutator at the end over its start", "→ 0", 1e-4, sizes[-1] / sizes[0]),
    ]
    if given.weight_decay < 0.9 / (4 * (1 + given.augmentation)):
        expected, seen = late_rate(given, generator)
        formula = "2K = 3(1+σ²)p₊² − 2p₊ + 3η = p₊ there"
        claims.append(about("decay rate of a small commutator near the fixed point", formula, expected, seen, 0.02))
    for name, path in paths.items():
        start, end = float(path[0].nanmean()), float(path[-1][~path[-1].isnan()].min())
        # A direction survives if η < 1/(4(1 + σ_j²)), and the least σ_j² is 0.
        claim = above(f"{name}: smallest |cos(u, W_p u)| of surviving directions", "→ 1", 0.99, end)
        balanced = f"what is left of the start's imbalance turns a direction by sin {turned[name]:.2g}"
        claim = where(turned[name] < 0.1, balanced, claim)  # cos is then above 0.995
        claims.append(where(given.weight_decay < 0.25, "every direction dies: η is 1/4 or more", claim))
        claim = below(f"{name}: mean |cos| before training", "not aligned yet", 0.95, start)
        claims.append(where(d >= MANY, f"of fewer than {MANY} directions a random start may be aligned", claim))
    clocks = {name: torch.linspace(0, ends[name], len(path)).tolist() for name, path in paths.items()}
    mean = [Line(name, clocks[name], [float(each.nanmean()) for each in path]) for name, path in paths.items()]
    worst = [
        Line(f"{name}, smallest", clocks[name], [float(each[~each.isnan()].min()) for each in path], dashed=True)
        for name, path in paths.items()
    ]
    panels = [
        Panel(
            "Commutator of F and W_p",
            "time",
            "‖[F, W_p]‖",
            [Line("integrated", times, sizes), Line("bound of theorem 3", times, bounds, dashed=True)],
            log_y=True,
        ),
        Panel("Alignment, anisotropic augmentation", "time", "|cos(u, W_p u)|", [*mean, *worst]),
    ]
    if logged is not None:
        epochs, values = logged
        last = sum(values[-1]) / len(values[-1])
        claim = above("your run: mean |cos(u, W_p u)| at its last epoch", "→ 1", 0.9, last)
        claims.append(where(epochs[-1] >= LONG, f"the run has {epochs[-1]:g} epochs, fewer than {LONG}", claim))
        mean_of = Line("mean over directions", epochs, [sum(row) / len(row) for row in values])
        lines = [Line("smallest", epochs, [min(row) for row in values], dashed=True)]
        lines.append(Line("leading direction", epochs, [row[0] for row in values], dashed=True))
        panels.append(Panel("Your run", "epoch", "|cos(u, W_p u)|", [mean_of, *lines]))
    return Result(claims, panels)
