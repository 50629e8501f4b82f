# mypy: ignore-errors
"""Pixels of other libraries' preprocessing against ours, for photographs in every mode that files come in.

    python pixels.py make --images DIR --out DIR      # by the Python that has those libraries; see make.py
    python -m benchmarks.importing.pixels compare DIR

`make` writes the files and, for each pipeline, the pixels (n, 3, s, s) that it makes of them, called as usual:
`Image.open(file).convert("RGB")` for torchvision and timm, the opened file for open_clip and Hugging Face. `compare`
reads the record of the same pipeline as an import would, and prints on how many files the pixels are equal, and the
mean and greatest difference where they are not.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Record = dict[str, Any]
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def files(images: list[Path], out: Path) -> list[Path]:
    """Each photograph in one mode, in turn."""
    out.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    modes: dict[str, Callable[[Image.Image, Path], None]] = {
        "rgb": lambda image, path: image.save(path.with_suffix(".png")),
        "jpeg": lambda image, path: image.save(path.with_suffix(".jpg"), quality=90),
        "grey": lambda image, path: image.convert("L").save(path.with_suffix(".png")),
        "palette": lambda image, path: image.quantize(64).save(path.with_suffix(".png")),
        "cmyk": lambda image, path: image.convert("CMYK").save(path.with_suffix(".jpg"), quality=90),
        "alpha": lambda image, path: _faded(image).save(path.with_suffix(".png")),
        "exif": lambda image, path: image.save(path.with_suffix(".jpg"), quality=90, exif=exif),
        "16 bit": lambda image, path: _deep(image).save(path.with_suffix(".png")),
    }
    for index, path in enumerate(images):
        image = Image.open(path).convert("RGB")
        for mode, write in modes.items():
            write(image, out / f"{mode}-{index:03}.x")
    return sorted(path for path in out.iterdir() if path.suffix in (".png", ".jpg"))


def _faded(image: Image.Image) -> Image.Image:
    ramp = Image.linear_gradient("L").resize(image.size)
    image = image.copy()
    image.putalpha(ramp)
    return image


def _deep(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


def pipelines() -> dict[str, tuple[Record, Callable[[Image.Image], Any], bool]]:
    """By name: the record that says it, the transform, and whether its users convert to RGB first."""
    from open_clip.transform import image_transform
    from timm.data import create_transform
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms._presets import ImageClassification
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
    from transformers.models.clip.image_processing_clip import CLIPImageProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    made: dict[str, tuple[Record, Callable[[Image.Image], Any], bool]] = {}
    for name, to, way in (("V1", 256, "bilinear"), ("V2", 232, "bilinear"), ("bicubic", 256, "bicubic")):
        record = {"size": 224, "to": to, "resize": "short", "interpolation": way, "mean": MEAN, "std": STD, "draft": 0}
        transform = ImageClassification(crop_size=224, resize_size=to, interpolation=InterpolationMode(way))
        made[f"torchvision {name}"] = record, transform, True
    for mode, way, share in (("center", "bicubic", 0.9), ("squash", "bilinear", 1.0), ("border", "bicubic", 0.95)):
        record = {
            "input_size": [3, 224, 224],
            "interpolation": way,
            "crop_pct": share,
            "crop_mode": mode,
            "mean": MEAN,
            "std": STD,
        }
        made[f"timm {mode}"] = record, create_transform(**record), True
    for mode in ("shortest", "longest", "squash"):
        how = {"size": 224, "mean": MEAN, "std": STD, "resize_mode": mode, "interpolation": "bicubic"}
        transform = image_transform(224, is_train=False, mean=MEAN, std=STD, resize_mode=mode, interpolation="bicubic")
        made[f"open_clip {mode}"] = {"preprocess_cfg": how}, transform, False
    processors = {
        "ViT": ViTImageProcessorPil(),
        "CLIP": CLIPImageProcessorPil(),
        "DINOv2": BitImageProcessorPil(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}),
        "ConvNext (ResNet)": ConvNextImageProcessorPil(size={"shortest_edge": 224}),
        "SigLIP": SiglipImageProcessorPil(),
        "CLIP on torchvision": CLIPImageProcessor(),
    }
    for name, processor in processors.items():
        record = json.loads(processor.to_json_string())
        made[f"transformers {name}"] = record, _processed(processor), False
    return made


def _processed(processor: Any) -> Callable[[Image.Image], Any]:
    return lambda image: np.asarray(processor(image, return_tensors="np")["pixel_values"][0])


def make(images: list[Path], out: Path) -> None:
    found = files(images, out / "files")
    (out / "files.json").write_text(json.dumps([path.name for path in found]))
    records: dict[str, Record] = {}
    for name, (record, transform, converts) in pipelines().items():
        records[name] = record
        mean = np.array(record.get("image_mean", MEAN)).reshape(3, 1, 1)
        std = np.array(record.get("image_std", STD)).reshape(3, 1, 1)
        pixels = np.zeros((len(found), 3, 224, 224), np.uint8)
        fails: list[int] = []
        for index, path in enumerate(found):
            image: Image.Image = Image.open(path)
            try:
                values = np.asarray(transform(image.convert("RGB") if converts else image))
                pixels[index] = np.rint((values * std + mean) * 255).clip(0, 255)
            except Exception:  # some of them take no grey or CMYK image, whichever way
                fails.append(index)
        np.savez_compressed(out / f"{name}.npz", pixels=pixels, fails=np.array(fails, np.int64))
        print(name, f"{len(fails)} of {len(found)} files fail", flush=True)
    (out / "records.json").write_text(json.dumps(records))


def compare(folder: Path) -> None:
    from models.importers.records import preprocessing
    from models.preprocess import Preprocessing, decode

    names = json.loads((folder / "files.json").read_text())
    modes = sorted({name.partition("-")[0] for name in names})
    print("| pipeline | " + " | ".join(modes) + " |\n| --- |" + " --- |" * len(modes))
    for name, record in json.loads((folder / "records.json").read_text()).items():
        how = Preprocessing.model_validate(record) if "draft" in record else preprocessing(record, name)
        stored = np.load(folder / f"{name}.npz")
        theirs, fails = stored["pixels"], set(stored["fails"].tolist())
        cells = []
        for mode in modes:
            chosen = [i for i, it in enumerate(names) if it.startswith(f"{mode}-")]
            if all(i in fails for i in chosen):
                cells.append("it fails")
                continue
            apart = [
                np.abs(decode((folder / "files" / names[i]).read_bytes(), how).astype(int) - theirs[i])
                for i in chosen
                if i not in fails
            ]
            differing = [it for it in apart if it.any()]
            text = f"{len(apart) - len(differing)} of {len(apart)}"
            if differing:
                text += (
                    f"; mean {np.mean([it.mean() for it in differing]):.2g}, most {max(it.max() for it in differing)}"
                )
            cells.append(text)
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("make", "compare"))
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--images", type=Path)
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.action == "compare":
        compare(options.folder)
        return
    found = sorted(path for path in options.images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    make(found[:: max(1, len(found) // options.limit)][: options.limit], options.out)


if __name__ == "__main__":
    main()
