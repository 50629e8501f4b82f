"""Thresholds: the value of each signal from which on it counts as abnormal, in the exported gauge's own unit."""

import math

import torch

from fullrank import profile
from fullrank.calibration.ranges import LEAST_TAIL_SHIFT, NARROW_MARGIN, Calibration, Range
from fullrank.calibration.sequential import LEVEL
from fullrank.reference import Reference
from fullrank.sample import SAMPLE_ROWS

# Effect sizes, as shares of the reference, for references without a calibration.
PARTICIPATION_SHARE = 0.7
PARTICIPATION_COLLAPSE_SHARE = 0.3
EFFECTIVE_RANK_SHARE = 0.7
VARIANCE_SHARE = 0.1
NUMERICAL_RANK_SHARE = 0.75
CANARY_PARTICIPATION_SHARE = 0.9
# Ratios to the reference, comparable with the exported ratios as they are.
TAIL_LOW = 0.5
TAIL_HIGH = 2.0
HEAD_LOW = 0.6
# A band this empty is gone though others behind it are not.
BAND_GONE = 0.15
CANARY_COSINE = 0.99
# Degrees by which a canary image may turn: so many times what the serving precision turns it by itself, at most the
# angle of the cosine above, and at least a share of the way to the nearest other image: less than that costs a search
# nothing that 2,000 queries show (`benchmarks.small_changes`). That share is taken within 1 degree, to which engines
# agree (a cosine of 0.9999, and some more), and 3.
CANARY_NOISE_TIMES = 3.0
CANARY_NEAREST_SHARE = 0.1
CANARY_ANGLE_LEAST = 1.0
CANARY_ANGLE_LEAST_MOST = 3.0
CANARY_ANGLE_MOST = math.degrees(math.acos(CANARY_COSINE))
# Without a reference nothing is healthy, but this is collapse for any rows of length 1.
VARIANCE_FLOOR = 0.01
# Rows of zeros: so many of all rows are no exception any more.
ZERO_SHARE = 0.5
# Rows that equal the row of another input: none in health, and one in fifty is the least that counts.
SHARED_ANSWERS = 0.02
# Answers follow their inputs this much less than in health, as a share; below the second figure even healthy answers
# follow them too little to tell. Of answers of which a share p are other requests', about (1 - p)^2 is left.
CORRELATION_SHARE = 0.5
CORRELATION_LEAST = 0.03

SIGNALS = (
    "participation_ratio",
    "participation_ratio_collapse",
    "effective_rank",
    "total_variance",
    "numerical_rank",
    "tail_energy_ratio_low",
    "tail_energy_ratio_gone",
    "tail_energy_ratio_high",
    "head_energy_ratio_low",
    "mean_shift_ratio",
    "tail_shift",
    "input_distance",
    "evidence",
    "canary_cosine",
    "canary_angle",
    "canary_participation_ratio",
    "zero_share",
    "shared_answers",
    "input_correlation",
    "texture_shift",
)


def thresholds(reference: Reference | None, rows: int = 6144) -> dict[str, float]:
    """signal -> its threshold in a window of that many rows.

    A signal counts as abnormal below it; `*_high`, `canary_angle`, `mean_shift_ratio`, `tail_shift`, `input_distance`,
    `texture_shift`, `evidence`, `zero_share` and `shared_answers` above it. A calibrated reference gives its own;
    others fixed shares of themselves. NaN where the reference does not determine one: comparisons with it are false,
    in PromQL as here.
    """
    signals = dict.fromkeys(SIGNALS, math.nan) | {
        "tail_energy_ratio_low": TAIL_LOW,
        "tail_energy_ratio_gone": BAND_GONE,
        "tail_energy_ratio_high": TAIL_HIGH,
        "head_energy_ratio_low": HEAD_LOW,
        "canary_cosine": CANARY_COSINE,
        "canary_angle": canary_angle(reference),
        "evidence": math.nan if reference is None or reference.calibration is None else math.log10(LEVEL),
        "total_variance": VARIANCE_FLOOR,
        "tail_shift": math.nan if reference is None else LEAST_TAIL_SHIFT,
        "zero_share": ZERO_SHARE,
        "shared_answers": SHARED_ANSWERS,
    }
    if reference is not None:
        signals |= {
            "participation_ratio": PARTICIPATION_SHARE * reference.participation_ratio,
            "participation_ratio_collapse": PARTICIPATION_COLLAPSE_SHARE * reference.participation_ratio,
            "effective_rank": EFFECTIVE_RANK_SHARE * reference.effective_rank,
            "total_variance": VARIANCE_SHARE * reference.total_variance,
            "numerical_rank": NUMERICAL_RANK_SHARE * reference.numerical_rank,
            "canary_participation_ratio": CANARY_PARTICIPATION_SHARE * reference.canary_participation_ratio,
        }
        signals |= {name: value for name, value in _calibrated(reference, rows).items() if math.isfinite(value)}
    return signals


