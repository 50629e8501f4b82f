"""Sources of images for bulk embedding: folders, tar shards, Parquet files and lists of paths, divided into shards.

Every name that the user gives is a path on this machine, or an address with a protocol (s3://..., gs://...), which
fsspec opens. The name of a file found in a folder is never taken for an address.
"""

import hashlib
import io
import os
import re
import stat
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

import numpy as np

from fullrank.wording import words_of

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
ADDRESS = re.compile(r"[a-z][a-z0-9+]*://", re.IGNORECASE)
FILES_A_SHARD = 1024
AT_ONCE = 8  # files of a store that are asked for together, and in memory together
LARGEST_FILE = 1 << 28  # bytes: no image file is larger, and a damaged header may claim anything
LONGEST_STEM = 200  # bytes of a shard's name; file systems take 255, and endings are added
IMAGE_COLUMNS = ("image", "bytes", "jpg", "png", "content")


class SourceError(ValueError):
    """Raised for a source that cannot be read at all. The message names it and the remedy."""


class Item(NamedTuple):
    """One image: its id in the output, and its bytes, or the reason why there are none."""

    id: str
    data: bytes
    error: str = ""


@dataclass(frozen=True)
class Shard:
    """A part of a source that is read, embedded and written alone. `name` is its output file's, without extension."""

    name: str
    kind: str  # files, tar or parquet
    paths: tuple[str, ...]
    root: str = ""

    def read(self) -> Iterator[Item]:
        """Yield its images, always in the same order. Raises SourceError if the shard itself is unreadable."""
        try:
            yield from {"files": _files, "tar": _members, "parquet": _rows}[self.kind](self)
        except SourceError:
            raise
        except Exception as error:  # object stores raise kinds of their own
            # ValueError and OverflowError: text that is no UTF-8, times of no calendar.
            known = OSError | EOFError | tarfile.TarError | ValueError | OverflowError
            if not (isinstance(error, known) or ADDRESS.match(self.paths[0])):
                raise
            raise SourceError(f"{self.paths[0]}: {_words(error)}") from error


def shards(source: str) -> list[Shard]:
    """Divide a source into shards. Raises SourceError.

    source: a folder (its tar or Parquet files if it has any, else its image files), one tar or Parquet file, or a text
    file (.txt) with one path or address a line; on this machine or, as an address, in object storage.
    """
    if ADDRESS.match(source):
        return _at_address(source)
    path = Path(source)
    if path.is_dir():
        return _in_folder([str(it) for it in sorted(path.rglob("*")) if it.is_file()], source, str(path))
    if not path.is_file():
        raise SourceError(f"{source} is no file and no folder; an address starts with its protocol, such as s3://")
    if path.suffix.lower() == ".txt":
        return _listed(source)
    return [_one(source)]


def _in_folder(names: list[str], source: str, root: str) -> list[Shard]:
    """The shards of a folder's files: its tar or Parquet files if it has any, else its images. Raises SourceError."""
    for ending in (".tar", ".parquet"):
        if of_kind := [name for name in names if name.lower().endswith(ending)]:
            return _named([_one(name, root) for name in of_kind])
    images = [name for name in names if name.lower().endswith(SUFFIXES)]
    if not images:
        raise SourceError(f"{source} holds no images ({', '.join(SUFFIXES)}), no .tar and no .parquet files")
    return _in_parts(images, root)


def _listed(source: str) -> list[Shard]:
    """The shards of a text file with one path or address a line. Raises SourceError."""
    try:
        with open_name(source) as file:
            text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(f"{source} is not UTF-8: {error}; save the list as UTF-8") from error
    except OSError as error:
        raise SourceError(f"{source}: {error}") from error
    first: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), 1):  # names may hold what else ends a line
        if (name := line.strip(" \t\r")) and first.setdefault(name, number) != number:
            raise SourceError(
                f"{source}: line {number} is line {first[name]} again, {name!r}; each image is embedded once: remove it"
            )
    if not first:
        raise SourceError(f"{source} is empty; it holds one path or address a line")
    return _in_parts(list(first), "")


