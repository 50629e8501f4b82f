"""Reads preprocessing from the config files of timm, Hugging Face (preprocessor_config.json) and open_clip."""

import math
from collections.abc import Mapping
from typing import Any

from models.importers.base import HALF, IMAGENET_MEAN, IMAGENET_STD, ImportRefusedError
from models.preprocess import Preprocessing

OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PILLOW = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


def preprocessing(record: Any, where: str) -> Preprocessing:
    """The preprocessing in a record of one of these three kinds. Raises ImportRefusedError, naming `where`."""
    if isinstance(record, Mapping):
        try:
            if "preprocess_cfg" in record or "resize_mode" in record:
                return _open_clip(record)
            if "do_resize" in record or "image_processor_type" in record or "feature_extractor_type" in record:
                return _hugging_face(record)
            if "pretrained_cfg" in record or "crop_pct" in record or "input_size" in record:
                return _timm(record)
        except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
            if isinstance(error, ImportRefusedError):
                raise
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ImportRefusedError(f"{where}: this preprocessing cannot be read: {reason}") from error
    kinds = "timm's config.json, Hugging Face's preprocessor_config.json and open_clip's open_clip_config.json"
    raise ImportRefusedError(f"{where} is none of {kinds}")


def is_timm(record: Any) -> bool:
    return isinstance(record, Mapping) and ("pretrained_cfg" in record or "architecture" in record)


def _timm(record: Mapping[str, Any]) -> Preprocessing:
    """timm's preprocessing (timm.data.transforms_imagenet_eval): resize to size / crop_pct, then centre crop."""
    how = record.get("pretrained_cfg") or record
    size = _square(how.get("input_size", (3, 224, 224))[-2:])
    scaled = math.floor(size / (how.get("crop_pct") or 0.875))
    mean = tuple(how.get("mean", IMAGENET_MEAN))
    mode = how.get("crop_mode") or "center"
    if mode not in ("center", "squash", "border"):
        raise ImportRefusedError(f"crop_mode {mode!r} is none of center, squash, border")
    values: dict[str, Any] = {"interpolation": how.get("interpolation", "bicubic"), "mean": mean}
    if mode == "border":
        values["fill"] = tuple(round(255 * it) for it in mean)
    return _made(
        size,
        scaled,
        {"center": "short", "squash": "squash", "border": "pad"}[mode],
        std=how.get("std", IMAGENET_STD),
        **values,
    )


def _open_clip(record: Mapping[str, Any]) -> Preprocessing:
    how = record.get("preprocess_cfg") or {}
    if "resize_mode" in record:
        how = record
    model = record.get("model_cfg", {}).get("vision_cfg", {})
    size = _square(how.get("size") or model.get("image_size", 224))
    mode = how.get("resize_mode") or "shortest"
    values: dict[str, Any] = {"interpolation": how.get("interpolation") or "bicubic"}
    if mode == "longest":
        fill = how.get("fill_color", 0)
        values["fill"] = tuple(fill) if isinstance(fill, list | tuple) else (int(fill),) * 3
    return _made(
        size,
        size,
        {"shortest": "short", "longest": "pad", "squash": "squash"}[mode],
        mean=how.get("mean") or OPENAI_MEAN,
        std=how.get("std") or OPENAI_STD,
        **values,
    )


def _hugging_face(how: Mapping[str, Any]) -> Preprocessing:
    """The preprocessing of transformers' image processor on Pillow. Its torchvision processor resizes differently."""
    kind = str(how.get("image_processor_type") or how.get("feature_extractor_type") or "")
    if not how.get("do_resize", True):
        raise ImportRefusedError("do_resize is false, so that images of any size come in; give the size in a record")
    size = how.get("size", 224)
    crop = how.get("crop_size") if how.get("do_center_crop", "crop_size" in how) else None
    values: dict[str, Any] = {
        "interpolation": PILLOW[int(how.get("resample", 2))],
        "centre": "floor",
        "mean": how.get("image_mean", HALF) if how.get("do_normalize", True) else (0.0,) * 3,
        "std": how.get("image_std", HALF) if how.get("do_normalize", True) else (1.0,) * 3,
        "scale": float(how.get("rescale_factor", 1 / 255)) if how.get("do_rescale", True) else 1.0,
    }
    if isinstance(size, int):
        size = {"shortest_edge": size} if crop is not None else {"height": size, "width": size}
    if "ConvNext" in kind and "shortest_edge" in size:
        short = int(size["shortest_edge"])
        if short >= 384:
            return _made(short, short, "squash", **values)
        return _made(short, int(short / how.get("crop_pct", 224 / 256)), "short", **values)
    if "shortest_edge" in size:
        short = int(size["shortest_edge"])
        return _made(_square(crop) if crop is not None else short, short, "short", **values)
    side = _square((size["height"], size["width"]))
    return _made(_square(crop) if crop is not None else side, side, "squash", **values)


def _square(size: Any) -> int:
    """The side of a size, which is an int, a pair or a mapping. Raises ImportRefusedError if it is not square."""
    if isinstance(size, int):
        return size
    sides = [int(size[key]) for key in ("height", "width")] if isinstance(size, Mapping) else [int(it) for it in size]
    if len(set(sides)) != 1:
        raise ImportRefusedError(f"an input of {' x '.join(map(str, sides))} pixels; only square ones are supported")
    return sides[0]


def _made(size: int, to: int, resize: str, **values: Any) -> Preprocessing:
    values |= {"mean": tuple(values["mean"]), "std": tuple(values["std"])}
    return Preprocessing.model_validate({"size": size, "to": to, "resize": resize, "draft": 0} | values)
