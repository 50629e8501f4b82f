"""Writes requirements/*.txt: exact versions and hashes of what the image and the targets of the Makefile install.

    python -m tools.lock [--upgrade]

Each file is for Python 3.11 and newer on every platform. torch is left out, because its build, and so its hash, depends
on the index that it comes from. Its version is the one line of requirements/torch.txt. The GPU libraries that PyPI's
torch depends on are left out too. This needs uv and the registry.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "requirements"
# Each file and the extras of fullrank-server that it holds. The largest comes first: the others keep its versions.
LOCKS = {"dev": "[dev]", "serve": "[train]", "image": "", "release": "[release]", "docs": "[docs]"}
OURS = ("fullrank", "fullrank-server")
WITH_TORCH = re.compile(r"(torch|triton|nvidia-\S+|cuda-\S+)==")
HEADER = "# Written by `make lock` from pyproject.toml; `make lock UPGRADE=--upgrade` takes the newest releases.\n"


class LockError(RuntimeError):
    """Raised if uv is missing or finds no set of versions. The message says which."""


def without_torch(text: str) -> str:
    """Remove torch, the libraries that only its GPU builds need, and uv's own header from a requirements file."""
    entries = re.split(r"\n(?=\S)", "\n" + text)
    kept = [entry for entry in entries if entry and not entry.startswith("#") and not WITH_TORCH.match(entry)]
    return HEADER + "\n".join(entry.rstrip("\n") for entry in kept) + "\n"


def resolve(name: str, upgrade: bool) -> str:
    """Let uv resolve the versions of one file. Raises LockError."""
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    if uv is None:
        raise LockError("there is no uv: python -m pip install uv")
    with tempfile.TemporaryDirectory() as scratch:
        wanted = Path(scratch, "wanted.in")
        wanted.write_text(f"{ROOT / 'fullrank'}\n{ROOT}{LOCKS[name]}\n")
        kept = [FOLDER / "torch.txt"] + ([] if name == "dev" else [FOLDER / "dev.txt"])
        command = [uv, "pip", "compile", "--quiet", "--universal", "--python-version", "3.11", "--generate-hashes"]
        command += ["--no-annotate", *(f"--constraint={file}" for file in kept)]
        command += [f"--no-emit-package={package}" for package in OURS]
        command += ["--upgrade"] if upgrade else []
        output = FOLDER / f"{name}.txt"
        if output.exists():  # uv keeps the versions it finds there
            shutil.copy(output, Path(scratch, "found.txt"))
        done = subprocess.run(
            [*command, f"--output-file={Path(scratch, 'found.txt')}", str(wanted)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise LockError(f"uv found no versions for {name}: {done.stderr.strip()}")
        return without_torch(Path(scratch, "found.txt").read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--upgrade", action="store_true", help="take the newest releases, not the ones written now")
    arguments = parser.parse_args()
    for name in LOCKS:
        try:
            (FOLDER / f"{name}.txt").write_text(resolve(name, arguments.upgrade))
        except LockError as error:
            print(error, file=sys.stderr)
            return 1
        print(f"requirements/{name}.txt")
    return 0


if __name__ == "__main__":
    sys.exit(main())
