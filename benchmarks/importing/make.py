# mypy: ignore-errors
"""Checkpoints of other libraries, with random weights, and what those libraries make of images with them.

Run by a Python of its own that has torchvision, timm, transformers, open_clip_torch, lightly, lightly-train and
stable-pretraining (see docs/measured/imports.md); nothing of this project is imported. Each case becomes a folder: the
checkpoint as its library (or, for FAIR's, as its published layout) writes it, `rows.npy` (n, d) float32 by the
library's own forward pass behind its own preprocessing, and `case.json`.

    python make.py --images DIR --out DIR             # published sizes
    python make.py --tiny --out DIR                   # tiny models and generated images: the fixtures of the tests
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import CASES, Scale
from PIL import Image

BATCH = 8
LARGE = ("timm_resnet50", "open_clip_siglip", "stable_pretraining_resnet18")  # that cannot be made tiny


def generated(folder: Path) -> list[Path]:
    """Images with detail at every scale, of many shapes."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, size in enumerate([(61, 47), (40, 90), (64, 64), (33, 35), (120, 50), (80, 81)]):
        total = np.zeros((size[1], size[0], 3))
        for cells in (2, 4, 8, 16, 32):
            small = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
            total += (np.asarray(small.resize(size, Image.Resampling.BICUBIC)) - 127.5) * (2 / cells**0.7)
        paths.append(folder / f"{index}.png")
        Image.fromarray((127.5 + total / 2).clip(0, 255).astype(np.uint8)).save(paths[-1])
    return paths


@torch.inference_mode()
def make(name: str, scale: Scale, images: list[Path], out: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    made = CASES[name](scale)
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    made.write(folder)
    opened = [Image.open(path).convert("RGB") for path in images]
    inputs = torch.stack([made.transform(image) for image in opened])
    rows = torch.cat([made.rows(inputs[at : at + BATCH]) for at in range(0, len(inputs), BATCH)])
    np.save(folder / "rows.npy", rows.float().numpy())
    library = made.source.partition(" ")[0].partition("'")[0]
    versions = {
        "torchvision": "torchvision",
        "timm": "timm",
        "transformers": "transformers",
        "open_clip": "open_clip_torch",
    }
    versions |= {"lightly": "lightly", "lightly-train": "lightly-train", "stable-pretraining": "stable-pretraining"}
    from importlib.metadata import version

    record = {"source": made.source, "version": version(versions[library]), **made.options}
    (folder / "case.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of photographs; generated ones if absent")
    parser.add_argument("--limit", type=int, default=32)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", nargs="*", default=list(CASES))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.images is None:
        images = generated(options.out / "images")
    else:
        images = sorted(path for path in options.images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
        images = images[:: max(1, len(images) // options.limit)][: options.limit]
        (options.out / "images.json").write_text(json.dumps([str(path) for path in images]))
    failed = 0
    for name in options.only:
        if options.tiny and name in LARGE:
            continue
        try:
            print(name, make(name, Scale(options.tiny), images, options.out), flush=True)
        except Exception as error:  # one library's trouble is not the others'
            failed += 1
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
