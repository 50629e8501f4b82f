"""The kNN table: raw pixels beside every encoder, with the spectrum of what each serves.

    python -m benchmarks.encoders [FOLDER ...] [--data DIR]

Weighted kNN (k = 20, temperature 0.07), bank 60,000 training images, queries 10,000 test images of Fashion-MNIST. The
projection's effective rank was measured by the training run on the same test images; projectors are not shipped.
"""

import argparse
from pathlib import Path
from typing import Any

from models.artifact import load
from tools.demo import COLLAPSED, PRETRAINED
from training.data import load_data
from training.evaluate import evaluate, evaluate_pixels


def row(name: str, epochs: object, quality: dict[str, Any], projection: dict[str, Any] | None) -> str:
    cells = [
        name,
        epochs,
        f"{quality['knn']:.2%}",
        f"{quality['effective_rank']:.1f} of {quality['dimension']}",
        f"{quality['participation_ratio']:.1f}",
        f"{quality['total_variance']:.3f}",
        f"{projection['effective_rank']:.1f} of {projection['dimension']}" if projection else "",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoders", nargs="*", type=Path, default=[*sorted(PRETRAINED.iterdir()), COLLAPSED])
    parser.add_argument("--data", type=Path)
    arguments = parser.parse_args()
    train, test = load_data("fashion", arguments.data)
    print("| encoder | epochs | kNN | effective rank | participation ratio | total variance | rank of the projection |")
    print("|---|---|---|---|---|---|---|")
    print(row("raw pixels", "", evaluate_pixels(train, test), None), flush=True)
    for folder in arguments.encoders:
        artifact = load(folder)
        quality, card = evaluate(artifact, train, test), artifact.card
        print(row(card.name, card.training.get("epochs", "?"), quality, card.quality.get("projection")), flush=True)


if __name__ == "__main__":
    main()
