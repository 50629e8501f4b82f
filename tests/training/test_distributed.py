"""Two processes on half a batch each, started by torchrun, do what one does on the whole batch."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.support.distributed import CASES, operations, train
from training import distributed


@pytest.fixture(scope="module")
def two_processes(torchrun: Path) -> dict[str, Tensor]:
    return load_file(torchrun / "steps.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_two_processes_take_the_steps_of_one_on_the_joint_batch(name: str, two_processes: dict[str, Tensor]) -> None:
    alone = train(name)
    assert {"grad encoder.0.weight", "state encoder.3.running_var"} <= alone.keys()
    assert sum(value.abs().sum() for key, value in alone.items() if key.startswith("grad ")) > 1e-3
    for key, value in alone.items():
        torch.testing.assert_close(two_processes[f"{name}/{key}"], value, rtol=1e-8, atol=1e-10, msg=f"{name}: {key}")


def test_collectives_and_batch_norm_are_exact_adjoints(two_processes: dict[str, Tensor]) -> None:
    for key, value in operations().items():
        torch.testing.assert_close(two_processes[f"operations/{key}"], value, rtol=1e-12, atol=1e-12, msg=key)


def test_alone_everything_is_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert distributed.setup("cpu") == torch.device("cpu")
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    x = torch.ones(3)
    assert distributed.gather(x) is x
    assert distributed.all_reduce(x) is x
    model = nn.Sequential(nn.BatchNorm1d(3))
    norm = model[0]
    assert distributed.synchronise(model)[0] is norm  # type: ignore[index]
    distributed.shutdown()


def test_our_batch_norm_refuses_rows_without_channels() -> None:
    with pytest.raises(ValueError, match="not shape"):
        distributed.BatchNorm(3)(torch.ones(3))
