"""A small, healthy-looking encoder that every room's tests may use."""

import shutil
from collections.abc import Callable
from pathlib import Path

import httpx._config
import hypothesis
import pytest
import torch

from tests.support.order import place

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"promtool": "prometheus", "prometheus": "prometheus"}

# No test is about how fast a machine is: what it waits for may come late, and must come.
for what in ("connect", "read", "write", "pool"):
    setattr(httpx._config.DEFAULT_TIMEOUT_CONFIG, what, 120.0)
hypothesis.settings.register_profile(
    "patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], print_blob=True
)
hypothesis.settings.load_profile("patient")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda it: place(it.path.relative_to(ROOT / "tests").as_posix()))


@pytest.fixture(scope="session")
def small_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a width-4 ResNet-18 with random weights, a reference and a canary, from the sample's images."""
    from models.artifact import Architecture, Artifact, EncoderCard, save
    from models.preprocess import Preprocessing
    from models.references import in_chunks, with_reference
    from training.data import SAMPLE, read_fashion_mnist

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
    basis, held_out = (in_chunks(part, card.preprocessing) for part in (images[:450], images[450:900]))
    artifact = with_reference(Artifact(card, encoder.eval()), basis, held_out, images[900:964], "MIT")
    folder = tmp_path_factory.mktemp("encoders") / "small"
    save(artifact, folder)
    return folder


@pytest.fixture(scope="session")
def tool() -> Callable[[str], str]:
    """tool("promtool") is its path; the test is skipped where it is not installed."""

    def find(name: str) -> str:
        path = shutil.which(name)
        if path is None:
            pytest.skip(f"{name} is not on the PATH (Debian package {PACKAGES.get(name, 'prometheus-alertmanager')})")
        return path

    return find


@pytest.fixture(scope="session")
def deploy() -> Path:
    """The folder deploy/."""
    return ROOT / "deploy"
