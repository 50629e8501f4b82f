r"""Why DirectCLR's untrained part learns: the residual connection.

A projector takes the blow of dimensional collapse: the loss flattens *its* output, and the representation r before it
stays richer. DirectCLR drops the projector and applies the contrastive loss to the first d₀ coordinates r[0:d₀] only.
Then the loss never sees r[d₀:]. Why is that part of any use?

Take the last residual block of a small network,

    h = Wx,    r = h + B relu(A h),

and let g be the loss' gradient at r. It is zero outside the first d₀ coordinates, so over a batch it has **rank d₀ at
most**, and the rows B[d₀:] never receive any gradient. But one block earlier the gradient is

    ∂L/∂h = g + Aᵀ diag(1[Ah > 0]) Bᵀ g ,

and the mask differs from sample to sample: over a batch this has **rank d**. So all of h learns, and the skip
connection carries h[d₀:] into r[d₀:] unchanged. Both ingredients are needed:

- *no nonlinearity in the block*: ∂L/∂h = (I + BA)ᵀg has rank d₀ again. What r[d₀:] learns has rank d₀;
- *no block*: r = h, and r[d₀:] learns nothing;
- *no skip*: r[d₀:] = B[d₀:] relu(Ah) hangs on rows of B that no gradient reaches. Residual branches usually start at
  zero, and then r[d₀:] is zero for ever; from a random start it is a frozen random mixture.

The lab starts B[d₀:] at zero, so that everything in r[d₀:] comes through the skip, and freezes the block, so that the
ranks are exact; then it trains everything and looks at the effective rank of the whole r. A step of length η along
its gradient g lowers the loss of its own batch by η|g|²/2 at least if η is at most 1 over the curvature gᵀHg/|g|².
Where it does not, it is halved: the rate asked for is the largest, and none leads beyond the edge of stability. What
it does *not* show is an advantage of DirectCLR over no projector at all: in toys of this size with weak augmentation
a loss on all of r leaves more rank than a loss on r[0:d₀]. The published advantage (62.7 % against 51.5 % on
ImageNet) needs real images.

## What it means for someone serving embeddings

Serve the representation, not the projector's output, and do not assume that all coordinates of a vector were trained:
whether they were depends on the architecture. A slice of the vector with no variance, or with a rank far below its
length, is visible in the spectrum of live embeddings before anyone notices it in search results.

## Source

Jing, Vincent, LeCun, Tian, ICLR 2022, arXiv:2110.09348, section 6 (DirectCLR). The rank argument with the mask is made
explicit here.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
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
    above,
    below,
    exactly,
    finite,
    parameter,
    where,
)
from theory.toys import batches, covariance, infonce, normal, rank_of

EXAMPLE = "--kept 4 --dimension 24"
ROUNDING = 1e-10  # of a mean loss, whose logits are of order 100 at most where it is not yet flat


class Parameters(Settings):
    dimension: int = parameter(32, "width d of the representation", low=4, high=128)
    kept: int = parameter(8, "coordinates d₀ that the loss sees, below d", low=2)
    noise: float = parameter(0.3, "standard deviation of the augmentation noise", low=0, high=2)
    batch: int = parameter(64, "batch size, above d", low=16, high=1024)
    rate: float = parameter(0.1, "learning rate", low=0, open_low=True)
    steps: int = parameter(1000, "steps of gradient descent", low=50, high=50_000)

    def check(self) -> None:
        if self.kept >= self.dimension:
            raise ParameterError(f"kept must be below dimension ({self.dimension}), not {self.kept}")
        if self.batch <= self.dimension:
            raise ParameterError(f"batch must be above dimension ({self.dimension}), not {self.batch}")


@dataclass(frozen=True)
class Network:
    """r = skip·h + B act(A h), h = Wx; without a block r = h."""

    w: Tensor
    a: Tensor
    b: Tensor
    skip: bool = True
    relu: bool = True
    block: bool = True

    def tail(self, h: Tensor) -> Tensor:
        """r (n, d) from h (n, d)."""
        if not self.block:
            return h
        inner = h @ self.a.T
        branch = (inner.relu() if self.relu else inner) @ self.b.T
        return h + branch if self.skip else branch

    def __call__(self, x: Tensor) -> Tensor:
        return self.tail(x @ self.w.T)

    def having(self, w: Tensor, a: Tensor, b: Tensor) -> Network:
        return Network(w, a, b, self.skip, self.relu, self.block)


def start(given: Parameters, *, skip: bool = True, relu: bool = True, block: bool = True) -> Network:
    """Gaussian weights of scale 1/√d; the rows B[d₀:] are zero."""
    d, generator = given.dimension, given.generator()
    w, a, b = (normal(generator, d, d) / d**0.5 for _ in range(3))
    b[given.kept :] = 0
    return Network(w, a, b, skip, relu, block)


def loss(given: Parameters, r: Tensor, pair: Tensor) -> Tensor:
    """InfoNCE on the first d₀ coordinates."""
    return infonce(r[:, : given.kept], pair[:, : given.kept]) / len(r)


def backward(given: Parameters, network: Network) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients over one batch at r (n, d), at h (n, d) and at B (d, d)."""
    generator = given.generator()
    x = normal(generator, given.batch, given.dimension)
    pair = x + given.noise * normal(generator, given.batch, given.dimension)
    weights = [value.detach().requires_grad_() for value in (network.w, network.a, network.b)]
    live = network.having(*weights)
    h = x @ live.w.T
    r = live.tail(h)
    value = loss(given, r, live(pair).detach())
    found = torch.autograd.grad(value, [r, h, live.b], materialize_grads=True)
    return found[0], found[1], found[2]


