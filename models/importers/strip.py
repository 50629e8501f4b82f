"""Reads tensors and plain containers from a torch.save file, and replaces all other objects by stubs.

This is safe for untrusted files: the unpickler looks up no class by name. It knows the few that tensors need, and
returns a stub for every other name. A stub accepts every call and does nothing. The stubs are then left out.
"""

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any, ClassVar

import torch

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
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
    """An unpickler of tensors and containers. `left_out` collects the names of all other types."""

    KNOWN: ClassVar[dict[tuple[str, str], Any]] = {
        ("collections", "OrderedDict"): OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        ("torch._utils", "_rebuild_parameter"): _parameter,
        ("torch", "Size"): tuple,
    }

    def __init__(self, file: IO[bytes], storages: Any) -> None:
        super().__init__(file, encoding="utf-8")
        self.storages = storages
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
        return Typed(self.storages(str(key), int(elements) * dtype.itemsize), dtype)


def stripped(path: Path) -> tuple[Any, set[str]]:
    """Read a torch.save file. Returns its tensors and containers, and the names of the types that were left out.

    A damaged file may raise any of the exceptions of zip files and pickles.
    """
    if zipfile.is_zipfile(path):
        content, left_out = _zipped(path)
    else:
        content, left_out = _legacy(path)
    return plain(content), left_out


def _zipped(path: Path) -> tuple[Any, set[str]]:
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("data.pkl")]
        if len(pickles) != 1:
            raise ValueError("it holds no data.pkl, so torch.save did not write it")
        root = pickles[0].removesuffix("data.pkl")
        read: dict[str, torch.UntypedStorage] = {}

        def storage(key: str, size: int) -> torch.UntypedStorage:
            if key not in read:
                if archive.getinfo(f"{root}data/{key}").file_size < size:
                    raise ValueError(f"storage {key} is shorter than it says")
                read[key] = _storage(archive.read(f"{root}data/{key}"))
            return read[key]

        with archive.open(pickles[0]) as file:
            reader = Reader(file, storage)
            return reader.load(), reader.left_out


def _legacy(path: Path) -> tuple[Any, set[str]]:
    """The format before PyTorch 1.6: pickles one after another, then the storages."""
    storages: dict[str, torch.UntypedStorage] = {}
    limit = path.stat().st_size

    def storage(key: str, size: int) -> torch.UntypedStorage:
        if key not in storages:
            if size > limit:
                raise ValueError(f"storage {key} is longer than the file")
            storages[key] = torch.UntypedStorage(size)  # type: ignore[no-untyped-call]
        return storages[key]

    with path.open("rb") as file:
        heads = [Reader(file, storage).load() for _ in range(3)]
        if heads[0] != LEGACY_MAGIC:
            raise ValueError("torch.save did not write it")
        reader = Reader(file, storage)
        content = reader.load()
        for key in Reader(file, storage).load():
            file.read(8)  # skip the number of elements, which the pickle has given
            target = storages[str(key)]
            data = file.read(target.nbytes())
            if len(data) < target.nbytes():
                raise EOFError("the file ends within its tensors")
            target.copy_(_storage(data))
        return content, reader.left_out


def _storage(data: bytes) -> torch.UntypedStorage:
    return (
        torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    ).untyped_storage()


def plain(value: Any, depth: int = 0) -> Any:
    """Keep tensors, text, numbers and containers of those; None for everything else."""
    if depth > 50:
        return None
    if isinstance(value, dict):
        items = ((key, plain(item, depth + 1)) for key, item in value.items() if isinstance(key, str | int))
        return {key: item for key, item in items if item is not None}
    if isinstance(value, list | tuple):
        return [plain(item, depth + 1) for item in value]
    return value if isinstance(value, torch.Tensor | str | int | float) else None
