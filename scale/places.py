"""Where bulk output lies: a folder of this machine, or an address in an object store.

A file of a folder is written beside its place and renamed. A store has no renaming and needs none: an upload is seen
whole or not at all, and large ones, which are sent in parts, appear when the last part is confirmed.
"""

import fnmatch
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fullrank.wording import words_of
from models import files
from scale.sources import ADDRESS

# Protocols of fsspec whose uploads are all or nothing. `memory` is of this process alone.
STORES = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "memory")
Content = bytes | bytearray | memoryview | str


class PlaceError(ValueError):
    """Raised for an address to which output cannot be written. The message says where it can."""


@contextmanager
def _telling(what: object) -> Iterator[None]:
    """Let nothing but OSError through: stores raise kinds of their own."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        raise OSError(f"{what}: {words_of(error)}") from error


class Remote:
    """An address in an object store, with those methods of pathlib.Path that bulk output needs."""

    def __init__(self, system: Any, path: str) -> None:
        """system: fsspec's file system. path: as that system writes it, without the protocol."""
        self._system = system
        self._path = path.rstrip("/")

    def __str__(self) -> str:
        return str(self._system.unstrip_protocol(self._path))

    def __truediv__(self, name: str) -> "Remote":
        return Remote(self._system, f"{self._path}/{name}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self._path.rpartition("/")[2]

    def resolve(self) -> "Remote":
        """Itself: an address is absolute."""
        return self

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: a store has no folders."""

    def exists(self) -> bool:
        """Whether there is such an object. Raises OSError."""
        with _telling(self):
            self._system.invalidate_cache()
            return bool(self._system.exists(self._path))

    def glob(self, pattern: str) -> list["Remote"]:
        """The objects directly under this address whose last part fits the pattern. Raises OSError."""
        try:
            with _telling(self):
                self._system.invalidate_cache()
                found = self._system.ls(self._path, detail=False)
        except FileNotFoundError:
            return []
        names = sorted(str(it).rstrip("/").rpartition("/")[2] for it in found)
        return [self / name for name in names if fnmatch.fnmatchcase(name, pattern)]

    def read_bytes(self) -> bytes:
        """The object's content. Raises OSError."""
        with _telling(self):
            content: bytes = self._system.cat_file(self._path)
        return content

    def read_text(self) -> str:
        """The object's content, which is UTF-8. Raises OSError."""
        return self.read_bytes().decode()

    def write_bytes(self, content: bytes) -> None:
        """Upload an object whole, in place of one that is there. Raises OSError."""
        with _telling(self):
            self._system.pipe_file(self._path, content)

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the object. Raises OSError."""
        try:
            with _telling(self):
                self._system.rm_file(self._path)
        except FileNotFoundError:
            if not missing_ok:
                raise


Place = Path | Remote


def place(name: str) -> Place:
    """The place that a user or another process named. Raises PlaceError for an address that cannot take output."""
    if not ADDRESS.match(name):
        return Path(name)
    protocol = name.partition("://")[0].lower()
    if protocol not in STORES:
        raise PlaceError(
            f"{name}: rows are written to a folder or to an object store ({', '.join(STORES[:-1])}), where a write is "
            "all or nothing"
        )
    try:
        from fsspec.core import url_to_fs

        return Remote(*url_to_fs(name))
    except ImportError as error:
        package = {"s3": "s3", "s3a": "s3"}.get(protocol, "bulk")
        raise PlaceError(f"{name}: {error}: pip install 'fullrank-server[bulk,{package}]'") from error
    except Exception as error:  # object stores raise kinds of their own
        raise PlaceError(f"{name}: {words_of(error)}") from error


def write_all(contents: Mapping[Any, Content]) -> None:
    """Write files of one place in their order, each whole or not at all. Raises OSError.

    contents: place -> content, all on this machine or all in one store.
    """
    local = {path: content for path, content in contents.items() if isinstance(path, Path)}
    if local:
        files.write_all(local)
    for path, content in contents.items():
        if isinstance(path, Remote):
            path.write_bytes(content.encode() if isinstance(content, str) else bytes(content))
