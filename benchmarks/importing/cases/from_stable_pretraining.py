# mypy: ignore-errors
"""stable-pretraining: its module with a backbone and a projector, saved by Lightning's trainer."""

import logging
import tempfile
from pathlib import Path

import torch
from cases.common import Case, Scale, case, imagenet, lively
from torch import nn


def forward(self, batch, stage):
    rows = self.backbone(batch["image"])
    loss = self.projector(rows).square().mean()
    return batch | {"embedding": rows, "loss": loss}


@case
def stable_pretraining_resnet18(scale: Scale) -> Case:
    import stable_pretraining as spt

    backbone = spt.backbone.from_torchvision("resnet18")
    backbone.fc = nn.Identity()
    return _saved(lively(backbone), 512, 224, 256)


@case
def stable_pretraining_vit_tiny(scale: Scale) -> Case:
    import stable_pretraining as spt

    size, to = scale.of(28, 224), scale.of(32, 256)
    small = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": size, "patch_size": 14}
    backbone = spt.backbone.from_timm("vit_tiny_patch16_224", num_classes=0, **(small if scale.tiny else {}))
    made = _saved(lively(backbone), backbone.num_features, size, to)
    made.options = {"settings": {"size": str(size), "to": str(to)} | ({"heads": "2"} if scale.tiny else {})}
    return made


def _saved(backbone: nn.Module, dimension: int, size: int, to: int) -> Case:
    def write(folder: Path) -> None:
        import stable_pretraining as spt
        from lightning.pytorch import Trainer

        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        projector = nn.Sequential(nn.Linear(dimension, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8))
        module = spt.Module(
            backbone=backbone, projector=projector, forward=forward, optim={"optimizer": {"type": "SGD", "lr": 0.0}}
        )
        with tempfile.TemporaryDirectory() as scratch:
            trainer = Trainer(
                max_steps=0,
                accelerator="cpu",
                logger=False,
                enable_checkpointing=False,
                default_root_dir=scratch,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            batch = {"image": torch.zeros(2, 3, size, size)}
            trainer.fit(module, train_dataloaders=[batch])
            trainer.save_checkpoint(folder / "last.ckpt")
        backbone.eval()

    return Case("stable-pretraining", write, imagenet(size, to), backbone, backbone)
