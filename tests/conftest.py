"""A small, healthy-looking encoder that every room's tests may use."""

from pathlib import Path

import httpx._config
import hypothesis
import pytest
import torch

torch.set_num_threads(1)

# No test is about how fast a machine is: what it waits for may come late, and must come.
for what in ("connect", "read", "write", "pool"):
    setattr(httpx._config.DEFAULT_TIMEOUT_CONFIG, what, 120.0)
hypothesis.settings.register_profile(
    "patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], print_blob=True
)
hypothesis.settings.load_profile("patient")


@pytest.fixture(scope="session")
def small_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a width-4 ResNet-18 with random weights, a reference and a canary, from the sample's images."""
    from models.artifact import Architecture, Artifact, EncoderCard, Preprocessing, save
    from training.data import SAMPLE, read_fashion_mnist
    from training.export import with_reference

    torch.manual_seed(0)
    architecture = Architecture(name="resnet18", width=4, in_channels=1, stem="3x3/2")
    card = EncoderCard(
        name="small",
        architecture=architecture,
        preprocessing=Preprocessing(size=28, resize="stretch", channels=1, mean=(0.286,), std=(0.353,)),
        dimension=32,
        training={"data": "fashion"},
    )
    images = read_fashion_mnist(SAMPLE, "train").images
    encoder = architecture.build()
    with torch.no_grad():  # BatchNorm statistics from real images, else random features hardly vary
        encoder.train()(images[:512].float() / 255)
    artifact = with_reference(Artifact(card, encoder.eval()), images[:450], images[450:900], images[900:964], "MIT")
    folder = tmp_path_factory.mktemp("encoders") / "small"
    save(artifact, folder)
    return folder