def train(given: Parameters, network: Network, *, block: bool) -> Network:
    """Gradient descent on W, and on A and B too if `block`, in steps that the curvature allows."""
    generator = given.generator().manual_seed(given.seed + 1)
    stream = batches(normal(generator, 10_000, given.dimension), given.batch, generator)
    length = given.rate
    for step, x in enumerate(itertools.islice(stream, given.steps)):
        pair = x + given.noise * normal(generator, *x.shape)
        old = (network.w, network.a, network.b)
        live = network.having(*(value.detach().requires_grad_(block or i == 0) for i, value in enumerate(old)))
        leaves = [value for value in (live.w, live.a, live.b) if value.requires_grad]
        value = loss(given, live(x), live(pair))
        slopes = torch.autograd.grad(value, leaves, materialize_grads=True)
        network, length = stepped(given, network, slopes, (x, pair, value.item()), min(given.rate, 2 * length))
        if step % 100 == 0:
            finite(network.w, "W", step * given.rate)
    return network


def stepped(
    given: Parameters, network: Network, slopes: Sequence[Tensor], batch: tuple[Tensor, Tensor, float], length: float
) -> tuple[Network, float]:
    """One step along the slopes of (W, A, B), and its length: halved until it is at most 1 over the curvature (Armijo).

    batch: both views and the loss before the step.
    """
    x, pair, value = batch
    old = (network.w, network.a, network.b)
    steepness = sum(float(slope.square().sum()) for slope in slopes)
    while length > 0:
        moved = [each - length * slope for each, slope in zip(old, slopes, strict=False)]
        there = network.having(*moved, *old[len(moved) :])
        if float(loss(given, there(x), there(pair))) <= value - length * steepness / 2 + ROUNDING:
            return there, length
        length /= 2
    return network, given.rate


def numerical_rank(matrix: Tensor) -> int:
    """Singular values above 1e-6 of the largest; 0 for a zero matrix."""
    values = torch.linalg.svdvals(matrix)
    return int((values > 1e-6 * values[0]).sum()) if values[0] > 0 else 0


def seen_in(learned: Tensor, rows: Tensor, claim: Claim) -> Claim:
    """`claim` on the rank of what was learned, a difference of rows: a millionth of it must be above their rounding."""
    share = float(torch.linalg.matrix_norm(learned, 2) / torch.linalg.matrix_norm(rows, 2))
    return where(share > 1e-8, f"r changes by {share:.2g} of its size only, and its rounding shows", claim)


