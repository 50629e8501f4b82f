"""Lightning checkpoints around a `backbone`: lightly's examples and benchmarks, solo-learn, stable-pretraining."""

from models.importers import huggingface
from models.importers.base import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Checkpoint,
    Family,
    Found,
    Questions,
    Tensors,
    Weights,
    imagenet,
    small,
    take,
)
from models.importers.layouts import canonical

MOMENTUM = ("momentum_backbone.", "teacher_backbone.", "backbone_momentum.", "momentum_encoder.")
REASONS = {
    "projection_head": "the projector",
    "prediction_head": "the predictor",
    "projector": "the projector",
    "predictor": "the predictor",
    "momentum_": "the momentum network",
    "teacher_": "the momentum network",
    "backbone_momentum": "the momentum network",
    "online_classifier": "the online classifier",
    "classifier": "the online classifier",
    "criterion": "the loss",
    "prototypes": "the prototypes",
    "queue": "the queue of negatives",
    "callbacks_": "a probe",
    "linear": "a probe",
    "knn": "a probe",
}
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)


def _names(checkpoint: Checkpoint) -> Tensors:
    return checkpoint.state()


def _numbered(names: Tensors) -> bool:
    return "backbone.0.weight" in names or ("0.weight" in names and "1.running_mean" in names)


def is_lightly(checkpoint: Checkpoint) -> bool:
    names = _names(checkpoint)
    heads = any(
        it.startswith(("projection_head", "prediction_head", "teacher_backbone", "student_projection")) for it in names
    )
    return _numbered(names) or (heads and any(it.startswith("backbone.") for it in names))


def is_solo(checkpoint: Checkpoint) -> bool:
    names = _names(checkpoint)
    return "classifier.weight" in names and any(
        it in names for it in ("backbone.conv1.weight", "encoder.conv1.weight", "backbone.patch_embed.proj.weight")
    )


def is_any(checkpoint: Checkpoint) -> bool:
    names = _names(checkpoint)
    wanted: tuple[str, ...] = (
        "conv1.weight",
        "patch_embed.proj.weight",
        "conv_proj.weight",
        "embedder.embedder.convolution.weight",
        "embeddings.patch_embeddings.projection.weight",
    )
    return any(name.startswith("backbone.") and name.endswith(wanted) for name in names)


def _found(checkpoint: Checkpoint, questions: Questions) -> Found:
    tensors = _names(checkpoint)
    momentum = next((it for it in MOMENTUM if any(name.startswith(it) for name in tensors)), None)
    available: tuple[Weights, ...] = ("online", "ema") if momentum else ("online",)
    chosen = questions.which(available, "online")
    online = next((it for it in ("backbone.", "encoder.") if any(name.startswith(it) for name in tensors)), "")
    if chosen == "ema" and momentum is not None:
        reasons = {part: why for part, why in REASONS.items() if not momentum.startswith(part)}
        kept, dropped = take(tensors, momentum, reasons | {online: "the online network"})
    else:
        kept, dropped = take(tensors, online, REASONS if online else {})
    found = canonical(huggingface.bare(kept))
    found.dropped |= dropped
    found.weights = chosen
    if found.kind == "vit":
        found.resample = {"antialias": True}
        found.facts |= {"activation": "gelu"}
    return found


def lightly(checkpoint: Checkpoint, questions: Questions) -> Found:
    found = _found(checkpoint, questions)
    tiny = found.kind == "resnet" and found.tensors["conv1.weight"].shape[-1] == 3
    found.preprocessing = small(IMAGENET_MEAN, IMAGENET_STD) if tiny else imagenet()
    found.origin = "lightly's for CIFAR (32, ImageNet's mean)" if tiny else "lightly's evaluation (256, 224, bilinear)"
    return found


def solo(checkpoint: Checkpoint, questions: Questions) -> Found:
    found = _found(checkpoint, questions)
    found.facts |= {"small_stem": "3x3+2"} if found.kind == "resnet" else {}
    tiny = found.kind == "resnet" and found.tensors["conv1.weight"].shape[-1] == 3
    found.preprocessing = small(CIFAR_MEAN, CIFAR_STD) if tiny else imagenet()
    found.origin = "solo-learn's for CIFAR (32)" if tiny else "solo-learn's evaluation (256, 224, bilinear)"
    return found


def stable(checkpoint: Checkpoint, questions: Questions) -> Found:
    found = _found(checkpoint, questions)
    found.preprocessing = imagenet()
    found.origin = "ImageNet's (256, 224, bilinear)"
    return found


LIGHTLY = Family("lightly", "lightly's examples and benchmarks", is_lightly, lightly)
SOLO = Family("solo-learn", "solo-learn", is_solo, solo)
STABLE = Family("stable-pretraining", "stable-pretraining, and other modules with a backbone", is_any, stable)
