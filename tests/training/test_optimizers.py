"""LARS against a naive loop of the paper's formula, and which settings reach which parameter."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from tests.support.training import TINY
from training.methods import METHODS, build
from training.optimizers import LARS, cosine, optimizer, set_learning_rate, warm_up
from training.recipes import RECIPES, recipe
from training.recipes.base import of_the_sum


@pytest.mark.parametrize("clip", [False, True])
def test_lars_is_algorithm_1_of_its_paper(clip: bool) -> None:
    """Three steps on a matrix, a kernel and an excluded bias, in plain Python on flat lists."""
    generator = torch.Generator().manual_seed(0)
    shapes, lr, momentum, decay, trust = [(3, 4), (2, 3, 3, 3), (5,)], 0.5, 0.9, 1e-2, 0.3
    weights = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    groups = [
        {"params": weights[:2], "weight_decay": decay, "adapt": True},
        {"params": weights[2:], "weight_decay": 0.0, "adapt": False},
    ]
    solver = LARS(groups, lr=lr, momentum=momentum, trust=trust, clip=clip)
    naive = [w.flatten().tolist() for w in weights]
    velocity = [[0.0] * len(w) for w in naive]
    for _ in range(3):
        for w in weights:
            w.grad = torch.randn(w.shape, generator=generator)
        for i, w in enumerate(weights):
            assert w.grad is not None
            g, beta = w.grad.flatten().tolist(), decay if i < 2 else 0.0
            rate = 1.0
            if i < 2:
                rate = trust * math.hypot(*naive[i]) / (math.hypot(*g) + beta * math.hypot(*naive[i]))
                rate = min(rate / lr, 1) if clip else rate
            for j in range(len(g)):
                velocity[i][j] = momentum * velocity[i][j] + lr * rate * (g[j] + beta * naive[i][j])
                naive[i][j] -= velocity[i][j]
        solver.step()
    for found, expected in zip(weights, naive, strict=True):
        assert found.detach().flatten().tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_lars_leaves_weights_without_gradient_alone_and_survives_zeros() -> None:
    still, zero = torch.ones(2, 2, requires_grad=True), torch.zeros(2, 2, requires_grad=True)
    zero.grad = torch.ones(2, 2)
    LARS([still, zero], lr=0.1).step()
    assert torch.equal(still.detach(), torch.ones(2, 2))
    torch.testing.assert_close(zero.detach(), torch.full((2, 2), -0.1))  # the rate is 1 where a norm is 0


def test_the_mean_of_two_directions_takes_the_steps_of_their_sum() -> None:
    """A recipe that halves the loss, with `of_the_sum`, against the published one: matrices and biases move alike."""
    chosen, method = recipe("imagenet-simclr"), "simclr"
    ours = replace(chosen, **of_the_sum(1e-2))
    theirs = replace(chosen, weight_decay=1e-2, bias_lr_scale=1.0)
    models = [build(method, TINY.build(), {"projection": 8, "hidden": 8}) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    generator = torch.Generator().manual_seed(0)
    solvers = [optimizer(model, it) for model, it in zip(models, (ours, theirs), strict=True)]
    for _ in range(3):
        for mean, summed in zip(*(model.parameters() for model in models), strict=True):
            mean.grad = torch.randn(mean.shape, generator=generator)
            summed.grad = 2 * mean.grad
        for solver in solvers:
            set_learning_rate(solver, chosen.learning_rate, factor=1.0, warm=1.0)
            solver.step()
    for mean, summed in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(mean, summed, rtol=1e-5, atol=1e-6)


def test_every_parameter_is_in_one_group_and_biases_are_neither_decayed_nor_adapted() -> None:
    for name in ("imagenet-barlow-twins", "cifar10-simsiam", "cifar10-byol"):
        chosen = recipe(name)
        method = build(chosen.method, TINY.build(), chosen.options)
        solver = optimizer(method, chosen)
        grouped = [p for group in solver.param_groups for p in group["params"]]
        assert len(grouped) == len(set(grouped)) == sum(p.requires_grad for p in method.parameters())
        for group in solver.param_groups:
            for p in group["params"]:
                assert group["adapt"] == (p.ndim > 1)
                assert group["weight_decay"] == (chosen.weight_decay if p.ndim > 1 else 0)
                assert group["lr_scale"] == (1 if p.ndim > 1 else chosen.bias_lr_scale)


def test_a_projector_of_scales_is_a_weight_to_lars_and_no_bias() -> None:
    chosen = recipe("cifar10-simclr")
    method = build("simclr", TINY.build(), {"projector": "diagonal"})
    (scale,) = method.projector.parameters()
    (group,) = (it for it in optimizer(method, chosen).param_groups if any(p is scale for p in it["params"]))
    assert (group["adapt"], group["weight_decay"], group["lr_scale"]) == (True, chosen.weight_decay, 1)


@pytest.mark.parametrize(
    ("name", "per_256", "batch", "end"),
    [
        ("cifar10-simclr", 1.0, 512, 0.0),  # Chen et al. 2020, B.9
        ("cifar100-simclr", 1.0, 512, 0.0),
        ("stl10-simclr", 1.0, 512, 0.0),
        ("cifar10-directclr", 1.0, 512, 0.0),
        ("stl10-directclr", 1.0, 512, 0.0),
        ("cifar10-simsiam", 0.03, 512, 0.0),  # Chen & He 2021, D
        ("imagenet-simsiam", 0.05, 512, 0.0),
        ("imagenet-byol", 0.45, 4096, 0.0),  # the released preset of 100 epochs
        ("imagenet-barlow-twins", 0.2, 2048, 0.001),  # facebookresearch/barlowtwins, main.py
        ("imagenet-vicreg", 0.2, 2048, 0.001),  # facebookresearch/vicreg, main_vicreg.py
    ],
)
def test_a_rate_is_published_for_256_images_and_scaled_linearly(
    name: str, per_256: float, batch: int, end: float
) -> None:
    chosen = recipe(name)
    assert (chosen.batch_size, chosen.final_lr) == (batch, end)
    assert chosen.learning_rate == pytest.approx(per_256 * batch / 256)


@pytest.mark.parametrize("name", ["cifar10-simclr", "cifar100-simclr", "stl10-simclr", "imagenet-simclr"])
def test_simclrs_head_ends_in_batch_norm_as_in_its_release(name: str) -> None:
    options = recipe(name).options | {"hidden": 8, "projection": 8}
    assert isinstance(build("simclr", TINY.build(), options).projector[-1], nn.BatchNorm1d)


def test_only_simsiams_predictor_keeps_its_rate() -> None:
    chosen = recipe("cifar10-simsiam")
    method = build("simsiam", TINY.build(), chosen.options)
    solver = optimizer(method, chosen)
    set_learning_rate(solver, 0.06, factor=0.1, warm=1.0)
    rates = {id(p): group["lr"] for group in solver.param_groups for p in group["params"]}
    for name, p in method.named_parameters():
        assert rates[id(p)] == pytest.approx(0.06 if name.startswith("predictor") else 0.006), name


def test_warm_up_is_linear_and_the_cosine_ends_where_it_says() -> None:
    rates = [cosine(step, 100, 0.1, final=0.001) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert rates[10] == 1
    assert rates[55] == pytest.approx(0.5 * 1.001)
    assert rates[100] == pytest.approx(0.001)
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert cosine(0, 100, 0.0) == 1
    assert [warm_up(step, 10, 0.2) for step in (0, 1, 9)] == [0.5, 1, 1]


def test_there_is_a_recipe_for_every_method_on_every_set_and_each_builds() -> None:
    sets = ("fashion", "cifar10", "cifar100", "stl10", "imagenet")
    assert sorted(RECIPES) == sorted(f"{name}-{method}" for name in sets for method in METHODS)
    for name in RECIPES:
        chosen = recipe(name)
        assert (chosen.name, f"{chosen.data}-{chosen.method}") == (name, name)
        # On an encoder that is quick to make; d0 is checked against the dimension of the recipe's own.
        options = {key: value for key, value in chosen.options.items() if key not in ("d0", "hidden", "projection")}
        build(chosen.method, TINY.build(), options)
        assert chosen.options.get("d0", 1) <= chosen.architecture.width * 8
        assert 0 <= chosen.warmup < 0.5
