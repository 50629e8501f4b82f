"""requirements/*.txt: that they satisfy both projects, hash everything, and pin torch in one place."""

import re

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.support.distributions import LIBRARY, ROOT, SERVER, requirements
from tools.lock import LOCKS, without_torch

FOLDER = ROOT / "requirements"
OURS = {"fullrank", "fullrank-server"}
NOT_LOCKED = OURS | {"torch"}


def locked(name: str) -> dict[str, list[tuple[Version, str]]]:
    """distribution -> its versions (several where Python versions need different ones), each with its hashes."""
    found: dict[str, list[tuple[Version, str]]] = {}
    for entry in re.split(r"\n(?=\S)", (FOLDER / f"{name}.txt").read_text()):
        if not entry.startswith("#"):
            pin = re.match(r"([\w.-]+)==(\S+)", entry)
            assert pin, entry
            found.setdefault(canonicalize_name(pin[1]), []).append((Version(pin[2]), entry))
    return found


def wanted(name: str) -> list[Requirement]:
    """What the projects ask for directly, of which a file must hold an allowed version."""
    extras = [LOCKS[name].strip("[]")] if LOCKS[name] else []
    found = requirements(LIBRARY) + requirements(LIBRARY, "client") + requirements(LIBRARY, "prometheus")
    found += requirements(SERVER)
    for extra in extras:
        for it in requirements(SERVER, extra):
            found += [inner for name in it.extras for inner in requirements(SERVER, name)] if it.name in OURS else [it]
    return [it for it in found if it.name not in NOT_LOCKED]


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_satisfies_the_projects(name: str) -> None:
    pins = locked(name)
    for it in wanted(name):
        versions = [version for version, _ in pins.get(canonicalize_name(it.name), [])]
        assert versions, f"{it.name} is not in requirements/{name}.txt: make lock"
        assert all(it.specifier.contains(version, prereleases=True) for version in versions), f"{it}: make lock"


@pytest.mark.parametrize("name", LOCKS)
def test_everything_is_hashed_and_torch_is_elsewhere(name: str) -> None:
    pins = locked(name)
    assert len(pins) > 30
    for distribution, versions in pins.items():
        assert all("--hash=sha256:" in entry for _, entry in versions), distribution
    assert not {it for it in pins if it in NOT_LOCKED or it.startswith(("nvidia-", "triton"))} - {"tritonclient"}


@pytest.mark.parametrize("name", ["serve", "image"])
def test_the_smaller_locks_are_part_of_the_largest(name: str) -> None:
    everything = locked("dev")
    for distribution, versions in locked(name).items():
        assert [it for it, _ in versions] == [it for it, _ in everything[distribution]], distribution


def test_torch_is_pinned_in_one_place() -> None:
    (pin,) = (FOLDER / "torch.txt").read_text().split()
    allowed = next(it for it in requirements(SERVER) if it.name == "torch")
    assert allowed.specifier.contains(pin.removeprefix("torch=="))
    for file in ("Makefile", "Dockerfile", "docker-compose.yml", "README.md", "pyproject.toml"):
        assert pin not in (ROOT / file).read_text(), file


def test_what_only_gpu_builds_bring_is_left_out() -> None:
    entries = ("# header", "a==1", "nvidia-nccl-cu13==2", "torch==2", "tritonclient==2", "z==3")
    text = "".join(f"{it} \\\n    --hash=sha256:0\n" for it in entries)
    assert without_torch(text).splitlines()[1::2] == ["a==1 \\", "tritonclient==2 \\", "z==3 \\"]
