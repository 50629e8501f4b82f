"""lightly's own SimCLR loop, as its example for PyTorch is written, around this project's ResNet.

Its transform on PIL images in a DataLoader, its projection head, its NT-Xent loss, one forward pass a view, float32 in
torch's default memory format, SGD. Only the backbone is ours, so that both loops train the same network.
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from models.preprocess import to_image
from training.data import SOURCES, ImageSet
from training.recipes import Recipe


class Views(Dataset[list[Tensor]]):
    def __init__(self, images: ImageSet, transform: Any) -> None:
        self.images = [to_image(image) for image in images.images]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[Tensor]:
        views: list[Tensor] = self.transform(self.images[index])
        return views


class Lightly:
    """`source` yields both views of a batch, `train_step` takes them. ImportError where lightly does not load."""

    def __init__(self, folder: str, recipe: Recipe, images: ImageSet, device: torch.device, workers: int) -> None:
        sys.path.insert(0, folder)
        from lightly.loss import NTXentLoss  # type: ignore[import-not-found]
        from lightly.models.modules.heads import SimCLRProjectionHead  # type: ignore[import-not-found]
        from lightly.transforms import SimCLRTransform  # type: ignore[import-not-found]

        self.recipe, self.device = recipe, device
        self.backbone: Any = recipe.architecture.build()
        head: nn.Module = SimCLRProjectionHead(self.backbone.dimension, self.backbone.dimension, 128)
        self.model = nn.Sequential(self.backbone, head).to(device).train()
        self.criterion = NTXentLoss()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.06)
        transform = SimCLRTransform(input_size=SOURCES[recipe.data].size, gaussian_blur=0.0)
        self.loader = DataLoader(
            Views(images, transform),
            batch_size=recipe.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            persistent_workers=workers > 0,
        )

    def source(self) -> Iterator[Tensor]:
        while True:
            for views in self.loader:
                yield torch.stack(views[:2])

    def train_step(self, views: Tensor) -> Tensor:
        """One step on (2, n, c, h, w) views; the loss."""
        first, second = (self.model(view.to(self.device)) for view in views)
        loss: Tensor = self.criterion(first, second)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()
