"""`make dist`: the same bytes from the same files, whoever builds them and when."""

import io
import tarfile
from pathlib import Path

import pytest

from tools.dist import DistError, build, epoch, everything, normalised

ROOT = Path(__file__).resolve().parents[2]
LATER = 1_700_000_000


def archive(names: list[str], when: int, owner: str) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size, member.mtime, member.uname, member.mode = len(name), when, owner, 0o664
            tar.addfile(member, io.BytesIO(name.encode()))
    return made.getvalue()


def test_times_owners_modes_and_order_do_not_matter() -> None:
    one, other = archive(["a", "b"], 5, "ann"), archive(["b", "a"], 7, "bob")
    assert one != other
    assert normalised(one, LATER) == normalised(other, LATER)
    with tarfile.open(fileobj=io.BytesIO(normalised(one, LATER))) as tar:
        assert [(it.name, it.mtime, it.uname, it.mode) for it in tar] == [
            ("a", LATER, "", 0o644),
            ("b", LATER, "", 0o644),
        ]
        assert tar.extractfile("b").read() == b"b"  # type: ignore[union-attr]
    assert normalised(one, LATER) != normalised(archive(["a", "c"], 5, "ann"), LATER)


def test_the_library_is_built_twice_alike() -> None:
    first = build(ROOT / "fullrank", LATER)
    assert sorted(Path(name).suffix for name in first) == [".gz", ".whl"]
    assert first == build(ROOT / "fullrank", LATER)


@pytest.mark.soak
def test_everything_is_built_twice_alike() -> None:
    assert everything(LATER) == everything(LATER)


def test_the_time_is_the_releases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "12")
    assert epoch() == 12
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    monkeypatch.setattr("tools.dist.ROOT", tmp_path)
    with pytest.raises(DistError, match="SOURCE_DATE_EPOCH"):
        epoch()
