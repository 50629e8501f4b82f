"""The table of the verdict's rules, as data. `fullrank.verdict` applies it; `python -m tools.rules` prints it.

The first rule whose signal is beyond its threshold decides, and of its cases the first that holds.
"""

from dataclasses import dataclass

# From the least to the worst: of two verdicts on the same traffic the later one holds.
STATES = (
    "insufficient_data",
    "healthy",
    "traffic_narrowed",
    "traffic_shifted",
    "dimensional_collapse",
    "complete_collapse",
    "model_fault",
)


@dataclass(frozen=True)
class Case:
    """Where a rule's signal is beyond its threshold and `when`, one of `fullrank.reading.CONDITIONS`,
    holds: this state instead."""

    when: str
    state: str
    words: str


@dataclass(frozen=True)
class Rule:
    """One line of the table.

    signal: what `fullrank.reading.READERS` reads.
    window: "canary": the fixed images; "rows": the rows since a change, else a window; "rows, twice": where there was
        a change, the shortest window as well, so that an earlier change does not hide a later one.
    side: "below" or "above".
    threshold: one of `fullrank.thresholds.SIGNALS`.
    reading: "bound": the interval must lie beyond the threshold, unless the sequential test has settled significance;
        "estimate": the value alone.
    state: one of `STATES`; cases: tried in order before it.
    words: the reason, with the signal's value and what belongs to it.
    """

    signal: str
    window: str
    side: str
    threshold: str
    reading: str
    state: str
    words: str
    cases: tuple[Case, ...] = ()


_FOREIGN = Case(
    "inputs are foreign",
    "traffic_shifted",
    "; but the inputs are {inputs.distance:.1f} from the reference's, where one kind of healthy input alone reaches "
    "{usual.narrow_high:.1f}: images of another kind altogether, on which no model can be judged",
)
_SHRUNK = Case(
    "inputs shrank as much",
    "traffic_narrowed",
    "; but a band of the inputs holds {inputs.weakest_band:.2f} of its variance too: near-copies of few images",
)
_UNLIKE = Case(
    "inputs differ, recent canary",
    "traffic_shifted",
    "; but the inputs differ from the reference's and the canary is intact: images of another kind, which the model "
    "puts in few directions",
)
_ALIKE = Case(
    "inputs differ, recent canary, variance left",
    "traffic_shifted",
    "; but the inputs differ from the reference's and the canary is intact: images of another kind, which the model "
    "puts near one another",
)
_REPEATED = Case(
    "rows repeat",
    "traffic_narrowed",
    "; but {sample.copies_share:.0%} of the sampled rows are copies of one another, {sample.distinct_rows} of "
    "{sample.rows} differ, and these are spread: the same images again and again, without keys that say so",
)
_FEW_WEIGH_MORE = Case(
    "copies move it as far",
    "traffic_shifted",
    "; but {sample.copies_share:.0%} of the sampled rows are copies of one another, and images that come often move it "
    "as far: the rows count as {window.independent_rows:.0f}",
)
_ONE_PICTURE = Case("inputs are one picture", "traffic_narrowed", "; but the inputs are all but one and the same")
_MODEL = (
    Case(
        "inputs are usual, ratio collapsed, no recent canary",
        "dimensional_collapse",
        ", while the inputs are what they were: the model or its preprocessing",
    ),
    Case(
        "inputs are usual, no recent canary",
        "model_fault",
        ", while the inputs are what they were: the model or its preprocessing",
    ),
)
_OTHER = (
    Case(
        "inputs are usual",
        "traffic_shifted",
        "; the canary is intact: images of a kind their descriptors do not tell, or answers that are not this model's",
    ),
    Case(
        "inputs differ",
        "traffic_shifted",
        ", and the inputs differ too: foreign images or changed preprocessing",
    ),
)
_NARROWER = (
    Case("rows repeat", "traffic_narrowed", _REPEATED.words),
    Case(
        "ratio collapsed, not calibrated",
        "dimensional_collapse",
        "; the participation ratio is {ratio:.1f} of {reference.participation_ratio:.1f}, a collapse by general "
        "thresholds: the reference is not calibrated, and cannot tell an encoder that lost directions from less varied "
        "traffic",
    ),
    Case(
        "not calibrated",
        "traffic_narrowed",
        ": less varied traffic, or an encoder that lost directions; a reference that is not calibrated cannot tell",
    ),
    Case("", "traffic_narrowed", " with every direction alive: the traffic is less varied"),
)
_FOREIGN_OR_PREPROCESSING = ": foreign images or changed preprocessing"

