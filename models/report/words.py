"""Says what each measure of a report means, in a plain sentence that rests on the verdict's own thresholds."""

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fullrank import measures
from fullrank.bounds import Interval
from fullrank.rules import RULES

# Where the name is not what people call it.
NAMES = {
    "effective_rank": "effective rank",
    "rankme": "RankMe",
    "alpha_req": "power-law exponent (alpha-ReQ)",
    "std_ratio": "std × √d",
    "wasserstein_uniformity": "Wasserstein distance from uniform",
    "copies_share": "share of rows with a copy",
    "local_dimension": "local dimension (TwoNN)",
    "canary_angle_degrees": "canary: largest angle",
    "canary_angle_median_degrees": "canary: middle angle",
    "canary_neighbours_overlap": "canary: neighbours that stay",
    "canary_distance_correlation": "canary: order of distances",
    "variance_dimensions": "directions that hold 99 % of the variance",
    "minimum_rows": "rows that the effective rank needs",
    "basis_effective_rank": "effective rank along the reference's directions",
    "head": "variance in the head",
    "mean_shift_ratio": "shift of the mean",
    "zero_share": "share of zero rows",
    "canary_cosine": "canary: least cosine",
    "canary_participation_ratio": "canary: participation ratio",
    "input_distance": "distance of the inputs",
    "texture_shift": "shift of the inputs' textures",
}
FIRST = (
    "effective_rank",
    "participation_ratio",
    "numerical_rank",
    "total_variance",
    "mean_cosine",
    "head",
    "mean_shift_ratio",
    "rankme",
    "stable_rank",
)
DIRECTIONS = {"effective_rank", "participation_ratio", "stable_rank", "rankme", "basis_effective_rank"}
SENTENCES = {
    "effective_rank": "The embeddings use about {value} of {d} directions.",
    "participation_ratio": "The variance is spread as if over {value} equally strong directions.",
    "rankme": "Judged by standard deviations instead of variances, {value} of {d} directions are in use.",
    "stable_rank": "All directions together hold {value} times the variance of the strongest one.",
    "numerical_rank": "{value} of {d} directions vary more than rounding does.",
    "total_variance": "1 would be embeddings spread over the whole sphere, 0 a single point; here it is {value}.",
    "mean_cosine": "Two embeddings have a cosine of {value} on average: 1 would be a single point.",
    "alpha_req": "The spectrum falls like rank to the power of -{value}; around 1 is well spread.",
    "condition_number": "The strongest direction holds {value} times the variance of the weakest.",
    "variance_dimensions": "{value} directions hold 99 % of the variance.",
    "minimum_rows": "About {value} rows are needed to tell the effective rank of such a spectrum.",
    "std_ratio": "A dimension's spread is {value} of what a uniform spread would give: 1 healthy, 0 collapsed.",
    "head": "The strong directions hold {value} times the variance that the reference has there.",
    "basis_effective_rank": "Seen along the reference's directions, about {value} of {d} are in use.",
    "mean_shift_ratio": "The centre of the embeddings has moved by {value} of the reference's total variance.",
    "zero_share": "{value} of the rows are all zero, so have no direction.",
    "wasserstein_uniformity": "0 would be a perfectly even spread over the sphere, 1.41 a single point; here {value}.",
    "dead_units": "{value} of {d} coordinates hardly vary in a sample of the rows.",
    "saturated_units": "{value} of {d} coordinates are stuck at one end of their range in most rows.",
    "hubness": "How unfair neighbourhoods are: near 0 to 1 no row is everybody's neighbour; here {value}.",
    "local_dimension": "Around a row, the rows vary in about {value} directions.",
    "gaussianity": "Slices of the rows are {value} away from Gaussian, where 0.3 is what chance gives.",
    "copies_share": "A share of {value} of the sampled rows has a copy among them.",
    "canary_angle_degrees": "The fixed image that turned most is {value} degrees off its stored embedding.",
    "canary_angle_median_degrees": "Half of the fixed images are within {value} degrees of their stored embeddings.",
    "canary_neighbours_overlap": "Of a fixed image's 10 nearest, a share of {value} is what it was.",
    "canary_distance_correlation": "The order of the fixed images' distances agrees to {value}; 1 is the same order.",
    "canary_cosine": "The fixed images still embed to their stored embeddings within a cosine of {value}.",
    "canary_participation_ratio": "The fixed images' embeddings spread as over {value} equally strong directions.",
    "input_distance": "The images are {value} away from those of the reference: 0 is alike.",
    "texture_shift": "The images' textures are {value} standard deviations away from the reference's: 0 is alike.",
}
WHOLE = {"numerical_rank", "dead_units", "saturated_units", "variance_dimensions", "minimum_rows"}
NOT_NUMBERS = {"seconds", "rows", "groups", "zeros"}


@dataclass(frozen=True)
class Line:
    """One measure as a page shows it. state: ok, bad (beyond the threshold), unknown, or plain (nothing to judge)."""

    key: str
    name: str
    value: str
    bounds: str
    sentence: str
    judged: str
    state: str
    other: str = ""


