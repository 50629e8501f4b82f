"""What the tests of bulk embedding share."""

from pathlib import Path

import pytest

from tests.support.bulk import png


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty images in two folders, one that is cut off, one that is no image and a file of another kind."""
    folder = tmp_path_factory.mktemp("images")
    for index in range(40):
        path = folder / f"class{index % 2}" / f"{index:02d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png(index))
    (folder / "class0" / "cut.png").write_bytes(png(99)[:200])
    (folder / "class0" / "text.jpg").write_bytes(b"hello")
    (folder / "notes.md").write_text("no image")
    return folder
