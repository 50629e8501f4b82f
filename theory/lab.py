"""What a lab is: parameters with domains, claims as data, panels as data, and the list of the labs.

A lab is one module of this package with

- a docstring: its page (title, equations, reading, what it means for someone serving embeddings, source);
- ``EXAMPLE``: flags that show something else than the defaults;
- ``Parameters``: a frozen dataclass derived from `Settings`, every field made by `parameter`;
- ``run(parameters) -> Result``: float64, a generator of its own, no other state.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_type_hints

import torch
from torch import Tensor

NAMES = (
    "measurement",
    "strong-augmentation",
    "implicit-regularization",
    "projector",
    "noncontrastive-dynamics",
    "eigenspace-alignment",
    "directpred",
    "frustration",
    "barlow-twins",
)


class ParameterError(ValueError):
    """A parameter outside its domain; the message names it and says what is allowed."""


class Diverged(ArithmeticError):  # noqa: N818 - it is what happened, and reads so where it is raised
    """An integration left the finite numbers; the message names the quantity and the time."""


def parameter(
    default: Any, text: str, *, low: float = -math.inf, high: float = math.inf, open_low: bool = False
) -> Any:
    """A dataclass field with its help text and its domain [low, high], or (low, high] with `open_low`."""
    return field(default=default, metadata={"text": text, "low": low, "high": high, "open_low": open_low})


@dataclass(frozen=True)
class Settings:
    """Base of every lab's parameters: checks types and domains before anything runs.

    Raises `ParameterError` naming the first parameter outside its domain.
    """

    seed: int = parameter(0, "seed of the lab's own random generator", low=0)

    def __post_init__(self) -> None:
        kinds = get_type_hints(type(self))
        for entry in fields(self):
            value, kind, domain = getattr(self, entry.name), kinds[entry.name], entry.metadata
            if kind is str:
                continue
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole and (kind is int or not isinstance(value, float)):
                raise ParameterError(
                    f"{entry.name} must be {'an integer' if kind is int else 'a number'}, not {value!r}"
                )
            below = value <= domain["low"] if domain["open_low"] else value < domain["low"]
            if not math.isfinite(value) or below or value > domain["high"]:
                raise ParameterError(f"{entry.name} must be {describe_domain(domain)}, not {value!r}")
        self.check()

    def check(self) -> None:
        """Conditions between parameters; raise `ParameterError`."""

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


def describe_domain(domain: Any) -> str:
    """The words for a field's domain, as in its help and in the error."""
    low, high = domain["low"], domain["high"]
    lower = f"{'above' if domain['open_low'] else 'at least'} {low:g}" if math.isfinite(low) else ""
    upper = f"at most {high:g}" if math.isfinite(high) else ""
    return " and ".join(part for part in (lower, upper) if part) or "finite"


@dataclass(frozen=True)
class Claim:
    """One thing that must be seen. It holds if `observed` stands in `relation` to `predicted`; NaN never does.

    `predicted` comes from `formula`; `observed` from integration, sampling or autograd, never from the formula.
    `tolerance` is the absolute deviation that "≈" allows.
    """

    statement: str
    formula: str
    relation: Literal["≈", "=", "<", ">"]
    predicted: float
    observed: float
    tolerance: float = 0.0

    @property
    def holds(self) -> bool:
        match self.relation:
            case "≈":
                return abs(self.observed - self.predicted) <= self.tolerance
            case "=":
                return self.observed == self.predicted
            case "<":
                return self.observed < self.predicted
            case ">":
                return self.observed > self.predicted

    @property
    def expectation(self) -> str:
        if self.relation == "≈":
            return f"{self.predicted:.6g} ± {self.tolerance:.2g}"
        return f"{self.predicted:.6g}" if self.relation == "=" else f"{self.relation} {self.predicted:.6g}"


def about(statement: str, formula: str, predicted: float, observed: float, within: float) -> Claim:
    """`observed` within the fraction `within` of `predicted`."""
    return Claim(statement, formula, "≈", float(predicted), float(observed), abs(float(predicted)) * within)


def exactly(statement: str, formula: str, predicted: float, observed: float) -> Claim:
    return Claim(statement, formula, "=", float(predicted), float(observed))


def below(statement: str, formula: str, bound: float, observed: float) -> Claim:
    return Claim(statement, formula, "<", float(bound), float(observed))


def above(statement: str, formula: str, bound: float, observed: float) -> Claim:
    return Claim(statement, formula, ">", float(bound), float(observed))


@dataclass(frozen=True)
class Line:
    """One curve; `dashed` for what a formula predicts, `marks` for points measured apart."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False
    marks: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes of a lab's picture."""

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True)
class Result:
    claims: Sequence[Claim]
    panels: Sequence[Panel]

    @property
    def holds(self) -> bool:
        return all(claim.holds for claim in self.claims)


@dataclass(frozen=True)
class Lab:
    """A lab as the command and the pages see it."""

    name: str
    page: str
    example: str
    parameters: type[Settings]
    run: Callable[[Any], Result]

    @property
    def title(self) -> str:
        return self.page.split("\n", 1)[0].rstrip(".")


def find(name: str) -> Lab:
    """The lab called `name`. Raises `ParameterError` listing the names if there is none."""
    if name not in NAMES:
        raise ParameterError(f"there is no lab {name!r}; the labs are {', '.join(NAMES)}")
    module = importlib.import_module(f"theory.{name.replace('-', '_')}")
    return Lab(name, module.__doc__ or "", module.EXAMPLE, module.Parameters, lambda given: module.run(given))


def finite(value: Tensor, name: str, time: float) -> Tensor:
    """`value` itself; raises `Diverged` if any entry is not finite."""
    if not bool(torch.isfinite(value).all()):
        raise Diverged(f"{name} is no longer finite at t = {time:g}: take a smaller rate or step")
    return value
