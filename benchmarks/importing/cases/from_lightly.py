# mypy: ignore-errors
"""lightly and lightly-train."""

import numpy as np
import torch
from cases.common import Case, Scale, case, imagenet, lively, prefixed, projector, saver
from cases.dinov2 import dinov2
from cases.resnets import resnet
from PIL import Image
from torch import Tensor, nn


@case
def lightly_example(scale: Scale) -> Case:
    from lightly.models.modules import SimCLRProjectionHead

    whole = resnet(scale, "basic", (2, 2, 2, 2), scale.of(4, 64))
    model = nn.Sequential(*list(whole.children())[:-1])
    head = SimCLRProjectionHead(scale.of(32, 512), 16, 8)
    state = prefixed("backbone.", model.state_dict()) | prefixed("projection_head.", head.state_dict())
    write = saver({"state_dict": state, "pytorch-lightning_version": "2.1"}, "simclr.ckpt")
    return Case("lightly", write, imagenet(), lambda x: model(x).flatten(1), model)


@case
def lightly_cifar(scale: Scale) -> Case:
    from lightly.models import ResNetGenerator

    whole = ResNetGenerator("resnet-18", width=scale.of(1, 16) / 16, num_splits=2)
    model = nn.Sequential(*list(whole.children())[:-1], nn.AdaptiveAvgPool2d(1))
    lively(model)
    model.train()
    model.eval()
    state = prefixed("backbone.", {k: v.clone() for k, v in model.state_dict().items()}) | projector(
        "projection_head.", 16
    )
    return Case("lightly", saver({"state_dict": state}), imagenet(32, 32), lambda x: model(x).flatten(1), model)


@case
def lightly_train_dinov2(scale: Scale) -> Case:
    made = dinov2(scale, 0, 0, "mlp")
    size = scale.of(28, 224)

    def transform(image: Image.Image) -> Tensor:
        import albumentations as A

        steps = A.Compose([A.Resize(size, size), A.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
        return torch.from_numpy(steps(image=np.asarray(image.convert("RGB")))["image"].transpose(2, 0, 1))

    made.transform, made.source = transform, "lightly-train"
    made.options = {"family": "lightly-train", "settings": {"size": str(size)} | ({"heads": "2"} if scale.tiny else {})}
    made.write = saver(made.module.state_dict(), "exported_last.pt")
    return made
