"""Stores the monitors' windows on disk, and the page's history, so that both are kept over a restart.

There is one safetensors file for each model and revision, and it is replaced atomically. Its header holds the model,
the revision and a hash. A file that is damaged, of another encoder or older than the windows is logged and not used.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO

import torch
from safetensors.torch import save
from torch import Tensor

from fullrank import SpectrumMonitor
from fullrank import __version__ as VERSION
from fullrank.stored import tensors_in
from models.files import SCRATCH, write
from service.metrics import Metrics

log = logging.getLogger("fullrank.service")
UNFINISHED = (f".*{SCRATCH}", ".saving-*")  # names of files until they are complete; the second until 0.1.0
HISTORY = "history.safetensors"
Watched = tuple[str, str, SpectrumMonitor]  # model, revision, monitor
Kept = tuple[dict[str, Tensor], str]  # a history's state


CONTENT = "fullrank windows"
FORMAT = "1"
"""Changes when earlier windows can no longer be resumed, and only then: an upgrade keeps what was watched."""
FIRST_FORMAT = {"format": "1"}  # of files that do not say it


class WindowStore:
    """Saves and restores windows in `folder`, with a lock file so that one process owns it. None stores nothing.

    longest: seconds after which windows are too old to be resumed; their files are removed then.

    A second process on the same folder logs that it saves and restores nothing: each would resume the other's traffic.
    """

    def __init__(self, folder: Path | None, metrics: Metrics, longest: float = math.inf) -> None:
        self._folder = folder
        self._metrics = metrics
        self._longest = longest
        self._lock: IO[bytes] | None = None
        self._saving = threading.Lock()
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = (folder / "lock").open("wb")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            log.error("state_dir %s cannot be used, a restart will start blind: %s", folder, error)
            metrics.windows["refused"].inc()
            self.close()
        else:
            self._tidy(0.0)

    def restore(self, model: str, revision: str, monitor: SpectrumMonitor) -> bool:
        """Load the stored windows of this model and revision; False if none can be used. Blocks; raises nothing."""
        if self._folder is None or not (path := self._path(model, revision)).exists():
            return False
        try:
            tensors = _read(path, model, revision)
            age = max(0.0, time.time() - float(tensors["saved"]))
            if age > monitor.windows[-1]:
                raise ValueError(f"it was saved {age:.0f} s ago, the longest window is {monitor.windows[-1]:g} s")
            monitor.restore(tensors)
        # Any exception: a replica that does not start is worse than one that starts without windows.
        except Exception as error:
            self._metrics.windows["refused"].inc()
            log.warning("%s is not resumed: %s", path, error)
            return False
        self._metrics.windows["restored"].inc()
        log.info("resumed the windows of %s@%s, saved %.0f s ago", model, revision, age)
        return True

    def save(self, model: str, revision: str, monitor: SpectrumMonitor) -> None:
        """Save a monitor's windows in the file of this model and revision. Blocks; raises nothing."""
        if self._folder is None:
            return
        try:
            tensors = monitor.state()
            header = _identity(model, revision) | {"sha256": _digest(tensors)}
            write(self._path(model, revision), save(tensors, header))
        except Exception as error:
            self._metrics.windows["unsaved"].inc()
            log.error("the windows of %s@%s could not be saved: %s", model, revision, error)
        else:
            self._metrics.windows["saved"].inc()

    def save_all(self, monitors: Iterable[Watched], history: Kept | None = None) -> None:
        """Save the windows of all these monitors, and the state of a history. Blocks; raises nothing."""
        with self._saving:  # at the end of the service one may be under way: it must not overwrite what is newer
            for model, revision, monitor in monitors:
                self.save(model, revision, monitor)
            if history is not None:
                self._save_history(*history)
            self._tidy(self._longest)

    def _save_history(self, tensors: dict[str, Tensor], index: str) -> None:
        if self._folder is None:
            return
        try:
            header = {"content": "fullrank history", "index": index, "sha256": _digest(tensors, index)}
            write(self._folder / HISTORY, save(tensors, header))
        except Exception as error:
            self._metrics.windows["unsaved"].inc()
            log.error("the history could not be saved: %s", error)

    def restore_history(self, resume: Callable[[Mapping[str, Tensor], str], None]) -> None:
        """Call `resume` with the stored history, if there is one. Blocks; raises nothing."""
        if self._folder is None or not (path := self._folder / HISTORY).exists():
            return
        try:
            tensors, header = _parsed(path)
            index = header.get("index", "")
            if header.get("sha256") != _digest(tensors, index):
                raise ValueError("it is damaged: its hash is not the one in its header")
            resume(tensors, index)
        except Exception as error:
            self._metrics.windows["refused"].inc()
            log.warning("%s is not resumed: %s", path, error)

    def _tidy(self, unfinished: float) -> None:
        """Remove files that are too old to resume, and incomplete files older than `unfinished` seconds."""
        if self._folder is None:
            return
        for pattern, longest in (("*@*.safetensors", self._longest), *((it, unfinished) for it in UNFINISHED)):
            for path in self._folder.glob(pattern):
                with contextlib.suppress(OSError):
                    if path.stat().st_mtime <= time.time() - longest:
                        path.unlink()

    async def keep(
        self, monitors: Callable[[], Iterable[Watched]], period: float, history: Callable[[], Kept] | None = None
    ) -> None:
        """Run for ever: save all windows every `period` seconds, or less often if saving took over 5 % of the time.

        The history's state is taken on the event loop, which alone changes it.
        """
        took = 0.0
        while True:
            await asyncio.sleep(max(period, 20 * took))
            started = time.monotonic()
            kept = None if history is None or self._folder is None else history()
            await asyncio.to_thread(self.save_all, monitors(), kept)
            took = time.monotonic() - started

    def close(self) -> None:
        """Release the folder's lock."""
        if self._lock is not None:
            self._lock.close()
        self._lock = self._folder = None

    def _path(self, model: str, revision: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{model}@{revision}.safetensors"


def _parsed(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header of a file. Raises ValueError if it is no safetensors file."""
    data = path.read_bytes()
    try:
        tensors = tensors_in(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    except ValueError as error:
        raise ValueError(f"it is damaged: {error}") from error
    return tensors, header


def _read(path: Path, model: str, revision: str) -> dict[str, Tensor]:
    tensors, header = _parsed(path)
    expected = {"content": CONTENT, "format": FORMAT, "model": model, "revision": revision}
    if (found := {name: header.get(name, FIRST_FORMAT.get(name)) for name in expected}) != expected:
        raise ValueError(f"it says it is {found}, not {expected}")
    if header.get("sha256") != _digest(tensors):
        raise ValueError("it is damaged: its hash is not the one in its header")
    return tensors


def _identity(model: str, revision: str) -> dict[str, str]:
    return {"content": CONTENT, "format": FORMAT, "version": VERSION, "model": model, "revision": revision}


def _digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()
