"""Reads checkpoints as data: safetensors, or PyTorch's own files, from which only tensors and containers are loaded."""

import hashlib
import json
import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from models.importers.base import SHOWN, Checkpoint, ImportRefusedError, refuse_endless
from models.importers.strip import stripped

RECORDS = ("config.json", "preprocessor_config.json", "open_clip_config.json")
# In a folder, the first of these is the encoder's weights.
USUAL = (
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_pytorch_model.bin",
)
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar")
LARGE = 1 << 25  # bytes of a member of an archive that may be packed at any ratio
PACKED = 20  # times smaller than before; weights that were trained pack to 0.9
# The exceptions that damaged zip files and pickles cause.
DAMAGE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    EOFError,
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    OverflowError,
    RecursionError,
    MemoryError,
    SafetensorError,
    OSError,
)


def read(source: Path, strip: bool = False) -> Checkpoint:
    """Read the checkpoint in a file or a folder, without running any code in it. Raises ImportRefusedError."""
    if not source.exists():
        raise ImportRefusedError(f"{source} does not exist; give a checkpoint file, or a folder that holds one")
    path = _weights(source) if source.is_dir() else source
    refuse_endless(path)
    beside = source.is_dir() or path.name in USUAL
    records = {name: record(path.parent / name) for name in RECORDS if beside and (path.parent / name).is_file()}
    parts = _parts(path)
    digest = hashlib.sha256()
    content: Any = {}
    left_out: set[str] = set()
    for part in parts:
        _hash(part, digest)
        loaded, stubs = _load(part, strip)
        left_out |= stubs
        if len(parts) > 1 and not isinstance(loaded, dict):
            raise ImportRefusedError(f"{part} holds no tensors by name, though {path.name} names it; copy it again")
        content = loaded if len(parts) == 1 else content | loaded
    licence = _licence(path.parent) if beside else ""
    return Checkpoint(content, path, digest.hexdigest(), records, licence, tuple(sorted(left_out)))


def record(path: Path) -> Any:
    """Read a JSON file. Raises ImportRefusedError."""
    try:
        if path.exists() and not path.is_file():
            raise ValueError("no regular file")
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ImportRefusedError(f"{path}: no JSON file ({error})") from error


def _weights(folder: Path) -> Path:
    for name in USUAL:
        if (folder / name).is_file():
            return folder / name
    found = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file())
    if len(found) != 1:
        what = f"{len(found)} checkpoints ({', '.join(it.name for it in found[:SHOWN])})" if found else "no checkpoint"
        raise ImportRefusedError(f"{folder} holds {what}; give the checkpoint file itself")
    return found[0]


def _parts(path: Path) -> Sequence[Path]:
    """The files of a checkpoint: one, or the shards that an index names, all beside it."""
    if not path.name.endswith(".index.json"):
        return [path]
    index = record(path)
    places = index.get("weight_map") if isinstance(index, dict) else None
    shards = sorted({str(name) for name in places.values()}) if isinstance(places, dict) else []
    if not shards or any(Path(name).name != name for name in shards):
        raise ImportRefusedError(f"{path}: an index names files beside it; this one names {shards[:SHOWN]}")
    for name in shards:
        if not (path.parent / name).is_file():
            raise ImportRefusedError(f"{path.parent / name}: missing, though {path.name} names it")
    return [path.parent / name for name in shards]


def _hash(path: Path, digest: Any) -> None:
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)


def _load(path: Path, strip: bool) -> tuple[Any, set[str]]:
    """Load a file. Returns its content and the names of the types that were left out."""
    with path.open("rb") as file:
        start = file.read(9)
    stored = False
    try:
        if len(start) == 9 and start[8:] == b"{":
            with safe_open(path, framework="pt") as tensors:
                return {name: tensors.get_tensor(name) for name in tensors.keys()}, set()  # noqa: SIM118
        if start[:2] == b"PK":
            stored = _refuse_programs(path)
        elif start[:1] != b"\x80":
            raise ImportRefusedError(
                f"{path} is neither a safetensors file nor one that torch.save wrote"
                + ("" if start else " (it is empty)")
            )
        if strip:
            return stripped(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=stored), set()
    except ImportRefusedError:
        raise
    except pickle.UnpicklingError as error:
        raise ImportRefusedError(_blocked(path, error)) from error
    except DAMAGE as error:
        raise ImportRefusedError(
            f"{path} is truncated or damaged: {str(error).partition(chr(10))[0]}; copy it again"
        ) from error


def _refuse_programs(path: Path) -> bool:
    """Refuse archives with programs: torch.export's loader may unpickle anything, and TorchScript runs its code.

    Returns whether nothing in the archive is compressed, so that it can be mapped.
    """
    with zipfile.ZipFile(path) as archive:
        stored = all(it.compress_type == zipfile.ZIP_STORED for it in archive.infolist())
        for it in archive.infolist():
            if it.file_size > LARGE and it.file_size > PACKED * it.compress_size:
                raise ImportRefusedError(
                    f"{path}: its member {it.filename[-100:]} unpacks from {it.compress_size} to {it.file_size} bytes; "
                    "weights do not pack so well, so nothing is unpacked"
                )
        names = [name.partition("/")[2] or name for name in archive.namelist()]
    if any(name.startswith(("code/", "constants.pkl")) for name in names):
        raise ImportRefusedError(f"{path} is a TorchScript archive, which holds code; save the module's state_dict")
    if any(name.endswith((".pt2", "serialized_exported_program.json")) or name.startswith("models/") for name in names):
        raise ImportRefusedError(
            f"{path} is an archive of torch.export, whose loader may run code; export the model to ONNX instead"
        )
    return stored


def _blocked(path: Path, error: Exception) -> str:
    """The reason why torch did not unpickle the file. It names the types other than tensors and containers."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except DAMAGE:
        names = []
    if not names:
        reason = str(error).partition("\n")[0].partition(" In PyTorch 2.6,")[0]  # torch's advice is to run its code
        return f"{path} cannot be read as tensors: {reason}"
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (
        f"{path} holds more than tensors and containers: {', '.join(names[:SHOWN])}{more}. Making such objects may run "
        "code, so they are not made; --strip reads the tensors and leaves those objects out"
    )


def _licence(folder: Path) -> str:
    """The licence in the front matter of a model card beside the weights; empty if there is none."""
    try:
        lines = (folder / "README.md").read_text(errors="replace")[:4096].splitlines()
    except OSError:
        return ""
    if not lines or lines[0].strip() != "---":
        return ""
    found = [line.partition(":")[2].strip().strip("\"'") for line in lines[1:] if line.startswith("license:")]
    return found[0][:100] if found else ""
