"""What holds of every method, what SimCLR and DirectCLR insist on, and options that no method takes."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models.heads import Fixed
from tests.support.training import OPTIONS, TINY, small, small_encoder, train, views
from training.methods import METHODS, build, options_of
from training.methods.directclr import info_nce
from training.methods.predictive import Target
from training.methods.predictor import NoPredictor
from training.methods.simclr import nt_xent
from training.optimizers import optimizer
from training.recipes import recipe


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
def test_autocast_reaches_the_encoder_but_not_the_loss(name: str) -> None:
    """The loss is that of the bfloat16 rows in float32: between bfloat16's grid points, near the float32 loss."""
    model, batch, seen = small(name).eval(), views(), []
    model.encoder.register_forward_hook(lambda module, given, rows: seen.append(rows))
    with torch.autocast("cpu", torch.bfloat16):
        value = model(batch)
    assert seen[0].dtype == torch.bfloat16
    assert value.dtype == torch.float32
    assert value.item() != value.bfloat16().item()
    assert value.item() == pytest.approx(model(batch).item(), rel=0.05, abs=0.02)


def test_losses_are_those_of_the_first_version() -> None:
    """Four steps of every method and switch, in float64, against numbers frozen before the methods were rewritten."""
    frozen = json.loads(Path(__file__).with_name("frozen_losses.json").read_text())
    assert {each["method"] for each in frozen} <= METHODS.keys()
    for each in frozen:
        torch.manual_seed(0)
        model = build(each["method"], TINY.build(), each["options"]).double()
        groups = [
            {
                "params": g["params"],
                "lr": 0.05 * g.get("lr_scale", 1),
                "weight_decay": g.get("weight_decay", 1e-4),
            }
            for g in model.parameter_groups()
        ]
        optimizer = torch.optim.SGD(groups, momentum=0.9)
        found = []
        for step in range(4):
            images = torch.randn(16, 1, 28, 28, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            optimizer.zero_grad()
            loss = model(images)
            loss.backward()
            optimizer.step()
            model.step((step + 1) / 4)
            found.append(loss.item())
        assert found == pytest.approx(each["losses"], rel=1e-7, abs=1e-9), each
        names = "\n".join(sorted(model.state_dict()))
        digest = hashlib.sha256(names.encode()).hexdigest()
        assert digest == each["names"], "a checkpoint of an older run would not load"


@pytest.mark.parametrize("name", METHODS)
def test_the_trivial_loss_is_that_of_rows_that_are_all_alike(name: str) -> None:
    """An encoder that cannot tell images apart, without the heads, which would make noise of rounding errors."""
    switches: dict[str, Any] = {"byol": {"predictor": False}, "simsiam": {"predictor": False}}.get(name, {})
    model, n = small(name, **switches), 8
    model.projector = nn.Identity()
    if hasattr(model, "target"):
        model.target = Target()
    if name in ("directpred", "directcopy"):
        model.predictor = NoPredictor()
    if name == "barlow-twins":
        model.width = 32
    if name == "sigreg":
        model.projector = Fixed(torch.zeros(16, 32))
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.zero_()
        model.encoder.layer4[1].bn2.bias.fill_(1.0)
    assert model(views(n)).item() == pytest.approx(model.trivial_loss(n), rel=1e-4, abs=1e-4)


# SimCLR and DirectCLR


def test_simclr_projectors() -> None:
    batch = views()
    trained = {
        kind: sum(
            p.numel()
            for p in build("simclr", small_encoder(), {"projector": kind, "projection": 8}).projector.parameters()
        )
        for kind in ("none", "orthogonal", "low-rank", "diagonal", "linear", "mlp")
    }
    mlp = 32 * 32 + 2 * 32 + 32 * 8
    assert trained == {"none": 0, "orthogonal": 0, "low-rank": 0, "diagonal": 32, "linear": 32 * 8, "mlp": mlp}
    bare, turned = (build("simclr", small_encoder(), {"projector": kind}) for kind in ("none", "orthogonal"))
    z1, z2 = bare.encoder(batch).chunk(2)
    assert bare(batch).item() == pytest.approx(nt_xent(z1, z2, 0.5).item(), rel=1e-6)
    assert turned(batch).item() == pytest.approx(bare(batch).item(), rel=1e-5), "the cosine cannot see a rotation"
    assert not torch.allclose(turned.project(z1), z1, atol=1e-2)
    h = torch.randn(40, 32)
    assert torch.equal(build("simclr", small_encoder(), {"projector": "diagonal"}).project(h), h)
    for options, rank in (({"rank": 5}, 5), ({}, 32 * 360 // 2048)):
        matrix = build("simclr", small_encoder(), {"projector": "low-rank"} | options).project(torch.eye(32))
        singular = torch.linalg.svdvals(matrix)
        torch.testing.assert_close(singular, (torch.arange(32) < rank).float(), atol=1e-5, rtol=0)


def test_simclrs_head_ends_in_a_batchnorm_that_learns_a_scale_and_no_shift() -> None:
    """As Google's code builds it; the normalisation against its formula."""
    model = train(small("simclr", final_norm=True))
    scale, shift = model.projector[-1].weight, model.projector[-1].bias
    assert scale.requires_grad
    assert not torch.allclose(scale, torch.ones(()))
    assert not shift.any()
    h = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    rows = model.projector[:-1](h)
    expected = scale * (rows - rows.mean(0)) / (rows.var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(model.project(h), expected, rtol=1e-4, atol=1e-5)
    settings = recipe("cifar10-simclr")
    assert settings.options["final_norm"]
    (mine,) = (group for group in optimizer(model, settings).param_groups if any(p is scale for p in group["params"]))
    assert (mine["weight_decay"], mine["adapt"]) == (0.0, False)
    assert not any(p is shift for group in optimizer(model, settings).param_groups for p in group["params"])


def test_directclr_sends_no_direct_gradient_past_d0() -> None:
    method = build("directclr", small_encoder(), {"d0": 8})
    h = torch.randn(6, 32, requires_grad=True)
    z1, z2 = method.project(h).chunk(2)
    info_nce(z1, z2, 0.1).backward()
    assert h.grad is not None
    assert h.grad[:, :8].abs().min() > 0
    assert h.grad[:, 8:].abs().max() == 0
    assert build("directclr", small_encoder(), {}).d0 == 32 * 360 // 2048


# bad input


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("directclr", {"d0": -1}, "must be at least 1"),
        ("directclr", {"d0": 64}, "between 1 and the representation's 32"),
        ("directclr", {"d0": 33}, "between 1 and the representation's 32"),
        ("directclr", {"temperature": 0.0}, "temperature is 0.0"),
        ("simclr", {"temperature": -1.0}, "temperature is -1.0"),
        ("simclr", {"projector": "quadratic"}, "projector is .quadratic.: Input should be 'mlp'"),
        ("simclr", {"projector": "low-rank", "rank": 33}, "rank is 33"),
        ("byol", {"momentum": 1.5}, "momentum is 1.5"),
        ("byol", {"symmetric": True}, "set linear_predictor too"),
        ("byol", {"predictor_lr": -1.0}, "predictor_lr is -1.0"),
        ("simsiam", {"symmetric": True}, "set linear_predictor too"),
        ("simsiam", {"layers": 0}, "layers is 0"),
        ("simsiam", {"predictor_weight_decay": -1.0}, "predictor_weight_decay is -1.0"),
        ("directpred", {"variant": "best"}, "variant is .best.: Input should be 'paper'"),
        ("directpred", {"rho": 1.2}, "rho is 1.2"),
        ("directpred", {"frequency": 0}, "frequency is 0"),
        ("directcopy", {"epsilon": -0.1}, "epsilon is -0.1"),
        ("barlow-twins", {"redundancy": -1.0}, "redundancy is -1.0"),
        ("vicreg", {"variance": -1.0}, "variance is -1.0"),
    ],
)
def test_options_out_of_range_are_refused_by_name(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, small_encoder(), options)


@pytest.mark.parametrize("name", METHODS)
def test_unknown_options_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="has no option 'colour'"):
        build(name, small_encoder(), {"colour": "red"})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("directclr", {"d0": 1.5}, "d0 is 1.5: .*integer"),
        ("directclr", {"depth": 3}, "directclr has no option 'depth'; it takes d0, temperature"),
        ("simclr", {"projection": 0}, "projection is 0; it must be at least 1"),
        ("simclr", {"projection": 10**30}, "it must be at least 1 and below 2\\^31"),
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
    assert OPTIONS[name].keys() <= known.keys()
    for option, kind in known.items():
        value = next((values[t] for t in (kind, *getattr(kind, "__args__", ())) if t in values), None)
        if value is not None:
            build(name, small_encoder(), OPTIONS[name] | {option: value})
