"""The demonstration `make demo`: an encoder collapses, and a real Prometheus pages."""

import shutil
from pathlib import Path

from service.settings import DEFAULT

PRETRAINED = DEFAULT.parent
HEALTHY = DEFAULT.name
COLLAPSED = Path(__file__).parent / "encoders" / "fashion-collapsed"  # in the repository only: no image or wheel has it


def encoders(folder: Path) -> Path:
    """A new folder with the pretrained encoders and the collapsed one. Raises FileNotFoundError without the latter."""
    shutil.copytree(PRETRAINED, folder)
    shutil.copytree(COLLAPSED, folder / COLLAPSED.name)
    return folder
