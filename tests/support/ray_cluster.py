"""A Ray cluster of this machine's own for tests: started by `ray start`, ended with every process that it made."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tools.stack import free_port

ROOT = Path(__file__).resolve().parents[2]
RAY = Path(sys.executable).parent / "ray"
MARK = "RAY_CLUSTER_OF_A_TEST"
STARTED = "Ray runtime started"
BUSY = "timed out during startup"
PATIENCE = 600.0  # seconds


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Variables for a node's processes and for those that use it, marked so that they can be found again."""
    settings = {
        MARK: str(folder),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # otherwise a busy machine starves them
    }
    return {name: value for name, value in os.environ.items() if not name.startswith("FULLRANK_")} | settings | more


def start_node(
    folder: Path, arguments: Sequence[str], prefix: Sequence[str] = (), cpus: int = 2
) -> subprocess.Popen[bytes]:
    """Start a node and wait until it runs. `prefix` comes before the command, such as ip netns exec NAME.

    Ray gives up after half a minute if the machine is busy. Then it is started again.
    """
    command = [*prefix, str(RAY), "start", "--block", f"--num-cpus={cpus}", "--object-store-memory=100000000"]
    command += ["--include-dashboard=false"] if "--head" in arguments else []
    deadline = time.monotonic() + PATIENCE
    while True:
        log = folder / f"node-{len(list(folder.glob('node-*')))}.log"
        with log.open("wb") as output:
            node = subprocess.Popen(
                [*command, *arguments], env=environment(folder), stdout=output, stderr=output, start_new_session=True
            )
        while True:
            ended = node.poll() is not None
            said = log.read_text(errors="replace")
            if STARTED in said:
                return node
            if ended and BUSY in said:
                break
            if ended or time.monotonic() > deadline:
                end(folder)
                raise AssertionError(said[-3000:])
            time.sleep(0.2)


def end(folder: Path) -> None:
    """End every process of the cluster in a folder: by its mark, because workers have sessions of their own."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + 15
        while (left := processes(folder)) and time.monotonic() < deadline:
            for process in left:
                _signal(process, sign)
            time.sleep(0.5)
    shutil.rmtree(folder, ignore_errors=True)


def processes(folder: Path) -> list[int]:
    """The processes of the cluster in a folder that run."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={folder}".encode() in (path / "environ").read_bytes().split(b"\0"):
                found.append(int(path.name))
        except OSError:
            continue
    return [it for it in found if it != os.getpid()]


def named(folder: Path, name: str) -> list[int]:
    """The cluster's processes with a name in their title."""
    found = []
    for process in processes(folder):
        with suppress(OSError):
            if name.encode() in Path(f"/proc/{process}/cmdline").read_bytes():
                found.append(process)
    return found


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait for what must come, however loaded the machine."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def _signal(process: int, sign: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, sign)


def new_folder() -> Path:
    """A folder for a cluster's sockets, whose names have to be short."""
    return Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))


@contextmanager
def cluster(cpus: int = 2, gpus: int = 0) -> Iterator[tuple[str, Path]]:
    """The address of a new cluster of one node, and the folder that `environment` takes.

    gpus: as many as Ray is told that there are.
    """
    folder = new_folder()
    port = free_port()
    try:
        arguments = ["--head", "--node-ip-address=127.0.0.1", f"--port={port}", f"--temp-dir={folder}/t"]
        start_node(folder, [*arguments, f"--num-gpus={gpus}"], cpus=cpus)
        yield f"127.0.0.1:{port}", folder
    finally:
        end(folder)
