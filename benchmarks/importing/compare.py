"""Import every checkpoint that `make` wrote, and compare our rows with its own library's.

    python -m benchmarks.importing.compare DIR [--only CASE ...]

prints for each case the tensors kept and dropped, the least cosine of an image's two rows, the same after each side's
mean row is taken away (which leaves only what differs between images), the greatest cosine between different images as
a control, and the seconds that the import took.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from models.embedder import Embedder, normalize
from models.importers import Options, import_encoder


@dataclass(frozen=True)
class Comparison:
    """One case: the least cosines between their rows and ours, and what the import did."""

    name: str
    source: str
    architecture: str
    kept: int
    dropped: int
    cosine: float
    centred: float
    control: float
    seconds: float


def compare(folder: Path, images: list[Path]) -> Comparison:
    case: dict[str, Any] = json.loads((folder / "case.json").read_text())
    expected = torch.from_numpy(np.load(folder / "rows.npy")).double()
    start = time.perf_counter()
    options = Options(family=case.get("family", "auto"), settings=case.get("settings", {}))
    artifact, report = import_encoder(folder, options)
    seconds = time.perf_counter() - start
    rows = Embedder(artifact).embed_files(images).double()
    return Comparison(
        folder.name,
        f"{case['source']} {case['version']}",
        report.architecture,
        report.kept,
        sum(entry["count"] for entry in report.dropped.values()),
        least(rows, expected),
        least(rows - rows.mean(0), expected - expected.mean(0)),
        control(expected),
        seconds,
    )


def least(rows: Tensor, expected: Tensor) -> float:
    return float(F.cosine_similarity(rows, expected).min())


def control(rows: Tensor) -> float:
    """The greatest cosine between different images: what a comparison of the wrong rows would give."""
    unit = normalize(rows)
    return float((unit @ unit.T - 2 * torch.eye(len(unit))).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="*")
    options = parser.parse_args()
    listed = options.folder / "images.json"
    images = [Path(it) for it in json.loads(listed.read_text())] if listed.exists() else []
    images = images or sorted((options.folder / "images").glob("*.png"))
    print("| case | library | architecture | kept | dropped | cosine | centred | other images | seconds |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for folder in sorted(it.parent for it in options.folder.glob("*/case.json")):
        if options.only and folder.name not in options.only:
            continue
        try:
            it = compare(folder, images)
        except ValueError as error:
            print(f"| {folder.name} | REFUSED: {error} |", flush=True)
            continue
        figures = f"{it.cosine:.7f} | {it.centred:.7f} | {it.control:.3f} | {it.seconds:.1f}"
        print(f"| {it.name} | {it.source} | {it.architecture} | {it.kept} | {it.dropped} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
