"""What the table of methods says about its runs follows from them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import experiments
from benchmarks._experiments_cases import EXPERIMENTS
from benchmarks._experiments_cases import recipe_of as experiment_recipe
from benchmarks._experiments_page import page as experiments_page
from benchmarks._experiments_page import spaced
from benchmarks._experiments_page import table as experiments_table
from benchmarks._methods_claims import CLAIMS, REASONS, Claim, knn
from benchmarks._methods_configurations import SCALES, TWINS, configurations, recipe_of
from benchmarks._methods_page import fallen, page, summary
from benchmarks.encoders import PIXELS
from benchmarks.methods import pixel_record, run, twin_records
from benchmarks.methods_picture import picture
from training.data import SAMPLE, load_data
from training.methods import METHODS, build

CLAIM = Claim("a over b", "someone", knn, "a", "b")


def records(a: list[float], b: list[float]) -> list[dict[str, object]]:
    return [{"name": name, "seed": s, "knn": x} for name, xs in (("a", a), ("b", b)) for s, x in enumerate(xs)]


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        ([0.8, 0.7], [0.6, 0.5], "75 against 55 (20.0 ± 0.0): seen"),
        ([0.5, 0.5], [0.6, 0.6], "50 against 60 (-10.0 ± 0.0): **not seen**"),
        ([0.8, 0.5], [0.6, 0.6], "65 against 60 (5.0 ± 15.0): **unclear**, the seeds disagree"),
        ([0.8, 0.8], [], "not measured"),
        ([0.8], [0.6, 0.99], "80 against 60 (20.0): seen"),
        ([0.62, 0.72], [0.6, 0.6], "67 against 60 (7.0 ± 5.0): **unclear**, chance alone makes gaps of 10.0"),
        ([0.63], [0.6], "63 against 60 (3.0): **unclear**, chance alone makes gaps of 3.6"),
        ([0.63] * 4, [0.6] * 4, "63 against 60 (3.0 ± 0.0): seen"),
    ],
)
def test_a_claim_is_seen_only_if_every_seed_shows_it_and_chance_does_not(
    a: list[float], b: list[float], verdict: str
) -> None:
    assert CLAIM.verdict(records(a, b)) == verdict


def test_an_accuracy_below_the_untrained_twins_counts_for_nothing() -> None:
    twin = [{"name": TWINS["initial"], "seed": s, "knn": x} for s, x in enumerate((0.7, 0.72))]
    assert CLAIM.verdict([*records([0.8, 0.7], [0.6, 0.5]), *twin]).endswith(": seen")
    said = CLAIM.verdict([*records([0.7, 0.7], [0.6, 0.5]), *twin])
    assert said.endswith(": not counted, both below the untrained twin's 71")
    said = replace(CLAIM, tolerance=2).verdict([*records([0.8, 0.8], [0.6, 0.5]), *twin])
    assert said.endswith(": not counted, the second below the untrained twin's 71")


def test_parity_is_of_the_means_and_to_be_better_is_no_fault() -> None:
    level = replace(CLAIM, tolerance=2)
    assert level.verdict(records([0.81] * 4, [0.81] * 4)).endswith(": seen")
    assert level.verdict(records([0.80, 0.80], [0.85, 0.84])).endswith("**unclear**, chance alone makes gaps of 2.5")
    assert level.verdict(records([0.80, 0.80], [0.85, 0.86])).endswith("**not seen**")
    assert level.verdict(records([0.85, 0.84], [0.80, 0.80])).endswith(": seen")
    assert level.verdict(records([0.80, 0.82], [0.82, 0.80])).endswith("**unclear**, chance alone makes gaps of 4.0")


def test_a_run_that_diverged_counts_for_nothing() -> None:
    broken = {"name": "a", "seed": 1, "error": "the loss is nan"}
    assert CLAIM.verdict([*records([0.8], [0.6, 0.5]), broken]) == "80 against 60 (20.0): seen"
    assert "| SimCLR | diverged |" in page("small", [{**broken, "name": "SimCLR"}])
    assert "| SimCLR | not run |" in page("small", [])


def test_a_cell_holds_the_mean_and_its_standard_error() -> None:
    assert summary(knn, [{"knn": 0.5}], 1) == "50.0"
    assert summary(knn, [{"knn": 0.5}, {"knn": 0.7}], 1) == "60.0 ± 10.0"


def test_a_spectrum_is_read_between_its_recorded_ranks() -> None:
    ranks = [1, 4, 16, 64]
    spectrum = {"dimension": 64, "ranks": ranks, "eigenvalues": [3 * rank**-2.0 for rank in ranks]}
    assert fallen(spectrum, 0.5) == pytest.approx(32**-2)
    assert fallen(spectrum, 1.0) == pytest.approx(64**-2)


def test_a_claim_counts_the_seeds_that_both_sides_have() -> None:
    assert CLAIM.seeds(records([0.8, 0.7, 0.9], [0.6, 0.5])) == [0, 1]


def test_claims_name_configurations_and_configurations_cover_the_methods() -> None:
    for scale in SCALES.values():
        table = configurations(scale)
        names = [each.name for each in table]
        assert len(names) == len(set(names))
        assert {each.method for each in table} == set(METHODS)
        assert {name for claim in CLAIMS + REASONS for name in (claim.first, claim.second)} <= {*names, *TWINS.values()}
        for each in configurations(replace(scale, width=2, wide=8)):
            recipe = recipe_of(each, replace(scale, width=2, wide=8), seed=1)
            build(recipe.method, recipe.architecture.build(), recipe.options)


def test_a_run_measures() -> None:
    scale = replace(SCALES["small"], width=4, images=128, tests=64, epochs=1, wide=16)
    threads = torch.get_num_threads()
    chosen = next(each for each in configurations(scale) if each.name == "DirectPred")
    record = run(chosen, scale, 0, load_data("fashion", SAMPLE), "cpu")  # type: ignore[arg-type]
    torch.set_num_threads(threads)
    assert 0 <= record["knn"] <= 1
    assert record["h"]["dimension"] == 32
    assert record["z"]["dimension"] == 128
    assert record["alignment"] > 0.99
    both = twin_records(scale, 0, load_data("fashion", SAMPLE), "cpu")  # type: ignore[arg-type]
    assert [each["name"] for each in both] == list(TWINS.values())
    assert 0 <= both[0]["z"]["dead"] <= 128
    bare = pixel_record(scale, load_data("fashion", SAMPLE))  # type: ignore[arg-type]
    cells = f"| {100 * bare['knn']:.1f} | {100 * bare['linear']:.1f} |"
    assert f"| {PIXELS[1]} {cells}" in page("small", [bare, *both, record])


def test_dead_dimensions_are_those_far_below_the_largest() -> None:
    rows = torch.randn(4000, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 1, 0.05, 3e-3, 3e-4, 0])
    found = experiments.geometry(rows, rows)
    assert (found["h"]["dead"], found["z"]["dead"]) == (3, 2)


def test_every_experiment_can_be_built_and_says_what_it_costs() -> None:
    for letter, experiment in EXPERIMENTS.items():
        small = replace(experiment, width=2)
        for case in experiment.cases:
            chosen = experiment_recipe(small, case, seed=1)
            options = {key: value for key, value in chosen.options.items() if key != "d0"}
            build(chosen.method, chosen.architecture.build(), options)
        assert f"python -m benchmarks.experiments {letter}`" in experiments_page([])
        assert experiment.gpu_hours > 0


def test_an_experiment_is_measured_beside_both_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    small = replace(EXPERIMENTS["C"], width=4, images=700, epochs=1)
    monkeypatch.setitem(EXPERIMENTS, "C", small)
    record = experiments.run("C", small.cases[0], 0, load_data("fashion", SAMPLE), "cpu")  # type: ignore[arg-type]
    torch.set_num_threads(threads)
    assert len(record["epochs"]) == 1
    assert "finetune_one_percent" not in record
    lines = experiments_table("C", [record])
    assert lines[3].startswith("| raw pixels, mean taken off | ")
    assert lines[4].startswith("| untrained, initial statistics | ")
    assert "of 32 |" in lines[6]
    assert "1 of 18 runs" in experiments_page([record])


def test_a_long_course_is_shown_by_ten_epochs() -> None:
    assert [it["epoch"] for it in spaced([{"epoch": epoch} for epoch in range(1, 81)])] == [
        1,
        10,
        19,
        27,
        36,
        45,
        54,
        62,
        71,
        80,
    ]
    assert [it["epoch"] for it in spaced([{"epoch": epoch} for epoch in range(1, 10)])] == list(range(1, 10))


def test_with_few_labels_the_twins_are_fine_tuned_too(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    small = replace(EXPERIMENTS["I"], width=4, images=700, epochs=1)
    monkeypatch.setitem(EXPERIMENTS, "I", small)
    monkeypatch.setitem(experiments.SHARES, "finetune_one_percent", 0.2)  # enough rows for the probe of pixels
    monkeypatch.setitem(experiments.SHARES, "finetune_ten_percent", 0.4)
    monkeypatch.setitem(experiments.EPOCHS, "finetune_one_percent", 2)
    monkeypatch.setitem(experiments.EPOCHS, "finetune_ten_percent", 2)
    record = experiments.run("I", small.cases[2], 0, load_data("fashion", SAMPLE), "cpu")  # type: ignore[arg-type]
    torch.set_num_threads(threads)
    for row in (record, record["pixels"], record["untrained_initial"], record["untrained_measured"]):
        assert 0.05 < row["finetune_one_percent"] <= 1
        assert 0.05 < row["finetune_ten_percent"] <= 1
    assert "| 1 % of labels | 10 % |" in experiments_table("I", [record])[1]
    without = {"linear": record["pixels"]["linear"] + 0.1, "knn": 0.5}
    other = record | {"experiment": "C", "pixels": without}
    again = experiments.with_pixels("I", [record | {"pixels": without}, other], load_data("fashion", SAMPLE))  # type: ignore[arg-type]
    assert [it["pixels"] for it in again] == [record["pixels"], without]


def test_equal_steps_are_equal() -> None:
    cases = EXPERIMENTS["H"].cases
    assert {(case.epochs or 0) * 256 / case.settings["batch_size"] for case in cases} == {20}
    assert len({case.name for case in cases}) == 20


def test_a_run_that_another_experiment_has_made_is_not_made_again() -> None:
    done = [{"experiment": "G", "name": case.name, "seed": 0, "knn": 0.5} for case in EXPERIMENTS["G"].cases]
    taken = [experiments.made_before("H", case, 0, done) for case in EXPERIMENTS["H"].cases]
    expected = [case.settings["batch_size"] == 256 for case in EXPERIMENTS["H"].cases]
    assert [it is not None for it in taken] == expected
    assert {(it["experiment"], it["knn"]) for it in taken if it} == {("H", 0.5)}
    assert experiments.made_before("H", EXPERIMENTS["H"].cases[8], 1, done) is None
    assert experiments.made_before("I", EXPERIMENTS["I"].cases[0], 0, done) is None


def test_the_picture_draws_every_method_that_has_a_spectrum() -> None:
    rows = torch.randn(400, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -6, 16)
    names = ["SIGReg", "SimCLR", *TWINS.values()]
    records = [{"name": name, "seed": 0, **experiments.geometry(rows, rows[:, :8], curves=True)} for name in names]
    for axes, dimension in zip(picture(records).axes, (16, 8), strict=True):
        lines = {line.get_label(): line for line in axes.get_lines()}
        assert set(names) <= set(lines)
        assert "BYOL" not in lines
        x, shares = (np.asarray(each) for each in lines["SIGReg"].get_data())
        assert shares[0] == 1
        assert (np.diff(shares) <= 0).all()
        assert x[0] == pytest.approx(1 / dimension)
