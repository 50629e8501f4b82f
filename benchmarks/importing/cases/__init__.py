# mypy: ignore-errors
"""The cases, one file a library or layout. Each registers itself in common.CASES, in this order."""

from cases import (
    dinov2,
    from_hugging_face,
    from_lightly,
    from_open_clip,
    from_stable_pretraining,
    from_timm,
    from_torchvision,
    resnet_layouts,
    vit_layouts,
)
from cases.common import CASES, Scale

__all__ = [
    "CASES",
    "Scale",
    "dinov2",
    "from_hugging_face",
    "from_lightly",
    "from_open_clip",
    "from_stable_pretraining",
    "from_timm",
    "from_torchvision",
    "resnet_layouts",
    "vit_layouts",
]
