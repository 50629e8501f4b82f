"""Recipes: Python functions that return a dataclass, named DATA-METHOD. Flags override fields."""

import difflib
from dataclasses import replace
from functools import partial

from training.recipes import cifar, fashion, imagenet, stl10
from training.recipes.base import Recipe, RecipeFunction

__all__ = ["RECIPES", "Recipe", "describe", "recipe"]


def _on_cifar100(ten: RecipeFunction) -> Recipe:
    chosen = ten()
    return replace(chosen, name=chosen.name.replace("cifar10-", "cifar100-"), data="cifar100")


RECIPES: dict[str, RecipeFunction] = {}
for function in (*fashion.RECIPES, *cifar.RECIPES):
    RECIPES[function().name] = function
for function in cifar.RECIPES:
    RECIPES[_on_cifar100(function).name] = partial(_on_cifar100, function)
for function in (*stl10.RECIPES, *imagenet.RECIPES):
    RECIPES[function().name] = function


def recipe(name: str) -> Recipe:
    """The recipe of that name. Raises ValueError, with the nearest names, for an unknown one."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=3, cutoff=0.3) or list(RECIPES)
        raise ValueError(f"there is no recipe {name!r}; did you mean {', '.join(near)}?")
    return RECIPES[name]()


def describe(name: str) -> str:
    """One line on a recipe: its settings, and its docstring."""
    chosen = recipe(name)
    function = RECIPES[name]
    text = " ".join((function.__doc__ or "").split())
    if isinstance(function, partial):
        text = f"As {function.args[0]().name}, on 100 classes."
    optimiser = f"{chosen.optimizer} {chosen.learning_rate:g}"
    settings = f"{chosen.epochs:>4} epochs, batch {chosen.batch_size:>4}, {optimiser:<10}"
    return f"{name:<22} {chosen.architecture.name} {settings} {text}".rstrip()