def canary_angle(reference: Reference | None) -> float:
    """Degrees from which on a canary image counts as turned.

    Three times the noise of the serving precision, at least a tenth of the median angle from a canary image to the
    nearest other one, which is taken within 1 and 3 degrees, and at most the 8.1 of a cosine of 0.99. The noise is the
    reference's `canary_noise`, measured where the encoder serves; where nobody did, the spacing eps of its dtype as an
    angle, about which an encoder of some twenty layers turns (`benchmarks.precision`).
    """
    if reference is None:
        return CANARY_ANGLE_MOST
    noise = reference.canary_noise
    if not math.isfinite(noise):
        noise = math.degrees(torch.finfo(getattr(torch, reference.dtype)).eps)
    tenth = CANARY_NEAREST_SHARE * reference.canary_nearest
    least = min(CANARY_ANGLE_LEAST_MOST, max(CANARY_ANGLE_LEAST, tenth)) if tenth > 0 else CANARY_ANGLE_LEAST
    return min(CANARY_ANGLE_MOST, max(least, CANARY_NOISE_TIMES * noise))


def _calibrated(reference: Reference, rows: int) -> dict[str, float]:
    """Thresholds of healthy traffic, and those between narrow traffic and a broken model."""
    calibration = reference.calibration
    if calibration is None:
        return {}
    participation = calibration.range("participation_ratio", rows)
    rank = calibration.range("numerical_rank", rows)
    count = len(reference.bands)
    tail = [calibration.range(str(i), rows) for i in range(profile.head_bands(count), count)] or [Range()]
    # One kind of input leaves some units silent; a fault has to silence half as many again, and 2 % more.
    least_rank = 1 - 1.5 * (1 - min(rank.narrow_low, 1.0)) - 0.02
    return {
        "participation_ratio": participation.low * reference.participation_ratio,
        "participation_ratio_collapse": min(
            PARTICIPATION_COLLAPSE_SHARE * reference.participation_ratio,
            participation.narrow_low / NARROW_MARGIN * reference.participation_ratio,
        ),
        "effective_rank": calibration.range("effective_rank", rows).low * reference.effective_rank,
        "numerical_rank": least_rank * reference.numerical_rank,
        "tail_energy_ratio_low": min(TAIL_LOW, *(band.narrow_low / NARROW_MARGIN for band in tail)),
        "tail_energy_ratio_high": max(max(band.narrow_high * NARROW_MARGIN, band.high) for band in tail),
        "head_energy_ratio_low": calibration.range("head", rows).low,
        "mean_shift_ratio": calibration.range("mean_shift", rows).high ** 2,
        "tail_shift": calibration.range("tail_shift", rows).high,
        "input_distance": calibration.range("input_distance", rows).high,
        "texture_shift": calibration.range("texture_shift", rows).high,
        "input_correlation": _input_correlation(calibration, rows),
    }


def _input_correlation(calibration: Calibration, rows: int) -> float:
    """Half of what healthy traffic gives, and below what its windows and traffic of one kind reach; NaN where that is
    too little to tell from 0, or not known."""
    # Of 512 rows or more as many are sampled, in windows of 1,024 as well.
    known = calibration.range("input_correlation", max(rows, min(rows * 1024 // SAMPLE_ROWS, 1024)))
    usual = (known.low + known.high) / 2
    limit = min(CORRELATION_SHARE * usual, known.low, known.narrow_low / NARROW_MARGIN)
    return limit if limit >= CORRELATION_LEAST else math.nan
