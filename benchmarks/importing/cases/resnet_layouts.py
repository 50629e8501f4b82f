# mypy: ignore-errors
"""Layouts of FAIR, luckmatters and solo-learn around torchvision's ResNets."""

import torch
from cases.common import Case, Scale, case, imagenet, lively, prefixed, projector, saver
from cases.resnets import resnet
from torch import nn


@case
def fair_barlow_twins(scale: Scale) -> Case:
    model = resnet(scale, width=scale.of(2, 64))
    state = prefixed("module.backbone.", model.state_dict()) | projector("module.projector.", 32)
    state |= {"module.bn.running_mean": torch.zeros(8)}
    write = saver({"epoch": 3, "model": state, "optimizer": {"state": {}, "param_groups": []}})
    return Case("torchvision (layout: Barlow Twins)", write, imagenet(), model, model)


@case
def fair_vicreg_resnet50x2(scale: Scale) -> Case:
    model = resnet(scale, width=scale.of(8, 128))
    return Case(
        "torchvision (layout: VICReg x2)", saver(model.state_dict(), "resnet50x2.pth"), imagenet(), model, model
    )


@case
def fair_directclr(scale: Scale) -> Case:
    model = resnet(scale, width=scale.of(2, 64))
    write = saver({"backbone": model.state_dict(), "head": {"weight": torch.randn(5, 8)}})
    return Case("torchvision (layout: DirectCLR)", write, imagenet(), model, model)


@case
def simsiam(scale: Scale) -> Case:
    model = resnet(scale, width=scale.of(2, 64))
    state = (
        prefixed("module.encoder.", model.state_dict())
        | projector("module.encoder.fc.", 32)
        | projector("module.predictor.", 8)
    )
    write = saver({"epoch": 1, "arch": "resnet50", "state_dict": state, "optimizer": {}}, "checkpoint_0099.pth.tar")
    return Case("torchvision (layout: SimSiam)", write, imagenet(), model, model)


@case
def moco_v2(scale: Scale) -> Case:
    model, other = resnet(scale, width=scale.of(2, 64)), resnet(scale, width=scale.of(2, 64))
    state = prefixed("module.encoder_q.", model.state_dict()) | projector("module.encoder_q.fc.", 32)
    state |= prefixed("module.encoder_k.", other.state_dict()) | {
        "module.queue": torch.randn(4, 4),
        "module.queue_ptr": torch.zeros(1),
    }
    write = saver({"epoch": 1, "arch": "resnet50", "state_dict": state}, "moco_v2_800ep_pretrain.pth.tar")
    return Case("torchvision (layout: MoCo v2)", write, imagenet(), model, model)


@case
def luckmatters(scale: Scale) -> Case:
    from torchvision import transforms as T

    model = resnet(scale, "basic", (2, 2, 2, 2), scale.of(4, 64))
    model.conv1 = nn.Conv2d(3, scale.of(4, 64), 3, 1, 1, bias=False)
    model.maxpool = nn.Identity()
    lively(model)
    content = {
        "online_network_state_dict": prefixed("encoder.", model.state_dict()) | projector("projetion.net.", 32),
        "target_network_state_dict": prefixed("encoder.", model.state_dict()),
        "predictor_state_dict": projector("layer.", 8),
        "optimizer_state_dict": {},
    }
    transform = T.Compose([T.Resize(32), T.CenterCrop(32), T.ToTensor()])
    return Case("torchvision (layout: luckmatters)", saver(content), transform, model, model)


@case
def solo_learn_cifar(scale: Scale) -> Case:
    from torchvision import transforms as T

    model = resnet(scale, "basic", (2, 2, 2, 2), scale.of(4, 64))
    model.conv1 = nn.Conv2d(3, scale.of(4, 64), 3, 1, 2, bias=False)
    model.maxpool = nn.Identity()
    lively(model)
    state = (
        prefixed("backbone.", model.state_dict())
        | projector("projector.", 32)
        | {"classifier.weight": torch.randn(5, 8)}
    )
    state |= prefixed("momentum_backbone.", model.state_dict())
    transform = T.Compose(
        [T.Resize(32), T.CenterCrop(32), T.ToTensor(), T.Normalize((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))]
    )
    write = saver({"epoch": 1, "state_dict": state, "pytorch-lightning_version": "2.1"}, "byol.ckpt")
    return Case("torchvision (layout: solo-learn)", write, transform, model, model)
