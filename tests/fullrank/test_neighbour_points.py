"""The page that says why the canary names no points of accuracy is made of the committed measurements."""

import json
from pathlib import Path

import torch

from benchmarks.neighbour_points import crossing, errors, lines
from fullrank.neighbours import nearest, squared_distances

ROOT = Path(__file__).parents[2]


def test_the_page_holds_the_tables_of_the_measurements():
    records = [json.loads(it) for it in (ROOT / "benchmarks/neighbour_points.jsonl").read_text().splitlines()]
    assert "\n".join(lines(records)) in (ROOT / "docs/measured/neighbour-points.md").read_text()


def test_a_loss_that_is_a_function_of_the_measure_is_predicted_and_another_is_not():
    kept = [i / 40 for i in range(41)]
    alike = [{"encoder": f"e{i % 3}", "neighbours_overlap": it, "new": 40 * (1 - it)} for i, it in enumerate(kept)]
    assert all(float(it.abs().max()) <= 3 for it in errors(alike, "neighbours_overlap", "new").values())
    for it in alike:
        it["new"] *= 1 + (it["encoder"] == "e1")
    assert float(errors(alike, "neighbours_overlap", "new")["e1"].abs().max()) > 10


def test_neighbours_across_a_fault_see_a_rotation_that_the_canarys_own_do_not():
    generator = torch.Generator().manual_seed(0)
    stored = torch.nn.functional.normalize(torch.randn(200, 16, generator=generator))
    near = nearest(squared_distances(stored))
    turned = stored @ torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    assert crossing(stored, stored, near) == 1
    assert crossing(stored, turned, near) < 0.3
