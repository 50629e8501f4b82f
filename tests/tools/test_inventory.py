"""The inventory of the image: the platform's packages, and what is vendored, with hashes that are looked at."""

import hashlib
import json
import shutil
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tools import inventory
from tools.inventory import VENDOR, InventoryError, add_vendored, requirements, vendored


def test_it_holds_what_the_image_installs_and_no_other_platforms_packages() -> None:
    found = requirements()
    names = [it.name for it, _ in found]
    assert len(names) == len(set(names))  # one version of each
    assert {"torch", "fastapi", "onnxruntime", "numpy", "uvloop"} <= set(names)
    assert "colorama" not in names  # Windows
    for it, lines in found:
        assert str(it.specifier).startswith("=="), it
        assert it.name == "torch" or "--hash=sha256:" in lines


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the image's Python is 3.11")
def test_pip_would_install_the_same_versions_here() -> None:
    here = {it.metadata["Name"].lower().replace("_", "-"): it.version for it in metadata.distributions()}
    for it, _ in requirements():
        if it.name in here and it.name != "torch":
            assert it.specifier.contains(here[it.name]), (it, here[it.name])


def test_what_is_vendored_is_in_both_files_once(tmp_path: Path) -> None:
    sbom, report = tmp_path / "image.cdx.json", tmp_path / "licences.md"
    sbom.write_text(json.dumps({"bomFormat": "CycloneDX", "components": [{"bom-ref": "a", "name": "a"}]}))
    report.write_text("| Name | Version | License | URL |\n|--|--|--|--|\n| a | 1 | MIT | u |\n")
    for _ in range(2):
        add_vendored(sbom, report)
    components = json.loads(sbom.read_text())["components"]
    assert [it["name"] for it in components] == ["a", "uPlot"]
    assert components[1]["purl"] == "pkg:npm/uplot@1.6.32"
    assert components[1]["licenses"] == [{"license": {"id": "MIT", "acknowledgement": "declared"}}]
    for it in components[1]["components"]:
        content = (VENDOR / Path(it["name"]).name).read_bytes()
        assert it["hashes"] == [{"alg": "SHA-256", "content": hashlib.sha256(content).hexdigest()}]
    assert report.read_text().count("uPlot (vendored) | 1.6.32 | MIT |") == 1


def test_a_changed_or_undescribed_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "vendor"
    shutil.copytree(VENDOR, copy)
    monkeypatch.setattr(inventory, "VENDOR", copy)
    assert vendored().files
    (copy / "other.js").write_text("1")
    with pytest.raises(InventoryError, match=r"other\.js is \w{64}, and its README says nothing"):
        vendored()
    (copy / "other.js").unlink()
    script = next(copy.glob("*.js"))
    script.write_bytes(script.read_bytes() + b"\n")
    with pytest.raises(InventoryError, match="README says 5dd9b3281aa6"):
        vendored()
    script.unlink()
    with pytest.raises(InventoryError, match="is missing"):
        vendored()