def _at_address(source: str) -> list[Shard]:
    """The shards of an address: of a folder if its last part has no extension, or it ends with "/"."""
    last = source.rpartition("/")[2]
    if last.lower().endswith(".txt"):
        return _listed(source)
    if "." in last:
        return [_one(source)]
    try:
        from fsspec.core import url_to_fs

        system, path = url_to_fs(source.rstrip("/") + "/")
        root = str(system.unstrip_protocol(path)).rstrip("/") + "/"
        names = sorted(str(system.unstrip_protocol(name)) for name in system.find(path))
    except Exception as error:  # object stores raise kinds of their own
        raise SourceError(f"{source}: {_words(error)}") from error
    return _in_folder(names, source, root)


def _words(error: Exception) -> str:
    """What went wrong. fsspec itself says which package a store needs."""
    if isinstance(error, ImportError) and error.name == "fsspec":
        return "addresses need fsspec: pip install 'fullrank-server[bulk]'"
    return words_of(error)


def open_name(name: str) -> IO[bytes]:
    """Open a path on this machine, or an address with a protocol. Raises OSError."""
    if not ADDRESS.match(name):
        return Path(name).open("rb")
    try:
        import fsspec

        opened: IO[bytes] = fsspec.open(name, "rb").open()
    except Exception as error:  # object stores raise kinds of their own
        raise SourceError(f"{name}: {_words(error)}") from error
    return opened


def _in_parts(names: list[str], root: str) -> list[Shard]:
    """Group image files into shards. A shard's name has a hash of its file names, so that a new file makes it new."""
    found = []
    for index, start in enumerate(range(0, len(names), FILES_A_SHARD)):
        part = tuple(names[start : start + FILES_A_SHARD])
        found.append(Shard(f"files-{index:06d}-{_digest(*part)}", "files", part, root))
    return found


def _digest(*names: str) -> str:
    return hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()[:8]


def _one(name: str, root: str = "") -> Shard:
    ending = name.rpartition(".")[2].lower()
    if ending not in ("tar", "parquet"):
        raise SourceError(f"{name}: expected a folder, a .tar, a .parquet or a .txt file")
    short = _under(name, root)
    stem = re.sub(r"[^\w.-]+", "_", short.rpartition(".")[0].rpartition("/")[2] or short)
    if len(stem.encode()) > LONGEST_STEM:
        stem = f"{stem[: LONGEST_STEM // 8]}-{_digest(short)}"
    return Shard(stem, ending, (name,), root)


def _under(name: str, root: str) -> str:
    """A name as seen from its folder; the name itself without one."""
    if not root:
        return name
    if ADDRESS.match(root):
        return name.removeprefix(root)
    folder = root.rstrip(os.sep) + os.sep
    # Path's own way takes as long as reading a small file.
    return name.removeprefix(folder) if name.startswith(folder) else str(Path(name).relative_to(root))


def _named(found: list[Shard]) -> list[Shard]:
    """Make the shards' names unique: those with the same name in several folders get a hash of where they are.

    No number: it would be another shard's once a file is added.
    """
    count = Counter(shard.name for shard in found)

    def name(shard: Shard) -> str:
        return shard.name if count[shard.name] == 1 else f"{shard.name}-{_digest(_under(shard.paths[0], shard.root))}"

    return [replace(shard, name=name(shard)) for shard in found]


def _id(name: str) -> str:
    """A name as an id, which has to be Unicode: what is none in it is written out, such as \\udcff."""
    return name if name.isascii() else name.encode(errors="backslashreplace").decode()


def _files(shard: Shard) -> Iterator[Item]:
    large = f"the file is larger than {LARGEST_FILE} bytes"
    for start in range(0, len(shard.paths), AT_ONCE):
        for name, data in _contents(shard.paths[start : start + AT_ONCE]):
            id_ = _id(_under(name, shard.root))
            if isinstance(data, Exception):
                yield Item(id_, b"", _words(data))
            else:
                yield Item(id_, data) if len(data) <= LARGEST_FILE else Item(id_, b"", large)


def _contents(names: Sequence[str]) -> Iterator[tuple[str, bytes | Exception]]:
    """The content of each, in order; of a file larger than LARGEST_FILE its first bytes."""
    stored: dict[str, bytes | Exception] = {}
    if addresses := [name for name in names if "://" in name and ADDRESS.match(name)]:
        stored = _downloaded(addresses)
    for name in names:
        if name in stored:
            yield name, stored[name]
            continue
        try:
            data = _content(name)
        except (OSError, ValueError) as error:  # a name that holds NUL is a ValueError
            yield name, error
        else:
            yield name, data


