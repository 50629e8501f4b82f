"""Writes a file atomically: a reader finds the old content or the new one, also after a kill or a power cut."""

import contextlib
import os
import threading
from collections.abc import Mapping
from pathlib import Path

SCRATCH = ".tmp"
"""The end of a scratch file's name. A kill may leave one behind; it is safe to delete."""


def write(path: Path, content: bytes | bytearray | memoryview | str) -> None:
    """Write beside `path`, force it to the disk, and rename. Text is UTF-8.

    Raises OSError, naming `path`. The old file is then unchanged, and no scratch file is left.
    """
    write_all({path: content})


def write_all(contents: Mapping[Path, bytes | bytearray | memoryview | str]) -> None:
    """Write files of one folder as `write` does, and rename them in their order once all are on the disk.

    Raises OSError, naming the file. No file is then changed, unless renaming failed; no scratch file is left.
    """
    scratch = {
        path: path.with_name(f".{path.name}.{os.getpid()}-{threading.get_native_id()}{SCRATCH}") for path in contents
    }
    path = next(iter(contents))
    try:
        for path, content in contents.items():
            with scratch[path].open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
        for path, fresh in scratch.items():
            fresh.replace(path)
    except OSError as error:
        for fresh in scratch.values():
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Force the folder's entries to the disk, so that a rename survives a power cut."""
    with contextlib.suppress(OSError):  # some file systems cannot
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
