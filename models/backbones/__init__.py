"""Backbones: image -> representation."""

from models.backbones.resnet import ResNet

__all__ = ["ResNet"]
