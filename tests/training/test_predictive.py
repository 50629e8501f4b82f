"""Each switch of BYOL, SimSiam, DirectPred and DirectCopy changes what it says; W_p is its paper's formula."""

import json
import math

import pytest
import torch
from torch import Tensor, nn

from tests.support.training import small, train, views
from training.methods.directcopy import copied
from training.methods.directpred import least_squares, spectral
from training.methods.predictive import Target, regression
from training.methods.predictor import LinearPredictor
from training.methods.simsiam import negative_cosine

PREDICTIVE = ["byol", "simsiam", "directpred", "directcopy"]


def covariance(d: int = 6, seed: int = 0) -> Tensor:
    rows = torch.randn(40, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows *= torch.linspace(0.1, 2, d)
    return rows.T @ rows / len(rows)


@pytest.mark.parametrize("name", PREDICTIVE)
def test_the_loss_is_the_formula_and_the_target_side_gets_no_gradient(name: str) -> None:
    model, batch = small(name).eval(), views()
    model(batch).backward()
    got = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    f = model.projector(model.encoder(batch))
    t = model.target(batch, f).detach()
    (f1, f2), (t1, t2) = model.predictor(f).chunk(2), t.chunk(2)
    loss = negative_cosine if name == "simsiam" else regression
    expected = (loss(f1, t2) + loss(f2, t1)) / 2
    assert model(batch).item() == pytest.approx(expected.item(), rel=1e-6)
    expected.backward()
    assert not any(key.startswith("target") for key in got)
    for key, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(got[key], p.grad, msg=key)


@pytest.mark.parametrize("name", PREDICTIVE)
def test_without_stop_gradient_both_sides_learn_and_there_is_no_target(name: str) -> None:
    model, batch = small(name, stop_gradient=False).eval(), views()
    assert isinstance(model.target, Target)
    held = small(name, momentum=None).eval()
    held.load_state_dict(model.state_dict())
    assert model(batch).item() == pytest.approx(held(batch).item(), rel=1e-6)
    for each in (model, held):
        each(batch).backward()
    one_side, two_sides = held.encoder.conv1.weight.grad, model.encoder.conv1.weight.grad
    assert (one_side - two_sides).norm() > 0.1 * one_side.norm()


@pytest.mark.parametrize("name", PREDICTIVE)
def test_the_average_follows_with_its_momentum_batch_norm_too(name: str) -> None:
    model = small(name, momentum=0.9, constant_momentum=True)
    with torch.no_grad():
        for p in [*model.encoder.parameters(), *model.projector.parameters()]:
            p.add_(1.0)
    model(views())
    before = {key: value.clone() for key, value in model.target.state_dict().items()}
    online = nn.Sequential(model.encoder, model.projector).state_dict()
    assert (before["0.bn1.running_mean"] != online["0.bn1.running_mean"]).any()
    model.step(0.7)
    for key, value in model.target.state_dict().items():
        expected = 0.9 * before[key] + 0.1 * online[key] if value.is_floating_point() else online[key]
        torch.testing.assert_close(value, expected, msg=key)
    assert isinstance(small(name, momentum=None).target, Target)


def test_byols_momentum_rises_to_one() -> None:
    model = small("byol", momentum=0.9)
    moved = []
    for progress in (0.0, 0.5, 1.0):
        slow, fast = model.target[0].conv1.weight, model.encoder.conv1.weight
        with torch.no_grad():
            fast.copy_(slow + 1)
        before = slow.clone()
        model.step(progress)
        moved.append(float((slow - before).mean()))
    assert moved == pytest.approx([0.1, 0.05, 0], abs=1e-6)


@pytest.mark.parametrize("name", ["byol", "simsiam"])
def test_predictor_switches(name: str) -> None:
    assert isinstance(small(name, predictor=False).predictor, nn.Identity)
    assert isinstance(small(name, linear_predictor=True).predictor, LinearPredictor)
    free = train(small(name, linear_predictor=True)).predictor.weight
    held = train(small(name, linear_predictor=True, symmetric=True)).predictor.weight
    assert torch.equal(held, held.T)
    assert (free - free.T).norm() > 0.1 * free.norm()


def test_a_symmetric_predictor_trains_by_the_symmetric_part_of_its_gradient() -> None:
    model = small("byol", linear_predictor=True, symmetric=True)
    start = model.predictor.weight.detach().clone()
    model(views()).backward()
    gradient = model.predictor.weight.grad
    with torch.no_grad():
        model.predictor.weight.sub_(0.1 * gradient)
    model.step(0)
    torch.testing.assert_close(model.predictor.weight.detach(), start - 0.1 * (gradient + gradient.T) / 2)


@pytest.mark.parametrize("name", ["byol", "simsiam"])
def test_predictor_settings_reach_its_group_alone(name: str) -> None:
    model = small(name, predictor_lr=10.0, predictor_weight_decay=0.3, constant_predictor_lr=True)
    rest, predictor = model.parameter_groups()
    assert set(rest) == {"params"}
    assert predictor["params"] == list(model.predictor.parameters())
    assert (predictor["lr_scale"], predictor["weight_decay"], predictor["constant_lr"]) == (10.0, 0.3, True)
    plain = small(name).parameter_groups()[1]
    assert "weight_decay" not in plain
    assert (plain["lr_scale"], plain["constant_lr"]) == (1.0, name == "simsiam")
    assert len(small(name, predictor=False).parameter_groups()) == 1
    slow, fast = (train(small(name, predictor_lr=lr), 1).predictor.state_dict() for lr in (1.0, 10.0))
    start, key = small(name).predictor.state_dict(), "0.weight"
    torch.testing.assert_close(fast[key] - start[key], 10 * (slow[key] - start[key]), rtol=1e-3, atol=1e-6)


def test_byol_without_a_projector_compares_representations() -> None:
    bare = small("byol", predictor=False, stop_gradient=False, projector=False).eval()
    h1, h2 = bare.encoder(views()).chunk(2)
    assert bare(views()).item() == pytest.approx(regression(h1, h2).item(), rel=1e-6)


def test_simsiams_heads_are_the_papers() -> None:
    model = small("simsiam", layers=3)
    linear = [m for m in model.projector if isinstance(m, nn.Linear)]
    assert [m.out_features for m in linear] == [16, 16, 16]
    assert isinstance(model.projector[-1], nn.BatchNorm1d)
    assert not model.projector[-1].affine
    assert [m.out_features for m in model.predictor if isinstance(m, nn.Linear)] == [4, 16]
    assert isinstance(model.predictor[-1], nn.Linear)


# DirectPred and DirectCopy


def test_the_running_correlation_is_neither_centred_nor_normalised() -> None:
    predictor = LinearPredictor(5, rho=0.3).double()
    f, t = (torch.randn(4, 7, 5, dtype=torch.float64) for _ in range(2))
    expected, cross = torch.zeros(5, 5, dtype=torch.float64), torch.zeros(5, 5, dtype=torch.float64)
    for rows, target in zip(f, t, strict=True):
        predictor.observe(rows, target)
        expected = 0.3 * expected + 0.7 * sum(torch.outer(a, a) for a in rows) / 7
        cross = 0.3 * cross + 0.7 * sum(torch.outer(b, a) for a, b in zip(rows, target, strict=True)) / 7
    torch.testing.assert_close(predictor.correlation, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(predictor.cross, cross, rtol=1e-6, atol=1e-6)


def test_rows_are_paired_with_the_target_of_the_other_view() -> None:
    model, batch = small("directpred", rho=0.0), views()
    model(batch)
    predictor = model.predictor
    model.eval()
    with torch.no_grad():
        reference = small("directpred", rho=0.0)
        f1, f2 = reference.projector(reference.encoder(batch)).chunk(2)
        t1, t2 = reference.target(batch).chunk(2)
    cross = (t2.T @ f1 + t1.T @ f2) / 16
    torch.testing.assert_close(predictor.cross, cross)
    torch.testing.assert_close(predictor.correlation, (f1.T @ f1 + f2.T @ f2) / 16)


@pytest.mark.parametrize("released", [False, True])
def test_directpreds_spectrum(released: bool) -> None:
    correlation, epsilon = covariance(), 0.1
    s = torch.linalg.eigvalsh(correlation).tolist()
    expected = [max(math.sqrt(x / max(s)) + epsilon, 1e-4) if released else math.sqrt(x) + epsilon * max(s) for x in s]
    found = spectral(correlation, epsilon, released)
    torch.testing.assert_close(torch.linalg.eigvalsh(found), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(found @ correlation, correlation @ found)


def test_the_released_variant_is_not_the_paper_up_to_scale() -> None:
    big, same = 9 * covariance(), covariance()
    assert torch.allclose(spectral(big, 0.1, released=True), spectral(same, 0.1, released=True))
    paper, rescaled = spectral(big, 0.1), spectral(same, 0.1)
    assert not torch.allclose(paper / paper.norm(), rescaled / rescaled.norm(), rtol=1e-2)
    singular = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert torch.linalg.eigvalsh(spectral(singular, 0.0, released=True))[0].item() == pytest.approx(1e-4)


def test_the_optimal_predictor_is_least_squares() -> None:
    generator = torch.Generator().manual_seed(3)
    f, t = (torch.randn(50, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    correlation, cross = f.T @ f / 50, t.T @ f / 50
    expected = torch.linalg.lstsq(f, t).solution.T
    torch.testing.assert_close(least_squares(correlation, cross, 0.0), expected)
    assert least_squares(correlation, cross, 1.0).norm() < 0.7 * expected.norm()
    assert least_squares(torch.zeros(4, 4), torch.zeros(4, 4), 0.0).abs().max() == 0


def test_directcopy_copies() -> None:
    correlation = covariance()
    largest = torch.linalg.eigvalsh(correlation)[-1]
    eye = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(copied(correlation, 0.2), correlation / largest + 0.2 * eye)
    torch.testing.assert_close(copied(correlation, 0.2, normalize=False), correlation + 0.2 * eye)
    model = train(small("directcopy", epsilon=0.5, normalize=False))
    expected = model.predictor.correlation + 0.5 * torch.eye(8)
    torch.testing.assert_close(model.predictor.weight.detach(), expected)


def test_directpred_sets_its_predictor_every_few_steps_and_trains_it_in_between() -> None:
    each = train(small("directpred"), 2)
    assert not each.predictor.weight.requires_grad
    assert torch.equal(each.predictor.weight.detach(), spectral(each.predictor.correlation, 0.1))
    assert len(each.parameter_groups()) == 1
    model = small("directpred", frequency=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(1, 5):
        before = model.predictor.weight.detach().clone()
        optimizer.zero_grad()
        model(views(seed=step)).backward()
        optimizer.step()
        trained = before - 0.1 * model.predictor.weight.grad
        model.step(0)
        expected = spectral(model.predictor.correlation, 0.1) if step == 3 else trained
        torch.testing.assert_close(model.predictor.weight.detach(), expected)


def test_directpreds_variants_and_epsilons() -> None:
    weights = {}
    for variant, epsilon in (("paper", 0.1), ("released", 0.01), ("optimal", 0.01)):
        model = train(small("directpred", variant=variant), 1)
        assert model.epsilon == epsilon
        weights[variant] = model.predictor.weight
        f, g = model.predictor.correlation, model.predictor.cross
        expected = least_squares(f, g, 0.01) if variant == "optimal" else spectral(f, epsilon, variant == "released")
        assert torch.equal(model.predictor.weight.detach(), expected)
    assert not torch.equal(train(small("directpred", epsilon=1.0), 1).predictor.weight, weights["paper"])


def test_closed_forms_share_their_options() -> None:
    assert small("directpred", rho=0.5).predictor.rho == 0.5
    assert small("directcopy", rho=0.5).predictor.rho == 0.5


# watching


def test_watch_sees_alignment_when_it_is_there() -> None:
    assert small("simclr").watch() == {}
    assert small("byol").watch() == {}
    untrained = train(small("byol", linear_predictor=True), 1, lr=0).watch()
    aligned = train(small("directpred"), 1).watch()
    for seen in (untrained, aligned):
        json.dumps(seen, allow_nan=False)
        assert len(seen["correlation_spectrum"]) == len(seen["predictor_spectrum"]) == 8
        assert seen["correlation_spectrum"] == sorted(seen["correlation_spectrum"], reverse=True)
    assert min(aligned["predictor_alignment"]) > 0.999
    assert sum(untrained["predictor_alignment"]) / len(untrained["predictor_alignment"]) < 0.9
    assert aligned["predictor_asymmetry"] < 1e-5 < untrained["predictor_asymmetry"]
    never = small("directpred").watch()
    assert never["predictor_alignment"] == []


def test_watch_measures_the_angle_to_each_eigenvector() -> None:
    predictor = LinearPredictor(3).double()
    predictor.correlation.copy_(torch.diag(torch.tensor([1.0, 9.0, 1e-9])))
    with torch.no_grad():
        predictor.weight.copy_(torch.tensor([[1.0, 4.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 2.0]]))
    seen = predictor.watch()
    assert seen["predictor_alignment"] == pytest.approx([0.6, 1.0]), "3/5 for the largest; the dead third is left out"
    assert seen["correlation_spectrum"] == pytest.approx([9.0, 1.0, 1e-9])
    assert seen["predictor_spectrum"] == pytest.approx([2 + math.sqrt(5), 2.0, 2 - math.sqrt(5)], rel=1e-5)