def _content(name: str) -> bytes:
    """The content of a file of this machine. Raises OSError, also for what is no file: a pipe might never end.

    Path and buffers would take as long as the reading of a small file.
    """
    found = os.stat(name)  # noqa: PTH116
    if not stat.S_ISREG(found.st_mode):
        raise OSError(f"{name} is no regular file")
    with io.FileIO(name) as file:
        # Not as much as a file may have: Python takes that memory at once, and gives it back.
        return file.read(min(found.st_size, LARGEST_FILE) + 1)


def _downloaded(addresses: Sequence[str]) -> dict[str, bytes | Exception]:
    """The content of each address: together, because a store answers many requests in the time of one."""
    found: dict[str, bytes | Exception] = {}
    by_store: dict[str, list[str]] = {}
    for address in addresses:
        by_store.setdefault(address.partition("://")[0], []).append(address)
    for together in by_store.values():
        try:
            from fsspec.core import url_to_fs

            systems = [url_to_fs(address) for address in together]
            paths = [path for _, path in systems]
            ends = [LARGEST_FILE + 1] * len(paths)
            parts = systems[0][0].cat_ranges(paths, [0] * len(paths), ends, on_error="return")
        except Exception as error:  # object stores raise kinds of their own
            parts = [error] * len(together)
        found.update(zip(together, parts, strict=True))
    return found


class _Member(tarfile.TarInfo):
    """A member of an archive. A damaged header is an error: tarfile takes all but the first for the archive's end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise  # zeros: the end
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(
                f"damaged or cut short at byte {archive.offset} ({error}); copy it or pack it again"
            ) from error


def _members(shard: Shard) -> Iterator[Item]:
    count = 0
    with open_name(shard.paths[0]) as file, tarfile.open(fileobj=file, mode="r|", tarinfo=_Member) as archive:
        for member in archive:
            if not member.isfile() or not member.name.lower().endswith(SUFFIXES):
                continue
            if member.size > LARGEST_FILE:
                raise tarfile.TarError(f"{member.name} claims {member.size} bytes")
            content = archive.extractfile(member)
            assert content is not None
            data = content.read()
            if len(data) < member.size:
                raise tarfile.TarError(f"{member.name} is cut short")
            yield Item(_id(member.name), data)
            count += 1
        while rest := archive.fileobj.read(1 << 20):
            if rest.strip(b"\0"):
                raise tarfile.ReadError(
                    "there is more behind its end: it is damaged, or two archives in one; pack it again"
                )
    if not count:
        raise SourceError(f"{shard.paths[0]} holds no images ({', '.join(SUFFIXES)})")


def _rows(shard: Shard) -> Iterator[Item]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise SourceError("Parquet needs pyarrow: pip install 'fullrank-server[bulk]'") from error
    with open_name(shard.paths[0]) as file:
        try:
            table = pq.ParquetFile(io.BytesIO(file.read()) if ADDRESS.match(shard.paths[0]) else file)
            column = next((name for name in IMAGE_COLUMNS if name in table.schema_arrow.names), None)
            if column is None:
                there = ", ".join(table.schema_arrow.names)
                raise SourceError(
                    f"{shard.paths[0]}: no column of images; it is called {', '.join(IMAGE_COLUMNS)}; there are {there}"
                )
            names = [column] + (["id"] if "id" in table.schema_arrow.names else [])
            number = 0
            for batch in table.iter_batches(FILES_A_SHARD, columns=names):
                for row in batch.to_pylist():
                    if row.get("id", number) is None:
                        raise SourceError(f"{shard.paths[0]}: row {number} has no id; give each one, or leave `id` out")
                    yield Item(str(row.get("id", number)), *_bytes_of(row[column]))
                    number += 1
        except pa.ArrowException as error:
            raise SourceError(f"{shard.paths[0]}: {error}") from error


def _bytes_of(value: Any) -> tuple[bytes, str]:
    """The image bytes of a cell, plain or as Hugging Face's {"bytes": ..., "path": ...}, or the reason for none."""
    if isinstance(value, dict):
        value = value.get("bytes")
    if isinstance(value, bytes | bytearray | memoryview | np.bytes_):
        return bytes(value), ""
    return b"", f"expected image bytes, got {type(value).__name__}"