RULES: tuple[Rule, ...] = (
    Rule(
        "canary's least cosine",
        "canary",
        "below",
        "canary_cosine",
        "estimate",
        "model_fault",
        "a canary image now embeds at cosine {seen.estimate:.4f} to its stored embedding; {limit:g} is the least "
        "expected: the model or its preprocessing has changed{neighbours}",
    ),
    Rule(
        "canary's largest angle",
        "canary",
        "above",
        "canary_angle",
        "estimate",
        "model_fault",
        "a canary image has turned by {seen.estimate:.1f} degrees, where the serving precision explains {limit:.1f} at "
        "most: the model or its preprocessing has changed{neighbours}",
    ),
    Rule(
        "canary's participation ratio",
        "canary",
        "below",
        "canary_participation_ratio",
        "estimate",
        "model_fault",
        "the canary images' participation ratio is {seen.estimate:.1f}, below {limit:.1f}",
    ),
    Rule(
        "share of rows that are zero",
        "rows, twice",
        "above",
        "zero_share",
        "estimate",
        "complete_collapse",
        "{seen.estimate:.0%} of the rows are zeros {n}: the encoder gives no embedding",
    ),
    Rule(
        "total variance",
        "rows, twice",
        "below",
        "total_variance",
        "estimate",
        "complete_collapse",
        "total variance {seen.estimate:.3g} is below {limit:.3g} {n}: all embeddings lie near one point",
        (_ONE_PICTURE, _SHRUNK, _FOREIGN, _ALIKE),
    ),
    Rule(
        "answers shared by inputs that differ",
        "rows, twice",
        "above",
        "shared_answers",
        "estimate",
        "model_fault",
        "{seen.estimate:.0%} of the sampled rows equal the row of another image {n}: a fallback, a cache or a buffer "
        "gives one answer to many",
        (_FOREIGN,),
    ),
    Rule(
        "numerical rank",
        "rows, twice",
        "below",
        "numerical_rank",
        "estimate",
        "dimensional_collapse",
        "only {window.numerical_rank} directions carry variance {n}; the reference has {reference.numerical_rank}",
        (_REPEATED, _SHRUNK, _FOREIGN, _UNLIKE),
    ),
    Rule(
        "any tail band",
        "rows, twice",
        "below",
        "tail_energy_ratio_gone",
        "bound",
        "dimensional_collapse",
        "directions {seen.first} to {seen.last} hold {seen.estimate:.2f} of their reference variance (at most "
        "{seen.upper:.2f}) {n}: {shape}",
        (_REPEATED, _SHRUNK, _FOREIGN, _UNLIKE),
    ),
    Rule(
        "last tail band",
        "rows, twice",
        "below",
        "tail_energy_ratio_low",
        "bound",
        "dimensional_collapse",
        "directions {seen.first} to {seen.last} hold {seen.estimate:.2f} of their reference variance (at most "
        "{seen.upper:.2f}) {n}: {shape}",
        (_REPEATED, _SHRUNK, _FOREIGN, _UNLIKE),
    ),
    Rule(
        "any tail band",
        "rows",
        "above",
        "tail_energy_ratio_high",
        "bound",
        "traffic_shifted",
        "directions {seen.first} to {seen.last} hold {seen.estimate:.1f} times their variance {n}",
        (
            *_MODEL,
            Case(
                "ratio collapsed, inputs not known to differ",
                "dimensional_collapse",
                " while the participation ratio is {ratio:.1f} of {reference.participation_ratio:.1f}: another, "
                "smaller subspace",
            ),
            *_OTHER,
            Case("", "traffic_shifted", _FOREIGN_OR_PREPROCESSING),
        ),
    ),
    Rule(
        "head bands together",
        "rows",
        "below",
        "head_energy_ratio_low",
        "bound",
        "traffic_narrowed",
        "the leading directions hold {seen.estimate:.2f} of their reference variance {n}",
        (*_MODEL, *_NARROWER),
    ),
    Rule(
        "participation ratio",
        "rows",
        "below",
        "participation_ratio",
        "bound",
        "traffic_narrowed",
        "the participation ratio is {seen.estimate:.1f} of {reference.participation_ratio:.1f} {n}",
        (*_MODEL, *_NARROWER),
    ),
    Rule(
        "shift of the mean",
        "rows",
        "above",
        "mean_shift_ratio",
        "estimate",
        "traffic_shifted",
        "the mean has moved by {seen.estimate:.2f} of the reference's variance {n}",
        (*_MODEL, *_OTHER, Case("", "traffic_shifted", _FOREIGN_OR_PREPROCESSING)),
    ),
    Rule(
        "shift of the mean in the tail",
        "rows",
        "above",
        "tail_shift",
        "estimate",
        "traffic_shifted",
        "the mean has moved by {seen.estimate:.3f} of the variance along each trailing direction {n}",
        (_FEW_WEIGH_MORE, *_MODEL, *_OTHER, Case("", "traffic_shifted", _FOREIGN_OR_PREPROCESSING)),
    ),
    Rule(
        "evidence of the sequential test",
        "rows",
        "above",
        "evidence",
        "estimate",
        "traffic_shifted",
        "{changed} has strayed from what healthy traffic does {n}",
        (*_MODEL, *_OTHER, Case("", "traffic_shifted", _FOREIGN_OR_PREPROCESSING)),
    ),
    Rule(
        "correlation of answers and inputs",
        "rows, twice",
        "below",
        "input_correlation",
        "bound",
        "model_fault",
        "the answers do not follow their inputs: their distance correlation is {seen.estimate:.2f} (at most "
        "{seen.upper:.2f}) {n}, where healthy traffic is above {limit:.2f}: each may be another request's",
    ),
)
