"""Writes a file atomically: a reader finds the old content or the new one, also after a kill or a power cut."""

import contextlib
import os
import threading
from pathlib import Path

SCRATCH = ".tmp"
"""The end of a scratch file's name. A kill may leave one behind; it is safe to delete."""


def write(path: Path, content: bytes | bytearray | memoryview | str) -> None:
    """Write beside `path`, force it to the disk, and rename. Text is UTF-8.

    Raises OSError, naming `path`. The old file is then unchanged, and no scratch file is left.
    """
    fresh = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_native_id()}{SCRATCH}")
    try:
        with fresh.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError as error:
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
