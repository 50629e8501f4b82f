"""Reads tensors and plain containers from a torch.save file, and replaces all other objects by stubs.

This is safe for untrusted files: the unpickler looks up no class by name. It knows the few that tensors need, and
returns a stub for every other name. A stub accepts every call and does nothing. The stubs are then left out.
"""

import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, ClassVar

import torch

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip file's member: signature, lengths of its name and extra fields
DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class Stub:
    """Stands for an object that is not created. It accepts any call, item and state, and keeps nothing."""

    def __new__(cls, *args: Any, **options: Any) -> "Stub":
        return object.__new__(cls)

    def __init__(self, *args: Any, **options: Any) -> None: ...

    def __call__(self, *args: Any, **options: Any) -> "Stub":
        return self

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, item: Any) -> None: ...

    def extend(self, items: Any) -> None: ...

    def add(self, item: Any) -> None: ...


class Typed:
    """A storage and the type of its elements."""

    def __init__(self, storage: torch.UntypedStorage, dtype: torch.dtype) -> None:
        self.storage = storage
        self.dtype = dtype


def _tensor(typed: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> torch.Tensor | Stub:
    if not isinstance(typed, Typed):
        return Stub()
    return torch.empty(0, dtype=typed.dtype).set_(typed.storage, offset, size, stride)  # checks the bounds


def _parameter(data: Any, *_: Any) -> Any:
    return data


class Reader(pickle.Unpickler):
    """An unpickler of tensors and containers. `left_out` collects the names of all other types.

    storages: gives a storage by its key and its number of bytes. empty: leave the tensors out; only ask for storages.
    """

    KNOWN: ClassVar[dict[tuple[str, str], Any]] = {
        ("collections", "OrderedDict"): OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        ("torch._utils", "_rebuild_parameter"): _parameter,
        ("torch", "Size"): tuple,
    }

    def __init__(
        self, file: IO[bytes], storages: Callable[[str, int], torch.UntypedStorage], empty: bool = False
    ) -> None:
        super().__init__(file, encoding="utf-8")
        self.storages = storages
        self.empty = empty
        self.left_out = set[str]()

    def find_class(self, module: str, name: str) -> Any:
        if known := self.KNOWN.get((module, name)):
            return known
        if module == "torch" and name in DTYPES:
            return type(name, (Stub,), {"dtype": DTYPES[name]})
        self.left_out.add(f"{module}.{name}")
        return type(name, (Stub,), {})

    def persistent_load(self, pid: Any) -> Any:
        """('storage', type, key, device, elements): a storage of the file."""
        kind, storage_type, key, _, elements = pid[:5]
        dtype = getattr(storage_type, "dtype", None)
        if kind != "storage" or dtype is None:
            return Stub()
        storage = self.storages(str(key), int(elements) * dtype.itemsize)
        return Stub() if self.empty else Typed(storage, dtype)


def stripped(path: Path) -> tuple[Any, set[str]]:
    """Read a torch.save file. Returns its tensors and containers, and the names of the types that were left out.

    The tensors are mapped, not read: memory is taken by those that are used later, not by the rest of the file.
    A damaged file may raise any of the exceptions of zip files and pickles.
    """
    mapped = Mapped(path)
    if zipfile.is_zipfile(path):
        content, left_out = _zipped(path, mapped)
    else:
        content, left_out = _legacy(path, mapped)
    return plain(content), left_out


class Mapped:
    """A file in the address space: the system reads a page when it is first used, and may forget it again."""

    def __init__(self, path: Path) -> None:
        self.size = path.stat().st_size
        self._whole = torch.UntypedStorage.from_file(str(path), False, self.size)

    def part(self, start: int, size: int) -> torch.UntypedStorage:
        """The storage of `size` bytes from `start` on. Raises EOFError if the file is shorter."""
        if start < 0 or size < 0 or start + size > self.size:
            raise EOFError("the file ends within its tensors")
        if not size:  # torch maps no empty slice
            return _storage(b"")
        part: torch.UntypedStorage = self._whole[start : start + size]
        return part


def _zipped(path: Path, mapped: Mapped) -> tuple[Any, set[str]]:
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("data.pkl")]
        if len(pickles) != 1:
            raise ValueError("it holds no data.pkl, so torch.save did not write it")
        root = pickles[0].removesuffix("data.pkl")
        found: dict[str, torch.UntypedStorage] = {}

        def storage(key: str, size: int) -> torch.UntypedStorage:
            if key not in found:
                member = archive.getinfo(f"{root}data/{key}")
                if member.file_size < size:
                    raise ValueError(f"storage {key} is shorter than it says")
                if member.compress_type == zipfile.ZIP_STORED:
                    found[key] = mapped.part(_start(archive, member), member.file_size)
                else:  # torch.save does not compress; whoever packed the archive again did
                    found[key] = _storage(archive.read(member))
            return found[key]

        with archive.open(pickles[0]) as file:
            reader = Reader(file, storage)
            return reader.load(), reader.left_out


def _start(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> int:
    """The byte at which a member's content begins: behind its local header, which has a name and extra fields."""
    assert archive.fp is not None
    archive.fp.seek(member.header_offset)
    header = archive.fp.read(LOCAL_HEADER.size)
    signature, name, extra = LOCAL_HEADER.unpack(header) if len(header) == LOCAL_HEADER.size else (b"", 0, 0)
    if signature != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"{member.filename} is not where the archive says")
    return member.header_offset + LOCAL_HEADER.size + int(name) + int(extra)


def _legacy(path: Path, mapped: Mapped) -> tuple[Any, set[str]]:
    """The format before PyTorch 1.6: pickles one after another, then the storages in the order of a list of keys.

    The content's pickle comes before the list. It is read twice: first for the storages' sizes, then with their places.
    """
    sizes: dict[str, int] = {}

    def size_of(key: str, size: int) -> torch.UntypedStorage:
        sizes[key] = size
        return _storage(b"")

    with path.open("rb") as file:
        heads = [Reader(file, size_of).load() for _ in range(3)]
        if heads[0] != LEGACY_MAGIC:
            raise ValueError("torch.save did not write it")
        start = file.tell()
        Reader(file, size_of, empty=True).load()
        keys = [str(key) for key in Reader(file, size_of).load()]
        at = file.tell()
        places: dict[str, torch.UntypedStorage] = {}
        for key in keys:
            at += 8  # skip the number of elements, which the pickle has given
            places[key] = mapped.part(at, sizes[key])
            at += sizes[key]
        file.seek(start)
        reader = Reader(file, lambda key, _: places[key])
        return reader.load(), reader.left_out


def _storage(data: bytes) -> torch.UntypedStorage:
    return (
        torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    ).untyped_storage()


def plain(value: Any, depth: int = 0, seen: dict[int, Any] | None = None) -> Any:
    """Keep tensors, text, numbers and containers of those; None for everything else.

    A container is walked once, however many others hold it: a few bytes of pickle can hold one 2^40 times.
    """
    seen = {} if seen is None else seen
    if depth > 50:
        return None
    if isinstance(value, dict | list | tuple) and id(value) in seen:
        return seen[id(value)]
    if isinstance(value, dict):
        kept: dict[str | int, Any] = seen.setdefault(id(value), {})
        items = ((key, plain(item, depth + 1, seen)) for key, item in value.items() if isinstance(key, str | int))
        kept.update((key, item) for key, item in items if item is not None)
        return kept
    if isinstance(value, list | tuple):
        listed: list[Any] = seen.setdefault(id(value), [])
        listed.extend(plain(item, depth + 1, seen) for item in value)
        return listed
    return value if isinstance(value, torch.Tensor | str | int | float) else None
