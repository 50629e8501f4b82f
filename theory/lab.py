"""What a lab is: parameters with domains, claims as data, panels as data, and the list of the labs.

A lab is one module of this package with

- a docstring: its page (title, equations, reading, what it means for someone serving embeddings, source);
- ``EXAMPLE``: flags that show something else than the defaults;
- ``Parameters``: a model derived from `Settings`, every field made by `parameter`;
- ``run(parameters) -> Result``: float64, a generator of its own, no other state.

A claim states its domain. Outside it the lab still shows what was seen, but asserts nothing, and says why.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from torch import Tensor

from theory import NAMES


class ParameterError(ValueError):
    """A parameter outside its domain; the message names it and says what is allowed."""


class Diverged(ArithmeticError):  # noqa: N818 - it is what happened, and reads so where it is raised
    """An integration left the finite numbers; the message names the quantity and the time."""


def parameter(
    default: Any, text: str, *, low: float | None = None, high: float | None = None, open_low: bool = False
) -> Any:
    """A field with its help text and its domain [low, high], or (low, high] with `open_low`."""
    least, above_ = (None, low) if open_low else (low, None)
    finite_only = None if isinstance(default, str) else False
    return Field(default, description=text, ge=least, gt=above_, le=high, allow_inf_nan=finite_only)


class Settings(BaseModel):
    """Base of every lab's parameters: checks types and domains before anything runs.

    Raises `ParameterError` naming the first parameter outside its domain.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    seed: int = parameter(0, "seed of the lab's own random generator", low=0, high=2**32)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ParameterError(_explained(type(self), error)) from error
        self.check()

    def check(self) -> None:
        """Conditions between parameters; raise `ParameterError`."""

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


def _explained(parameters: type[Settings], error: ValidationError) -> str:
    """The first thing wrong, in words: which parameter, what it must be, what it is."""
    first = error.errors()[0]
    name, value = str(first["loc"][0]), first["input"]
    entry = parameters.model_fields.get(name)
    if entry is None:
        return f"there is no parameter {name!r}; there are {', '.join(parameters.model_fields)}"
    if first["type"] in ("int_type", "int_from_float"):
        return f"{name} must be an integer, not {value!r}"
    if first["type"] in ("float_type", "string_type"):
        return f"{name} must be a {'number' if first['type'] == 'float_type' else 'string'}, not {value!r}"
    return f"{name} must be {describe_domain(entry)}, not {value!r}"


def describe_domain(entry: FieldInfo) -> str:
    """The words for a field's domain, as in its help and in the error."""
    words = {"gt": "above", "ge": "at least", "le": "at most"}
    bounds = [
        f"{word} {getattr(bound, name):g}"
        for name, word in words.items()
        for bound in entry.metadata
        if getattr(bound, name, None) is not None
    ]
    return " and ".join(bounds) or "finite"


@dataclass(frozen=True)
class Claim:
    """One thing that must be seen. It holds if `observed` stands in `relation` to `predicted`; NaN never does.

    `predicted` comes from `formula`; `observed` from integration, sampling or autograd, never from the formula.
    `tolerance` is the absolute deviation that "≈" allows. `outside` says why the parameters lie outside the claim's
    domain, where it asserts nothing; it is empty inside.
    """

    statement: str
    formula: str
    relation: Literal["≈", "=", "<", ">"]
    predicted: float
    observed: float
    tolerance: float = 0.0
    outside: str = ""

    @property
    def verdict(self) -> Literal["holds", "fails", "outside"]:
        """Whether the claim holds, fails, or asserts nothing here."""
        if self.outside:
            return "outside"
        return "holds" if self.holds else "fails"

    @property
    def holds(self) -> bool:
        """Whether the relation holds between what was seen and what was predicted."""
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


def where(inside: bool, reason: str, claim: Claim) -> Claim:
    """`claim` itself inside its domain; else the same claim, which asserts nothing and gives the `reason`."""
    return claim if inside else replace(claim, outside=reason)


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
        """Whether no claim fails."""
        return all(claim.verdict != "fails" for claim in self.claims)

    @property
    def counts(self) -> str:
        """How many claims hold, and how many assert nothing at these parameters."""
        verdicts = [claim.verdict for claim in self.claims]
        outside = verdicts.count("outside")
        beside = f", {outside} outside their domain" if outside else ""
        return f"{verdicts.count('holds')} of {len(verdicts) - outside} claims hold{beside}"


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

    def run(given: Any) -> Result:
        try:
            found: Result = module.run(given)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise Diverged(f"a matrix has no decomposition any more: take a smaller rate or step ({error})") from error
        except Diverged:
            raise
        except ArithmeticError as error:
            raise Diverged(f"a number is beyond float64: take parameters nearer to the defaults ({error})") from error
        return found

    return Lab(name, module.__doc__ or "", module.EXAMPLE, module.Parameters, run)


def finite(value: Tensor, name: str, time: float) -> Tensor:
    """`value` itself; raises `Diverged` if any entry is not finite."""
    if not bool(torch.isfinite(value).all()):
        raise Diverged(f"{name} is no longer finite at t = {time:g}: take a smaller rate or step")
    return value
