"""The summary of docs/measured/detection.md: its counts are those of the lists behind it. And weights of a graph."""

from collections import Counter, OrderedDict

import pytest
import torch
from torch import nn

from benchmarks.detection.blind import WEAK, blind
from benchmarks.detection.cases import Case, Change, kernels
from benchmarks.detection.imported import GraphWeights
from benchmarks.detection.summary import LISTS, blocks_of, found_in, pages_in, sides, summary
from benchmarks.detection.tables import Line, counted
from models.artifact import Graph
from models.engines.onnx_engine import OnnxEngine
from models.engines.trace import trace
from tools.architecture import ROOT


def line(kind: str, strong: bool, off: str, on: str) -> Line:
    states = {"canary off": Counter({off: 1}), "canary on": Counter({on: 1}), "neither canary nor inputs": Counter()}
    return Line("a case", kind, strong, float("nan"), states)


def test_the_page_shows_what_its_lists_say() -> None:
    page = (ROOT / "docs" / "measured" / "detection.md").read_text()
    assert blocks_of(page)["summary"] == summary((ROOT / LISTS).read_text())


def test_counts_are_read_back_as_they_were_written() -> None:
    lines = [
        line("model", True, "model_fault", "complete_collapse"),
        line("model", True, "healthy", "model_fault"),
        line("model", False, "traffic_shifted", "model_fault"),
        line("traffic", True, "dimensional_collapse", "traffic_narrowed"),
        line("traffic", False, "healthy", "healthy"),
        line("none", True, "healthy", "traffic_shifted"),
    ]
    found = found_in("theirs, fresh", "\n".join(counted(lines, {})))
    assert (found.encoder, found.cases, found.strong_faults) == ("theirs", "fresh", 3)
    assert found.strong == {"canary off": 2, "canary on": 3}
    off, on = found.matrix["canary off"], found.matrix["canary on"]
    assert (off["model", "model"], off["model", "none"], off["model", "traffic"]) == (1, 1, 1)
    assert (off["traffic", "model"], off["traffic", "none"], off["none", "none"]) == (1, 1, 1)
    assert (on["model", "model"], on["traffic", "traffic"], on["none", "traffic"]) == (3, 1, 1)
    assert sides(off) == "1 of 3 (33.3 %)"
    assert sides(on) == "4 of 4 (100 %)"


def test_false_pages_are_read_from_a_sentence() -> None:
    told = (
        "3 false pages in 1,003,520 healthy blocks: 2.99 a million, 95 % interval 0.62 to 8.74. At 20 rows a second "
        "that is at most 21.5 pages a replica and year by counting alone. 80 CPU seconds."
    )
    assert pages_in(told) == ("3", "1,003,520", "8.74", "80")


def test_a_graphs_weights_are_changed_in_the_order_of_use() -> None:
    torch.manual_seed(0)
    last, first = nn.Conv2d(4, 5, 3), nn.Conv2d(3, 4, 3)
    layers = nn.Sequential(OrderedDict(z=first, y=nn.ReLU(), a=last, b=nn.Flatten())).eval()
    pixels = torch.randint(0, 256, (3, 3, 5, 5), dtype=torch.uint8)
    traced, rows = trace(layers, pixels, torch.full((1, 3, 1, 1), 1 / 255), torch.zeros(1, 3, 1, 1))
    names = ("z.weight", "a.weight", "z.bias", "a.bias")
    alphabetical = {name: traced.weights[name] for name in sorted(names)}
    graph = Graph(traced.serialized("weights"), alphabetical)
    weights = GraphWeights(graph)
    kept = [tuple(weight.shape) for weight in kernels(weights)]
    assert kept == [(4, 3, 3, 3), (5, 4, 3, 3)]
    kernels(weights)[-1].mul_(0.5)
    weights.kept[weights.names.index("a.bias")].mul_(0.5)
    halved = OnnxEngine(graph.model, weights.of(graph).weights, 1)(pixels.numpy())
    assert torch.allclose(torch.from_numpy(halved), 0.5 * rows, atol=1e-6)
    assert torch.equal(graph.weights["a.weight"], last.weight)


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32), (3, 50)])
def test_blind_changes_leave_images_images_and_change_them(channels: int, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(20, channels, 6, 6, generator=generator)
    images = (torch.nn.functional.interpolate(noise, size=size, mode="bilinear") * 255).to(torch.uint8)
    seen: dict[str, torch.Tensor] = {}

    class Pixels:
        def __init__(self) -> None:
            self.images, self.generator, self.usual = images, generator, Case("healthy", "none", images, images, images)

        def each_of(self, changes: dict[str, Change]) -> list[Case]:
            seen.update({name: change(images) for name, change in changes.items()})
            return [Case(name, "model", images, images, images) for name in changes]

    cases = blind(Pixels(), None)  # type: ignore[arg-type]
    assert len(cases) == len(seen) + 1 == (24 if channels == 3 else 20)
    assert [case.name for case in cases if not case.strong] == [name for name in seen if name in WEAK]
    assert sum(case.strong for case in cases) == len(cases) - len(WEAK)
    for name, changed in seen.items():
        assert (changed.shape, changed.dtype) == (images.shape, torch.uint8), name
        assert not torch.equal(changed, images), name
