"""Backbones: image -> representation."""

from models.backbones.encoder import Encoder
from models.backbones.resnet import ResNet
from models.backbones.vit import ViT

__all__ = ["Encoder", "ResNet", "ViT"]
