"""What the image holds, for the SBOM and the licence report of a release.

    python -m tools.inventory requirements         the locked packages that the image's platform installs, with hashes
    python -m tools.inventory names                their names
    python -m tools.inventory vendored SBOM REPORT add what is vendored, uPlot, to both files

The image runs CPython 3.11 on Linux: lines of the lock for other platforms are left out. cyclonedx-py and pip-licenses
know only Python packages, so the files in service/http/page/vendor are added here, after a look at their hashes.
"""

import argparse
import hashlib
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
LOCKS = (ROOT / "requirements" / "torch.txt", ROOT / "requirements" / "image.txt")
VENDOR = ROOT / "service" / "http" / "page" / "vendor"
IMAGE = {
    "implementation_name": "cpython",
    "os_name": "posix",
    "platform_python_implementation": "CPython",
    "platform_system": "Linux",
    "python_full_version": "3.11.0",
    "python_version": "3.11",
    "sys_platform": "linux",
}
TITLE = re.compile(
    r"^(?P<name>\S+) (?P<version>\S+), (?P<licence>\S+) \((?P<text>\S+)\), by (?P<author>.+): (?P<url>\S+)$"
)
SHA256 = re.compile(r"^(?P<file>\S+\.(?:js|css)) .*\n(?:\s.*\n)*?\s+sha256 (?P<hash>[0-9a-f]{64})$", re.MULTILINE)


class InventoryError(RuntimeError):
    """Raised if a vendored file is not the one that the README beside it describes."""


@dataclass(frozen=True)
class Vendored:
    """A library whose files lie in this repository. files: name -> SHA-256."""

    name: str
    version: str
    licence: str
    author: str
    url: str
    files: dict[str, str]


def requirements() -> list[tuple[Requirement, str]]:
    """The locked packages of the image, each with its lines of the lock."""
    found = []
    for lock in LOCKS:
        text = re.sub(r"^#.*\n", "", lock.read_text(), flags=re.MULTILINE)
        for lines in re.findall(r"^\S(?:.*\\\n)*.*$", text, re.MULTILINE):
            requirement = Requirement(lines.partition("\\")[0].strip())
            if requirement.marker is None or requirement.marker.evaluate(IMAGE):
                found.append((requirement, lines))
    return found


def vendored() -> Vendored:
    """What VENDOR's README says. Raises InventoryError if a file there has another hash, or none."""
    readme = (VENDOR / "README.txt").read_text()
    title = TITLE.match(readme.partition("\n")[0])
    if title is None:
        raise InventoryError(
            f"{VENDOR / 'README.txt'}: its first line is not NAME VERSION, LICENCE (FILE), by AUTHOR: URL"
        )
    files = dict(SHA256.findall(readme))
    there = {it.name for it in VENDOR.iterdir() if it.suffix in (".js", ".css")}
    for name in sorted(there | set(files)):
        found = hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() if name in there else "missing"
        if files.get(name) != found:
            raise InventoryError(f"{VENDOR / name} is {found}, and its README says {files.get(name, 'nothing')}")
    if not (VENDOR / title["text"]).is_file():
        raise InventoryError(f"{VENDOR / title['text']} is missing")
    return Vendored(title["name"], title["version"], title["licence"], title["author"], title["url"], files)


def component(it: Vendored) -> dict[str, Any]:
    """A component of a CycloneDX SBOM."""
    return {
        "type": "library",
        "bom-ref": f"vendored-{it.name}",
        "name": it.name,
        "version": it.version,
        "author": it.author,
        "description": "files of the live page",
        "licenses": [{"license": {"id": it.licence, "acknowledgement": "declared"}}],
        "purl": f"pkg:npm/{it.name.lower()}@{it.version}",
        "externalReferences": [{"type": "vcs", "url": it.url}],
        "components": [
            {
                "type": "file",
                "bom-ref": f"vendored-{name}",
                "name": f"service/http/page/vendor/{name}",
                "hashes": [{"alg": "SHA-256", "content": digest}],
            }
            for name, digest in sorted(it.files.items())
        ],
    }


def add_vendored(sbom: Path, report: Path) -> None:
    """Add the vendored library to an SBOM in JSON and to a licence report in Markdown, if it is not there."""
    it = vendored()
    document = json.loads(sbom.read_text())
    made = component(it)
    document["components"] = [old for old in document["components"] if old["bom-ref"] != made["bom-ref"]] + [made]
    sbom.write_text(json.dumps(document, indent=2) + "\n")
    row = f"| {it.name} (vendored) | {it.version} | {it.licence} | {it.url} |"
    lines = report.read_text().rstrip("\n").splitlines()
    if row not in lines:
        report.write_text("\n".join([*lines, row]) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("requirements")
    commands.add_parser("names")
    adding = commands.add_parser("vendored")
    adding.add_argument("sbom", type=Path)
    adding.add_argument("report", type=Path)
    arguments = parser.parse_args()
    try:
        if arguments.command == "requirements":
            print("\n".join(lines for _, lines in requirements()))
        elif arguments.command == "names":
            print("\n".join(sorted({it.name for it, _ in requirements()})))
        else:
            add_vendored(arguments.sbom, arguments.report)
    except InventoryError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
