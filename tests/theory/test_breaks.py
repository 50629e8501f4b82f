"""A claim must be able to fail: break the dynamics, leave the prediction alone, and see it fail."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from theory import (
    barlow_twins,
    directpred,
    eigenspace_alignment,
    frustration,
    implicit_regularization,
    linear_byol,
    measurement,
    noncontrastive_dynamics,
    projector,
    strong_augmentation,
)
from theory.lab import Claim, Diverged, Line, Panel, Result, about, above, below, exactly, finite
from theory.toys import F64, infonce, normal

Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def failing(result: Result | list[Claim]) -> str:
    claims = result.claims if isinstance(result, Result) else result
    return "\n".join(claim.statement for claim in claims if claim.verdict == "fails")


def test_measurement_sees_a_covariance_that_is_not_centred(monkeypatch: Patch) -> None:
    monkeypatch.setattr(measurement, "covariance", lambda z: z.mT @ z / z.shape[-2])
    assert "shifted rows, centred effective rank" in failing(measurement.run(measurement.Parameters()))


def test_strong_augmentation_sees_training_without_augmentation(monkeypatch: Patch) -> None:
    real = strong_augmentation.gradient
    monkeypatch.setattr(strong_augmentation, "gradient", lambda w, x, augmented: real(w, x, x))
    failed = failing(strong_augmentation.run(strong_augmentation.Parameters(steps=200)))
    assert "the loss' gradient" in failed
    assert "growth rate of an ignored noisy direction" in failed
    assert "covariance loses as many ranks" in failed


def test_implicit_regularization_sees_a_missing_layer_in_the_gradient(monkeypatch: Patch) -> None:
    real = implicit_regularization.layer_gradients
    monkeypatch.setattr(
        implicit_regularization, "layer_gradients", lambda weights, field: [0.5 * v for v in real(weights, field)]
    )
    given = implicit_regularization.Parameters(depth=2, dimension=6)
    assert implicit_regularization.closed_form(given)[0] > 1e-3


def test_implicit_regularization_sees_depth_without_collapse(monkeypatch: Patch) -> None:
    monkeypatch.setattr(implicit_regularization, "descend", lambda loss, weights, *rest: weights)
    given = implicit_regularization.Parameters(depth=2, dimension=8, batch=16)
    assert "alignment after training" in failing(implicit_regularization.run(given))


def test_projector_sees_a_loss_on_every_coordinate(monkeypatch: Patch) -> None:
    monkeypatch.setattr(projector, "loss", lambda given, r, pair: infonce(r, pair) / len(r))
    failed = failing(projector.run(projector.Parameters(dimension=8, kept=2, batch=16, steps=50)))
    assert "gradient at the rows B" in failed
    assert "rank of the gradient at r" in failed
    assert "no block: rank" in failed


def test_noncontrastive_sees_wrong_weight_decay(monkeypatch: Patch) -> None:
    real = linear_byol.velocity

    def broken(model: Any, w: Tensor, p: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        w_dot, p_dot, a_dot = real(model, w, p, a)
        return w_dot + 0.9 * model.decay * w, p_dot, a_dot

    monkeypatch.setattr(linear_byol, "velocity", broken)
    strong = noncontrastive_dynamics.Parameters(dimension=3, weight_decay=0.5)
    assert "η is above the threshold" in failing(noncontrastive_dynamics.parts(strong)[0])
    given = noncontrastive_dynamics.Parameters()
    assert "smallest weight decay" in failing(noncontrastive_dynamics.threshold_of_decay(given)[0])
    assert noncontrastive_dynamics.gradient_errors(given)[0] < 1e-10  # the loss itself is intact


def test_noncontrastive_sees_a_stop_gradient_that_is_still_there(monkeypatch: Patch) -> None:
    real = linear_byol.velocity

    def always(model: Any, w: Tensor, p: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kept = linear_byol.Model(model.noise, model.decay, model.rate, model.target)
        return real(kept, w, p, a)

    monkeypatch.setattr(noncontrastive_dynamics, "velocity", always)
    assert noncontrastive_dynamics.gradient_errors(noncontrastive_dynamics.Parameters())[1] > 1e-3


@pytest.mark.parametrize(("encoder", "predictor"), [pytest.param(0.5, 1.0, marks=pytest.mark.soak), (1.0, 0.5)])
def test_eigenspace_sees_a_flow_at_half_speed(encoder: float, predictor: float, monkeypatch: Patch) -> None:
    real = eigenspace_alignment.symmetric_flow

    def broken(given: Any, f: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        f_dot, p_dot = real(given, f, p)
        return encoder * f_dot, predictor * p_dot

    monkeypatch.setattr(eigenspace_alignment, "symmetric_flow", broken)
    failed = failing(eigenspace_alignment.run(eigenspace_alignment.Parameters(dimension=6)))
    assert "d/dt of the commutator" in failed
    # at the fixed point F has no restoring force of its own, p₊ − (1+σ²)p₊² = η: the rate is the predictor's alone
    assert ("decay rate of a small commutator" in failed) is (predictor != 1)


def test_directpred_sees_a_predictor_that_is_too_large(monkeypatch: Patch) -> None:
    monkeypatch.setattr(directpred, "direct_pred", lambda eps: lambda s: 1.1 * s.sqrt())
    failed = failing(directpred.run(directpred.Parameters(dimension=4, step=0.3)))
    assert "DirectPred, ε = 0: eigenvalue" in failed
    assert "DirectCopy, ε = 0.1" not in failed


def test_directpred_sees_an_encoder_that_outgrows_the_gradients(monkeypatch: Patch) -> None:
    real = directpred.follow
    monkeypatch.setattr(directpred, "follow", lambda *given: (1 + 1e-6) * real(*given))
    failed = failing(directpred.run(directpred.Parameters(dimension=4)))
    assert "W under a held W_p" in failed


def test_eigenspace_sees_predictors_that_know_the_eigenvectors(monkeypatch: Patch) -> None:
    def informed(generator: torch.Generator, dimension: int, count: int) -> tuple[Tensor, Tensor]:
        eye = torch.eye(dimension, dtype=F64).expand(count, -1, -1)
        return eye, eye + 0.01 * normal(generator, count, dimension, dimension)

    monkeypatch.setattr(eigenspace_alignment, "predictors", informed)
    given = eigenspace_alignment.Parameters(dimension=6)
    failed = failing(eigenspace_alignment.before(given, torch.diag(torch.arange(1, 7, dtype=F64))))
    assert failed.count("predictors before training") == 2


def test_frustration_sees_a_missing_stop_gradient(monkeypatch: Patch) -> None:
    real = frustration.slopes

    def leaky(variant: Any, *state: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return real("head" if variant == "head + stop-gradient" else variant, *state)

    monkeypatch.setattr(frustration, "slopes", leaky)
    given = frustration.Parameters(samples=20, classes=2, dimension=4, frustrated=0.2, step=0.2)
    failed = failing(frustration.run(given))
    assert "the loss' gradients are the flow" in failed
    assert "head + stop-gradient: separation at t = 200" in failed


def test_barlow_twins_sees_a_loss_without_redundancy_reduction(monkeypatch: Patch) -> None:
    real = barlow_twins.barlow
    monkeypatch.setattr(barlow_twins, "barlow", lambda first, second, penalty: real(first, second, 0 * penalty))
    given = barlow_twins.Parameters(dimension=8, noisy=4, depth=2, batch=64, steps=300)
    failed = failing(barlow_twins.run(given))
    assert "expected batch loss over that of the best encoder" in failed
    assert "batch loss of the trained encoders" in failed


@pytest.mark.parametrize(
    ("claim", "holds"),
    [
        (about("", "", 2.0, 2.1, 0.1), True),
        (about("", "", 2.0, 2.3, 0.1), False),
        (about("", "", -2.0, -2.1, 0.1), True),
        (exactly("", "", 3, 3), True),
        (exactly("", "", 3, 4), False),
        (below("", "", 1, 0.5), True),
        (below("", "", 1, 1), False),
        (above("", "", 1, 2), True),
        (above("", "", 1, 1), False),
    ],
)
def test_claims_hold_or_fail(claim: Claim, holds: bool) -> None:
    assert claim.holds is holds
    assert Result([claim], [Panel("", "", "", [Line("", [0], [0])])]).holds is holds


@pytest.mark.parametrize("make", [lambda v: about("", "", 1, v, 0.1), lambda v: below("", "", 1, v)])
def test_nan_never_holds(make: Callable[[float], Claim]) -> None:
    assert not make(float("nan")).holds


def test_divergence_is_named() -> None:
    with pytest.raises(Diverged, match=r"W is no longer finite at t = 3: .*smaller rate"):
        finite(torch.tensor([1.0, float("inf")]), "W", 3.0)
