"""The papers' SGD protocols on labels: linear evaluation of a frozen encoder, and fine-tuning on few labels.

Chen et al. 2020 (SimCLR), appendices B.6 and B.5: random crops and flips only, Nesterov momentum 0.9, no weight decay
and no warm-up; linear evaluation at rate 0.1 x batch/256 for 90 epochs, fine-tuning at 0.05 x batch/256 for 60 epochs
on 1 % of the labels and 30 on 10 %. The rate falls as a cosine in both. No setting is chosen by a score, so the test
labels cannot leak.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.artifact import Artifact
from models.embedder import Embedder
from training.augment import Augmentation
from training.data import FileSet, Images, ImageSet
from training.data.feed import Stream, seeded
from training.optimizers import cosine
from training.precision import Precision, autocast, choose, scaler
from training.probe import Accuracy, accuracy, few_labels

CROPS = Augmentation(jitter=0.0)
LINEAR, FINE_TUNE = 0.1, 0.05
EPOCHS = {"linear": 90, "finetune_one_percent": 60, "finetune_ten_percent": 30}
SHARES = {"finetune_one_percent": 0.01, "finetune_ten_percent": 0.1}


def sgd_table(
    artifact: Artifact,
    train: Images,
    test: Images,
    device: str = "cpu",
    epochs: int | None = None,
    precision: Precision = "auto",
) -> dict[str, float]:
    """Top-1 and top-5 accuracy by every protocol; `epochs` replaces the papers'.

    Of image files, the few to fine-tune on and the test images are decoded as the encoder takes them and kept in
    memory. Linear evaluation, which is on all of them, is left out. Raises ValueError for shards, and for files without
    labels.
    """
    if not isinstance(train, ImageSet | FileSet):
        raise ValueError("the SGD protocols choose images by label, which tar shards do not allow; use --probes")
    train = train.take(train.labels >= 0)
    if not len(train):
        raise ValueError("these images have no labels to train a classifier on")
    held = in_memory(test, artifact)
    held = held.take(held.labels >= 0)
    if not len(held):
        raise ValueError("these images have no labels to measure a classifier by")
    table: dict[str, float] = {}
    for name, usual in EPOCHS.items():
        if name in SHARES:
            chosen = in_memory(train.take(few_labels(train.labels, SHARES[name])), artifact)
        elif isinstance(train, ImageSet):
            chosen = train
        else:
            continue
        frozen = name == "linear"
        found = supervised(artifact, chosen, held, device, epochs or usual, frozen=frozen, precision=precision)
        table |= {f"sgd_{name}_top1": round(found.top1, 4), f"sgd_{name}_top5": round(found.top5, 4)}
    return table


def in_memory(images: Images, artifact: Artifact) -> ImageSet:
    """The images as the encoder takes them: 150 kB each of 224 x 224 pixels."""
    if isinstance(images, ImageSet):
        return images
    chunks = list(images.chunks(artifact.card.preprocessing))
    return ImageSet(torch.cat([it.images for it in chunks]), torch.cat([it.labels for it in chunks]))


def supervised(
    artifact: Artifact,
    train: ImageSet,
    test: ImageSet,
    device: str = "cpu",
    epochs: int = 90,
    *,
    frozen: bool = True,
    batch_size: int = 256,
    seed: int = 0,
    precision: Precision = "auto",
) -> Accuracy:
    """Train a classifier on the artifact's representation, with the encoder `frozen` or not, and score it on `test`.

    The artifact is not changed. Raises ValueError if its preprocessing takes another size than the images', or if the
    device does not support `precision`.
    """
    card = artifact.card
    where = torch.device(device)
    numbers = choose(precision, where)
    if not train.of_bytes(card.preprocessing.channels):
        raise ValueError(f"images of {train.images.shape[1]} channels; {card.name} takes {card.preprocessing.channels}")
    if train.images.shape[-1] != card.preprocessing.size:
        raise ValueError(f"images of {train.images.shape[-1]} pixels; {card.name} takes {card.preprocessing.size}")
    torch.manual_seed(seed)
    encoder = copy.deepcopy(artifact.encoder).to(where).requires_grad_(not frozen)
    line = nn.Linear(card.dimension, int(train.labels.max()) + 1).to(where)
    nn.init.zeros_(line.weight)
    batch_size = min(batch_size, len(train))
    peak = (LINEAR if frozen else FINE_TUNE) * batch_size / 256
    trained = [p for p in (*encoder.parameters(), *line.parameters()) if p.requires_grad]
    solver = torch.optim.SGD(trained, lr=peak, momentum=0.9, nesterov=True)
    images = train.images.to(where)
    labels = train.labels.to(where)
    scale = [torch.tensor(v, device=where).view(1, -1, 1, 1) for v in (card.preprocessing.mean, card.preprocessing.std)]
    steps = len(train) // batch_size
    scaled = scaler(numbers, where)
    encoder.train(not frozen)
    for epoch in range(epochs):
        order = torch.randperm(len(train), generator=seeded(Stream.ORDER, seed, epoch)).to(where)
        for position in range(steps):
            step = epoch * steps + position
            index = order[position * batch_size :][:batch_size]
            views = (CROPS(images[index], seeded(Stream.VIEWS, seed, step, 0)) - scale[0]) / scale[1]
            solver.param_groups[0]["lr"] = peak * cosine(step, epochs * steps, 0.0)
            with autocast(numbers, where), torch.set_grad_enabled(not frozen):
                h: Tensor = encoder(views)
            loss = F.cross_entropy(line(h.float()), labels[index])
            solver.zero_grad(set_to_none=True)
            scaled.scale(loss).backward()  # type: ignore[no-untyped-call]
            scaled.step(solver)
            scaled.update()
    rows = Embedder(_with(artifact, encoder), device).embed_arrays(test.images)
    with torch.no_grad():
        return accuracy(line(rows.to(where)).cpu(), test.labels)


def _with(artifact: Artifact, encoder: Any) -> Artifact:
    return Artifact(artifact.card, encoder.eval())
