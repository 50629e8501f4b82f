"""Uses an installation of the two wheels as its first user would. Needs nothing but Python's own library.

    python tests/support/first_user.py /path/to/venv/bin/fullrank examples/ankle-boot.png

`fullrank doctor`, `check` and `report` on the encoder; `serve` on a free port, POST /embed, `report` on the service,
and its end by SIGTERM. Ends with 1, and the output of what failed, at the first step that does.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from socket import socket

SECONDS = 300.0  # only a service that never gets ready takes them


class UseError(RuntimeError):
    """Raised at the first step that fails. The message says which, and what was printed."""


def run(folder: Path, *command: str) -> str:
    """Standard output of a command that has to end with 0."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UseError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def ready(url: str, service: subprocess.Popen[bytes]) -> None:
    """Wait until the service answers /readyz."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if service.poll() is not None:
            raise UseError(f"fullrank serve ended with {service.returncode}")
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=10):
                return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.2)
    raise UseError(f"fullrank serve was not ready within {SECONDS:.0f} s")


def embedded(url: str, picture: Path) -> tuple[str, int]:
    """(model, dimension) of the answer to a picture, whose row has to have length 1."""
    request = urllib.request.Request(f"{url}/embed", picture.read_bytes(), {"Content-Type": "image/png"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        body = json.load(answer)
    (row,) = body["embeddings"]
    if len(row) != body["dimension"] or abs(sum(it * it for it in row) - 1) > 1e-3:
        raise UseError(f"POST /embed: {body}")
    return body["model"], body["dimension"]


def use(command: str, picture: Path, folder: Path) -> None:
    """Every step, in `folder`, which is left as a user would find it. Raises UseError."""
    where = "import models.pretrained; print(*models.pretrained.__path__)"
    pretrained = run(folder, str(Path(command).with_name("python")), "-I", "-c", where).strip()
    encoder = f"{pretrained}/fashion-directclr"
    print(run(folder, command, "--version").strip())
    with socket() as it:
        it.bind(("127.0.0.1", 0))
        port = it.getsockname()[1]
    os.environ["FULLRANK_PORT"] = str(port)  # doctor looks whether it is free, and serve takes it
    print(run(folder, command, "doctor"))
    print(run(folder, command, "check", encoder).strip())
    run(folder, command, "report", encoder, "--out", "encoder.html")
    service = subprocess.Popen([command, "serve", "--encoder", encoder], cwd=folder)
    try:
        url = f"http://127.0.0.1:{port}"
        ready(url, service)
        print("POST /embed: a row of {1} by {0}".format(*embedded(url, picture)))
        run(folder, command, "report", url, "--out", "service.html")
        service.terminate()
        if (code := service.wait(SECONDS)) not in (0, -signal.SIGTERM):  # uvicorn ends by the signal that it was sent
            raise UseError(f"fullrank serve ended with {code} after SIGTERM")
    finally:
        service.kill()
    for name in ("encoder.html", "service.html"):
        page = (folder / name).read_text()
        if "data:image/svg+xml" not in page:
            raise UseError(f"{name} has no picture")
        print(f"{name}: {len(page):,} characters")


def main() -> int:
    command, picture = sys.argv[1], Path(sys.argv[2]).resolve()
    with tempfile.TemporaryDirectory(prefix="fullrank-use-") as folder:
        try:
            use(str(Path(command).absolute()), picture, Path(folder))
        except UseError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