def run(given: Parameters) -> Result:
    d, kept = given.dimension, given.kept
    rest = d - kept
    at_r, at_h, at_b = backward(given, start(given))
    _, linear_h, _ = backward(given, start(given, relu=False))

    def felt(gradient: Tensor, most: int, claim: Claim) -> Claim:
        """`claim` on a rank of at most `most`: so many rows of the batch, and a quarter more, must have a gradient.

        A sample that InfoNCE already tells from all others has none, and rows of less than 1e-6 of the largest singular
        value are not counted (Weyl). A square matrix may be singular by chance; of n by r normal entries the extreme
        singular values have the ratio (√n − √r)/(√n + √r), .056 at n = 1.25 r, and rows of a thousandth of the norm
        leave 5.6e-5 of it.
        """
        norms = gradient.norm(dim=1)
        rows = int((norms > 1e-3 * torch.linalg.matrix_norm(gradient, 2)).sum())
        return where(rows >= 1.25 * most, f"only {rows} rows of the batch have a gradient, for a rank of {most}", claim)

    claims = [
        exactly("gradient at the rows B[d₀:]", "0", 0, float(at_b[kept:].abs().max())),
        felt(at_r, kept, exactly("rank of the gradient at r", "d₀", kept, numerical_rank(at_r))),
        felt(at_h, d, exactly("rank of the gradient at h, through a ReLU block", "d", d, numerical_rank(at_h))),
        felt(
            linear_h,
            kept,
            exactly("rank of the gradient at h, through a linear block", "d₀", kept, numerical_rank(linear_h)),
        ),
    ]

    # the block is frozen: the stem W is all that learns
    variants = {
        "skip, ReLU": (start(given), rest, "d − d₀"),
        "skip, linear block": (start(given, relu=False), min(kept, rest), "min(d₀, d − d₀)"),
        "no block": (start(given, block=False), 0, "0"),
        "no skip": (start(given, skip=False), 0, "0"),
    }
    test = normal(given.generator(), 2000, d)
    index, lines = list(range(1, rest + 1)), []
    for name, (before, expected, law) in variants.items():
        after = train(given, before, block=False)
        learned = (after(test) - before(test))[:, kept:]
        claim = exactly(f"{name}: rank of what r[d₀:] learned", law, expected, numerical_rank(learned))
        claims.append(seen_in(learned, before(test), claim) if expected else claim)
        values = torch.linalg.svdvals(learned) / len(test) ** 0.5
        lines.append(Line(name, index, values.clamp(min=1e-17).tolist()))

    # everything is trained
    whole, bare = (train(given, start(given, skip=skip), block=True) for skip in (True, False))
    learned = (whole(test) - start(given)(test))[:, kept:]
    with_skip, without = covariance(whole(test)), covariance(bare(test))
    ranks = rank_of(with_skip[kept:, kept:]), rank_of(without[kept:, kept:])
    seen = rank_of(with_skip[:kept, :kept])
    claims += [
        seen_in(
            learned,
            start(given)(test),
            exactly("all trained, skip: rank of what r[d₀:] learned", "d − d₀", rest, numerical_rank(learned)),
        ),
        exactly("all trained, no skip: effective rank of r[d₀:]", "0", 0, ranks[1]),
        # The spectrum's entropy is at least the mean of its parts' entropies, weighted by their variances: dropping the
        # covariance between the parts adds at most the entropy of the weights (Araki and Lieb 1970).
        where(
            ranks[0] >= seen,
            f"r[d₀:] has an effective rank of {ranks[0]:.3g}, less than r[:d₀]: what r has depends on their variances",
            above(
                "all trained, skip: effective rank of r over that of r[:d₀]",
                "more than the loss sees",
                1.0,
                rank_of(with_skip) / seen,
            ),
        ),
        below(
            "all trained, no skip: effective rank of r over d₀",
            "at most what the loss sees",
            1 + 1e-9,
            rank_of(without) / kept,
        ),
    ]
    spectra = [
        Line(name, list(range(1, d + 1)), torch.linalg.eigvalsh(c).flip(0).clamp(min=1e-17).tolist())
        for name, c in (("skip", with_skip), ("no skip", without))
    ]
    gradients = [
        Line(
            name,
            list(range(1, d + 1)),
            (torch.linalg.svdvals(g) / torch.linalg.svdvals(g)[0]).clamp(min=1e-17).tolist(),
        )
        for name, g in (("at r", at_r), ("at h, ReLU block", at_h), ("at h, linear block", linear_h))
    ]
    return Result(
        claims,
        [
            Panel("Gradient over a batch", "rank", "singular value / largest", gradients, log_y=True),
            Panel("What r[d₀:] learned, block frozen", "rank", "singular value", lines, log_y=True),
            Panel("Spectrum of r, all trained", "rank", "eigenvalue", spectra, log_y=True),
        ],
    )