def lines(
    figures: Mapping[str, Interval],
    snapshot: Mapping[str, Any],
    *,
    judge: bool,
    against: Mapping[str, Interval] | None = None,
) -> list[Line]:
    """The measures in the order of their use. `judge`: whether the snapshot's thresholds apply to these rows."""
    order = sorted(figures, key=lambda it: (FIRST.index(it) if it in FIRST else len(FIRST), it))
    limits = snapshot["thresholds"] if judge else {}
    reference = snapshot.get("reference") or {}
    d = snapshot["dimension"]
    return [_line(it, figures[it], limits, reference, d, (against or {}).get(it)) for it in order]


def _line(
    key: str,
    value: Interval,
    limits: Mapping[str, float | None],
    reference: Mapping[str, Any],
    dimension: int,
    other: Interval | None,
) -> Line:
    name = NAMES.get(key, key.replace("_", " "))
    shown = show(value.estimate, key)
    if not math.isfinite(value.estimate) and not math.isinf(value.estimate):
        said = "These rows do not determine it: they are too few, or have no variance."
        return Line(key, name, "–", "", said, "", "unknown", show(other.estimate, key) if other else "")
    top = dimension if key in DIRECTIONS | WHOLE - {"minimum_rows"} else math.inf
    low, high = value.lower, min(value.upper, top)
    bounded = math.isfinite(low) and math.isfinite(high) and show(low, key) != show(high, key)
    sentence = SENTENCES.get(key, meaning(key)).format(value=shown, d=dimension)
    judged, state = _judged(key, value.estimate, limits, reference)
    return Line(
        key,
        name,
        shown,
        f"{show(low, key)} to {show(high, key)}" if bounded else "",
        sentence,
        judged,
        state,
        show(other.estimate, key) if other else "",
    )


def _judged(
    key: str, value: float, limits: Mapping[str, float | None], reference: Mapping[str, Any]
) -> tuple[str, str]:
    """The comparison with reference and threshold in words, and the state."""
    healthy = reference.get(key)
    beside = f"the reference has {show(healthy, key)}" if isinstance(healthy, int | float) else ""
    names = (key, key.removesuffix("_degrees"), f"{key}_energy_ratio_low")
    signal = next((it for it in names if it in limits), "")
    limit = limits.get(signal)
    if limit is None or not math.isfinite(limit):
        return beside.capitalize() + ("." if beside else ""), "plain"
    inputs = signal in ("input_distance", "texture_shift")
    high = inputs or any(rule.threshold == signal and rule.side == "above" for rule in RULES)
    beyond = value > limit if high else value < limit
    side = "above" if high else "below"
    ends = f"{side} {show(limit, key)} it counts as abnormal"
    words = "; ".join(it for it in (beside, ends) if it)
    return (f"Abnormal: {words}." if beyond else f"Healthy: {words}."), "bad" if beyond else "ok"


def meaning(key: str) -> str:
    """What a measure is, from the first sentence of its function or the help of its metric; empty if neither is."""
    of = getattr(measures, key, None)
    if of is not None and (text := inspect.getdoc(of)):
        return text.partition("\n")[0].replace("{", "(").replace("}", ")")
    try:
        from fullrank.exposition import SpectrumCollector
    except ImportError:
        return ""
    help_of = {it.name.removeprefix("fullrank_"): it.documentation for it in SpectrumCollector(lambda: ()).describe()}
    return help_of.get(key, "").replace("{", "(").replace("}", ")")


def show(value: float | None, key: str = "") -> str:
    """A figure with three digits at most that matter."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞"
    if key in WHOLE:
        return f"{value:,.0f}"
    if abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e7 else f"{value:.2g}"
    if abs(value) >= 100:
        return f"{value:.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 0.095 or value == 0 else f"{value:.2g}"


def service_figures(snapshot: Mapping[str, Any], window: Mapping[str, Any]) -> dict[str, Interval]:
    """The figures in a service's answer: numbers, and objects with bounds, whatever they are called."""
    found = numbers(window)
    zeros, rows = (int(window.get(it) or 0) for it in ("zeros", "rows"))
    if zeros + rows:
        found["zero_share"] = Interval(estimate=zeros / (zeros + rows))
    return found | extras(snapshot, window)


def extras(snapshot: Mapping[str, Any], window: Mapping[str, Any]) -> dict[str, Interval]:
    """The figures of the window's sample of rows, of the canary and of the inputs, where known."""
    found = {key: value for key, value in numbers(window.get("sample") or {}).items() if key != "distinct_rows"}
    for key, value in numbers(snapshot.get("canary") or {}).items():
        found["canary_cosine" if key == "cosine_min" else f"canary_{key}"] = value
    inputs = numbers(snapshot.get("inputs") or {})
    for key, name in (("input_distance", "distance"), ("texture_shift", "texture_shift")):
        found[key] = inputs.get(name, Interval())
    return {key: it for key, it in found.items() if not math.isnan(it.estimate)}


def numbers(values: Mapping[str, Any]) -> dict[str, Interval]:
    """The entries that are a number, or an object with an estimate and its bounds."""
    found = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and "estimate" in value:
            found[key] = Interval(*(_float(value.get(part)) for part in ("lower", "estimate", "upper")))
        elif (value is None or isinstance(value, int | float)) and key not in NOT_NUMBERS:
            found[key] = Interval(estimate=_float(value))
    return found


def _float(value: Any) -> float:
    return math.nan if value is None else float(value)
