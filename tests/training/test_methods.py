"""Each method's switches change what they say, and the parts that its paper insists on are there."""

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.backbones import ResNet
from training.methods import (
    BYOL,
    METHODS,
    DirectCLR,
    DirectCopy,
    DirectPred,
    Method,
    SimCLR,
    SimSiam,
    build,
    options_of,
)
from training.methods.directclr import info_nce
from training.methods.directcopy import copied
from training.methods.directpred import least_squares, spectral
from training.methods.predictive import regression
from training.methods.predictor import LinearPredictor
from training.methods.simclr import nt_xent

SMALL: dict[str, dict[str, Any]] = {
    "simclr": {"projection": 8},
    "directclr": {"d0": 8},
    "byol": {"projection": 8, "hidden": 16},
    "simsiam": {"projection": 16, "bottleneck": 4},
    "directpred": {"projection": 8, "hidden": 16},
    "directcopy": {"projection": 8, "hidden": 16},
    "barlow-twins": {"projection": 16, "hidden": 16},
    "vicreg": {"projection": 16, "hidden": 16},
}
PREDICTIVE = ["byol", "simsiam", "directpred", "directcopy"]


def small_encoder() -> ResNet:
    torch.manual_seed(0)
    return ResNet("resnet18", width=4, in_channels=1, stem="3x3/2")


def small(name: str, **options: Any) -> Any:
    return METHODS[name](small_encoder(), **SMALL[name], **options)


def views(n: int = 8, seed: int = 1) -> Tensor:
    return torch.randn(2 * n, 1, 28, 28, generator=torch.Generator().manual_seed(seed))


def covariance(d: int = 6, seed: int = 0) -> Tensor:
    rows = torch.randn(40, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows *= torch.linspace(0.1, 2, d)
    return rows.T @ rows / len(rows)


def train(method: Method, steps: int = 3, lr: float = 0.05) -> Method:
    """Plain SGD with everything that `parameter_groups` asks for."""
    groups = [{"params": g["params"], "lr": lr * g.get("lr_scale", 1)} for g in method.parameter_groups()]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9)
    for step in range(steps):
        optimizer.zero_grad()
        method(views(seed=step)).backward()
        optimizer.step()
        method.step((step + 1) / steps)
    return method


@pytest.mark.parametrize("name", METHODS)
def test_a_step_down_the_gradient_lowers_the_loss(name: str) -> None:
    model, batch = small(name), views()
    before = model(batch)
    before.backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p.sub_(1e-3 * p.grad)
    assert model(batch).item() < before.item()


