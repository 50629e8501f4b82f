"""The benchmark of pairs of rows and inputs, against what a monitor reads of the same rows."""

import pytest
import torch

from benchmarks.detection.pairs import ROWS, Pairs, Tally, handed_on, report, rows_to_detection
from benchmarks.detection.runs import five
from fullrank import Reference
from fullrank.sample import measure_sample
from fullrank.verdict import thresholds


def drawn(n, seed):
    """Rows (n, d), inputs that they follow, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (n,), generator=generator)
    rows = torch.randn(n, 16, generator=generator) + torch.nn.functional.one_hot(labels, 16)
    return rows, rows[:, :8] + 0.3 * torch.randn(n, 8, generator=generator), labels


@pytest.fixture(scope="module")
def known():
    rows, inputs, labels = drawn(3000, 1)
    return Reference.build(rows, labels=labels, inputs=inputs)


def test_pairs_read_as_a_monitor_reads_them(known):
    rows, inputs, _ = drawn(600, 2)
    pairs = Pairs(known, rows, inputs)
    asked = torch.randint(600, (512,), generator=torch.Generator().manual_seed(3))
    assert pairs.usual(asked)
    assert not Pairs(known, rows, inputs + inputs.std(0)).usual(asked)
    got = handed_on(asked, 1.0, torch.Generator())
    assert got[1:].tolist() == asked[:-1].tolist()
    assert handed_on(asked, 0.0, torch.Generator()).equal(asked)
    for answers, abnormal in ((asked, False), (got, True)):
        expected = measure_sample(rows[answers], inputs[asked], known.inputs.reach).input_correlation
        estimate, found = pairs.read(answers, asked)
        assert estimate == pytest.approx(expected.estimate, abs=1e-5)
        assert found == abnormal == (expected.upper < thresholds(known, ROWS)["input_correlation"])


def test_the_laws_draw_what_was_asked_for_and_the_report_counts():
    _, _, labels = drawn(600, 4)
    laws = five(labels, torch.rand(600, generator=torch.Generator().manual_seed(5)), 0)
    assert list(laws) == ["independent", "sessions", "drifting", "unequal sessions", "daylight"]
    for draw in laws.values():
        index = draw(640, 7.5)
        assert index.shape == (640,)
        assert 0 <= int(index.min()) <= int(index.max()) < 600
    text = report([Tally("sessions", 400, 0, 3, 0.41, 200.0, 40, (40, 39))], 0.2, 3.0)
    assert "| sessions | 400 | 0.50 | 0.41 | 0 | 3 | 40 of 40 | 39 of 40 |" in text
    assert "0 false alarms in 400 healthy windows" in text
    assert "0.746%" in text  # 1 - 0.05^(1/400)


def test_answers_handed_on_are_found_without_an_image_that_repeats(known, monkeypatch):
    monkeypatch.setattr("benchmarks.detection.pairs.HEALTHY_ROWS", 2000)
    rows, inputs, _ = drawn(6000, 6)
    found, reason = rows_to_detection(known, rows, inputs, 1)
    assert found is not None
    assert 500 <= found <= 4000
    assert "do not follow their inputs" in reason
