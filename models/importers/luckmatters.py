"""luckmatters (DirectPred): an online and a target network around a ResNet."""

from models.importers.base import Checkpoint, Family, Found, Questions, Weights, imagenet, small, take
from models.importers.layouts import canonical

PARTS: dict[Weights, str] = {"online": "online_network_state_dict", "ema": "target_network_state_dict"}


def claims(checkpoint: Checkpoint) -> bool:
    return any(checkpoint.tensors(part) for part in PARTS.values())


def translate(checkpoint: Checkpoint, questions: Questions) -> Found:
    available = tuple(key for key, part in PARTS.items() if checkpoint.tensors(part))
    chosen = questions.which(available or ("online",), "online" if "online" in available else "ema")
    kept, dropped = take(
        checkpoint.tensors(PARTS[chosen]), "encoder.", {"projetion.": "the projector", "projection.": "the projector"}
    )
    found = canonical(kept)
    found.dropped |= dropped
    for key, part in PARTS.items():
        if key != chosen:
            found.dropped |= {f"{part}.{name}": f"the {key} network" for name in checkpoint.tensors(part)}
    found.dropped |= {
        f"predictor_state_dict.{it}": "the predictor" for it in checkpoint.tensors("predictor_state_dict")
    }
    found.weights = chosen
    tiny = found.tensors["conv1.weight"].shape[-1] == 3
    # As far as is known, its own data pipeline only scales pixels to 0 to 1. So this is noted as assumed.
    found.preprocessing = small((0.0,) * 3, (1.0,) * 3) if tiny else imagenet()
    found.origin = "pixels of 0 to 1 at 32 x 32" if tiny else "ImageNet's (256, 224, bilinear)"
    return found


FAMILY = Family("luckmatters", "luckmatters (DirectPred)", claims, translate)