@pytest.mark.parametrize("name", METHODS)
def test_groups_hold_every_trainable_parameter_once_and_all_of_them_learn(name: str) -> None:
    model = small(name)
    grouped = [p for group in model.parameter_groups() for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {p for p in model.parameters() if p.requires_grad}
    model(views()).backward()
    assert all(p.grad is not None for p in grouped)


@pytest.mark.parametrize("name", METHODS)
def test_resuming_from_the_state_continues_as_if_unbroken(name: str) -> None:
    first = train(small(name))
    second = small(name)
    second.load_state_dict(first.state_dict())
    for model in (first, second):
        train(model, 2)
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", METHODS)
def test_autocast_reaches_the_encoder_but_not_the_loss(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, seen = small(name), views(), []
    pair = model.pair
    monkeypatch.setattr(model, "pair", lambda views: seen.append(pair(views)) or seen[-1])
    with torch.autocast("cpu", torch.bfloat16):
        value = model(batch)
    assert torch.equal(value, model.loss(*(z.float() for z in seen[0])))
    assert not torch.equal(value, model(batch))


# SimCLR and DirectCLR


def test_simclr_projectors() -> None:
    batch = views()
    trained = {
        kind: sum(p.numel() for p in SimCLR(small_encoder(), projector=kind, projection=8).projector.parameters())
        for kind in ("none", "orthogonal", "low-rank", "diagonal", "linear", "mlp")
    }
    mlp = 32 * 32 + 2 * 32 + 32 * 8
    assert trained == {"none": 0, "orthogonal": 0, "low-rank": 0, "diagonal": 32, "linear": 32 * 8, "mlp": mlp}
    bare, turned = (SimCLR(small_encoder(), projector=kind) for kind in ("none", "orthogonal"))
    z1, z2 = bare.encoder(batch).chunk(2)
    assert bare(batch).item() == pytest.approx(nt_xent(z1, z2, 0.5).item(), rel=1e-6)
    assert turned(batch).item() == pytest.approx(bare(batch).item(), rel=1e-5), "the cosine cannot see a rotation"
    assert not torch.allclose(turned.project(z1), z1, atol=1e-2)
    h = torch.randn(40, 32)
    assert torch.equal(SimCLR(small_encoder(), projector="diagonal").project(h), h)
    for options, rank in (({"rank": 5}, 5), ({}, 32 * 360 // 2048)):
        matrix = SimCLR(small_encoder(), projector="low-rank", **options).project(torch.eye(32))
        singular = torch.linalg.svdvals(matrix)
        torch.testing.assert_close(singular, (torch.arange(32) < rank).float(), atol=1e-5, rtol=0)


def test_directclr_sends_no_direct_gradient_past_d0() -> None:
    method = DirectCLR(small_encoder(), d0=8)
    h = torch.randn(6, 32, requires_grad=True)
    z1, z2 = method.project(h).chunk(2)
    info_nce(z1, z2, 0.1).backward()
    assert h.grad is not None
    assert h.grad[:, :8].abs().min() > 0
    assert h.grad[:, 8:].abs().max() == 0
    assert DirectCLR(small_encoder()).d0 == 32 * 360 // 2048


# what BYOL, SimSiam, DirectPred and DirectCopy share


@pytest.mark.parametrize("name", PREDICTIVE)
def test_the_loss_is_the_formula_and_the_target_side_gets_no_gradient(name: str) -> None:
    model, batch = small(name).eval(), views()
    model(batch).backward()
    got = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    f = model.projector(model.encoder(batch))
    t = (f if model.target is None else model.target(batch)).detach()
    (f1, f2), (t1, t2) = model.predictor(f).chunk(2), t.chunk(2)
    expected = (model.loss(f1, t2) + model.loss(f2, t1)) / 2
    assert model(batch).item() == pytest.approx(expected.item(), rel=1e-6)
    expected.backward()
    assert not any(key.startswith("target") for key in got)
    for key, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(got[key], p.grad, msg=key)


@pytest.mark.parametrize("name", PREDICTIVE)
def test_without_stop_gradient_both_sides_learn_and_there_is_no_target(name: str) -> None:
    model, batch = small(name, stop_gradient=False).eval(), views()
    assert model.target is None
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
    assert small(name, momentum=None).target is None


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
    bare = BYOL(small_encoder(), predictor=False, stop_gradient=False, projector=False).eval()
    h1, h2 = bare.encoder(views()).chunk(2)
    assert bare(views()).item() == pytest.approx(regression(h1, h2).item(), rel=1e-6)


def test_simsiams_heads_are_the_papers() -> None:
    model = SimSiam(small_encoder(), projection=16, bottleneck=4, layers=3)
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


# bad input


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("directclr", {"d0": 0}, "between 1 and the representation's 32"),
        ("directclr", {"d0": 33}, "between 1 and the representation's 32"),
        ("directclr", {"temperature": 0.0}, "temperature is 0.0"),
        ("simclr", {"temperature": -1.0}, "temperature is -1.0"),
        ("simclr", {"projector": "quadratic"}, "must be one of mlp, linear"),
        ("simclr", {"projector": "low-rank", "rank": 33}, "rank is 33"),
        ("byol", {"momentum": 1.5}, "momentum is 1.5"),
        ("byol", {"symmetric": True}, "set linear_predictor too"),
        ("byol", {"predictor_lr": -1.0}, "predictor_lr is -1.0"),
        ("simsiam", {"symmetric": True}, "set linear_predictor too"),
        ("simsiam", {"layers": 0}, "layers is 0"),
        ("simsiam", {"predictor_weight_decay": -1.0}, "predictor_weight_decay is -1.0"),
        ("directpred", {"variant": "best"}, "must be one of paper, released, optimal"),
        ("directpred", {"rho": 1.2}, "rho is 1.2"),
        ("directpred", {"frequency": 0}, "frequency is 0"),
        ("directcopy", {"epsilon": -0.1}, "epsilon is -0.1"),
        ("barlow-twins", {"redundancy": -1.0}, "redundancy is -1.0"),
        ("vicreg", {"variance": -1.0}, "variance is -1.0"),
    ],
)
def test_options_out_of_range_are_refused_by_name(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        METHODS[name](small_encoder(), **options)


@pytest.mark.parametrize("name", METHODS)
def test_unknown_options_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match="colour"):
        METHODS[name](small_encoder(), colour="red")


def test_closed_forms_share_their_options() -> None:
    assert DirectPred(small_encoder(), rho=0.5, projection=8).predictor.rho == 0.5
    assert DirectCopy(small_encoder(), rho=0.5, projection=8).predictor.rho == 0.5


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("directclr", {"d0": 1.5}, "d0 is 1.5: .*integer"),
        ("directclr", {"depth": 3}, "directclr has no option 'depth'; it takes d0, temperature"),
        ("simclr", {"projection": 0}, "projection is 0; it must be at least 1"),
        ("byol", {"predictor": "no"}, "predictor is 'no': .*boolean"),
        ("byol", {"momentum": "high"}, "momentum is 'high': .*number"),
        ("directpred", {"predictor": False}, "directpred has no option 'predictor'"),
        ("directpred", {"frequency": True}, "frequency is True: .*integer"),
    ],
)
def test_options_of_the_wrong_type_are_refused_by_name(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, small_encoder(), options)


@pytest.mark.parametrize("name", METHODS)
def test_what_build_takes_is_what_the_constructor_takes(name: str) -> None:
    """One option at a time, with a value of its type: the constructor knows every name that `build` lets through."""
    values = {int: 8, float: 0.5, bool: False}
    known = options_of(METHODS[name])
    assert SMALL[name].keys() <= known.keys()
    for option, kind in known.items():
        value = next((values[t] for t in (kind, *getattr(kind, "__args__", ())) if t in values), None)
        if value is not None:
            build(name, small_encoder(), SMALL[name] | {option: value})
