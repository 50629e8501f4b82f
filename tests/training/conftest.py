"""What two processes under torchrun leave behind, made once."""

from pathlib import Path

import pytest

from tests.support.training import torchrun_script


@pytest.fixture(scope="session")
def torchrun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what two processes left: `two`, a run, and `steps.safetensors`, for test_distributed."""
    folder = tmp_path_factory.mktemp("torchrun")
    result = torchrun_script(folder / "two", "whole")
    assert result.returncode == 0, result.stderr[-4000:]
    assert "FutureWarning" not in result.stderr
    return folder
