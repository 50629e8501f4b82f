# mypy: ignore-errors
"""torchvision: ResNets and a vision transformer."""

from cases.common import Case, Scale, case, imagenet, lively, saver
from cases.resnets import resnet, with_fc
from torch import nn


@case
def torchvision_resnet18(scale: Scale) -> Case:
    model = resnet(scale, "basic", (2, 2, 2, 2), scale.of(4, 64))
    return Case("torchvision", saver(with_fc(model), "resnet18.pth"), imagenet(), model, model)


@case
def torchvision_resnet50(scale: Scale) -> Case:
    from torchvision.transforms._presets import ImageClassification

    model = resnet(scale, width=scale.of(2, 64))
    transform = ImageClassification(crop_size=224, resize_size=232)
    return Case(
        "torchvision", saver(with_fc(model), "resnet50-v2.pth"), transform, model, model, {"settings": {"to": "232"}}
    )


@case
def torchvision_resnext50_32x4d(scale: Scale) -> Case:
    model = resnet(scale, width=scale.of(8, 64), groups=scale.of(2, 32), width_per_group=scale.of(64, 4))
    return Case("torchvision", saver(with_fc(model)), imagenet(), model, model)


@case
def torchvision_wide_resnet50_2(scale: Scale) -> Case:
    model = resnet(scale, width=scale.of(2, 64), width_per_group=128)
    return Case("torchvision", saver(with_fc(model)), imagenet(), model, model)


@case
def torchvision_vit_b_16(scale: Scale) -> Case:
    from torchvision.models import VisionTransformer

    size, width = scale.of(32, 224), scale.of(16, 768)
    model = VisionTransformer(
        image_size=size,
        patch_size=16,
        num_layers=scale.of(2, 12),
        num_heads=max(1, width // 64),
        hidden_dim=width,
        mlp_dim=width * 2,
    )
    lively(model)
    state = model.state_dict()
    model.heads = nn.Identity()
    return Case("torchvision", saver(state), imagenet(size, round(size * 256 / 224)), model, model)
