"""Builds the files of a release in dist/, reproducibly: sdist and wheel of both distributions.

    python -m tools.dist [--twice]

Archives carry the time of the last commit (SOURCE_DATE_EPOCH, if set, instead), plain owners and modes, and members in
order. Each wheel is made from its sdist, as an installer without a wheel would make it. --twice builds again elsewhere
and fails unless every byte is the same. SHA256SUMS lists the results.
"""

import argparse
import gzip
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROJECTS = (ROOT / "fullrank", ROOT)
DIST = ROOT / "dist"


class DistError(RuntimeError):
    """Raised if a build failed or its bytes differ from the first one's. The message says which."""


def epoch() -> int:
    """The time stamp of every file, in seconds since 1970."""
    if given := os.environ.get("SOURCE_DATE_EPOCH"):
        return int(given)
    command = ["git", "-C", str(ROOT), "log", "-1", "--format=%ct"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DistError("this is no git checkout: set SOURCE_DATE_EPOCH to the release's time in seconds")
    return int(done.stdout)


def normalised(sdist: bytes, seconds: int) -> bytes:
    """A .tar.gz with the same files, in order, with the time stamp `seconds` and no owner."""
    plain, packed = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(sdist)) as old, tarfile.open(fileobj=plain, mode="w") as new:
        for member in sorted(old.getmembers(), key=lambda it: it.name):
            content = old.extractfile(member) if member.isfile() else None
            member.mtime = seconds
            member.uid = 0
            member.gid = 0
            member.uname = ""
            member.gname = ""
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            member.pax_headers = {}
            new.addfile(member, content)
    with gzip.GzipFile(fileobj=packed, mode="wb", filename="", mtime=seconds) as file:
        file.write(plain.getvalue())
    return packed.getvalue()


def run_build(what: str, project: Path, out: Path, seconds: int) -> Path:
    """Run `python -m build`, and return the one file that it makes. Raises DistError."""
    command = [sys.executable, "-m", "build", "--no-isolation", f"--{what}", "--outdir", str(out), str(project)]
    environment = os.environ | {"SOURCE_DATE_EPOCH": str(seconds), "PYTHONHASHSEED": "0"}
    done = subprocess.run(command, cwd=out, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DistError(f"{project}: {done.stdout}{done.stderr}")
    (made,) = out.iterdir()
    return made


def build(project: Path, seconds: int) -> dict[str, bytes]:
    """name -> bytes of a project's sdist and of the wheel made from it."""
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch, name) for name in ("source", "sdist", "unpacked", "wheel")]
        source, sdists, unpacked, wheels = folders
        # Build in a copy: files that an earlier build left in build/ and *.egg-info would be packed again.
        leave = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "runs")
        shutil.copytree(project, source, ignore=leave)
        for folder in (sdists, wheels):
            folder.mkdir()
        made = run_build("sdist", source, sdists, seconds)
        sdist = normalised(made.read_bytes(), seconds)
        with tarfile.open(fileobj=io.BytesIO(sdist)) as archive:
            archive.extractall(unpacked, filter="data")
        (inner,) = unpacked.iterdir()
        wheel = run_build("wheel", inner, wheels, seconds)
        return {made.name: sdist, wheel.name: wheel.read_bytes()}


def everything(seconds: int) -> dict[str, bytes]:
    """name -> bytes of all four archives."""
    return {name: data for project in PROJECTS for name, data in build(project, seconds).items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--twice", action="store_true", help="build again and compare")
    arguments = parser.parse_args()
    try:
        seconds = epoch()
        files = everything(seconds)
        if arguments.twice:
            again = everything(seconds)
            if different := [name for name in files if files[name] != again.get(name)]:
                raise DistError(f"not the same bytes twice: {', '.join(different)}")
    except DistError as error:
        print(error, file=sys.stderr)
        return 1
    shutil.rmtree(DIST, ignore_errors=True)
    DIST.mkdir()
    lines = []
    for name, data in sorted(files.items()):
        (DIST / name).write_bytes(data)
        lines.append(f"{hashlib.sha256(data).hexdigest()}  {name}")
        print(f"{len(data):>10}  {lines[-1]}")
    (DIST / "SHA256SUMS").write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
