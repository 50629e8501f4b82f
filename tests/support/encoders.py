"""Small random encoders on disk, healthy or broken on purpose."""

from pathlib import Path

import torch

from fullrank import Reference
from models.artifact import Architecture, Artifact, Canary, EncoderCard, save
from models.backbones.resnet import ResNet
from models.embedder import Embedder, normalize
from models.preprocess import Preprocessing
from tests.support.images import SIZE, pictures


def write_encoder(folder: Path, seed: int, *, dead: int = 0, nan: bool = False, width: int = 4) -> Artifact:
    """A random ResNet-18 of `width`; the first `dead` of its dimensions never fire, `nan` makes it overflow."""
    torch.manual_seed(seed)
    architecture = Architecture(name="resnet18", width=width, in_channels=1, stem="3x3")
    encoder: ResNet = architecture.build()
    with torch.no_grad():
        for module in encoder.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None
        # Running statistics of real activations: random filters then spread images about as trained ones do.
        encoder(torch.from_numpy(pictures(256, 3)[:, None]).float() / 63.75 - 2)
        encoder.eval()
        state = encoder.state_dict()
        for name in ("downsample.1", "bn2"):
            state[f"layer4.0.{name}.weight"][:dead] = state[f"layer4.0.{name}.bias"][:dead] = 0
        state["layer4.1.bn2.weight"][:dead] = state["layer4.1.bn2.bias"][:dead] = 0
        if dead:  # what is left fires for every image: a row without direction would be no embedding
            state["layer4.1.bn2.bias"][dead:] += 5
        if nan:
            state["bn1.weight"].mul_(1e38)
    preprocessing = Preprocessing(size=SIZE, resize="stretch", channels=1, mean=(0.5,), std=(0.25,))
    card = EncoderCard(
        name=folder.name, architecture=architecture, preprocessing=preprocessing, dimension=encoder.dimension
    )
    bare = Artifact(card, encoder)
    if nan:
        return save(bare, folder)
    embedder = Embedder(bare)

    def rows(seed: int, count: int) -> torch.Tensor:
        return normalize(embedder.embed(pictures(count, seed)[:, None]))

    images, canary = torch.from_numpy(pictures(64, 99)[:, None]), rows(99, 64)
    reference = Reference.build(rows(1, 512), rows(2, 512), canary=canary, calibrate=False)
    return save(Artifact(card, encoder, reference, Canary(images, canary, "CC0-1.0")), folder)
