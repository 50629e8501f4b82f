"""The process that decodes images for the pool. The kernel limits its memory and its CPU time for each image.

It does not import torch. Requests come on standard input and answers leave on standard output. Each is a frame: the
length of a JSON head, the length of the rest, the head, the rest. The parent handles the death of this process.
"""

import json
import resource
import signal
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from models.decode import ImageError
from models.preprocess import Preprocessing, decode

FRAME = struct.Struct("<II")


def write_frame(file: BinaryIO, head: Mapping[str, Any], rest: bytes = b"") -> None:
    """Write a frame and flush it. Raises OSError if the other process is gone."""
    text = json.dumps(head).encode()
    file.write(FRAME.pack(len(text), len(rest)) + text)
    file.write(rest)
    file.flush()


def read_frame(file: BinaryIO) -> tuple[dict[str, Any], bytes] | None:
    """Read the next frame; None at the end of the file."""
    if len(lengths := file.read(FRAME.size)) < FRAME.size:
        return None
    head, rest = FRAME.unpack(lengths)
    content = file.read(head + rest)
    return (json.loads(content[:head]), content[head:]) if len(content) == head + rest else None


def limit_memory(more: int) -> None:
    """Let this process map `more` bytes beyond what it maps now, and write no core file when it is killed."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + more, mapped + more))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def answer(head: dict[str, Any], data: bytes, seconds: float) -> tuple[dict[str, Any], bytes]:
    """Decode the image of a request. Returns the pixels and their shape, or the error of the image.

    After `seconds` of CPU the kernel ends the process.
    """
    signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF, whose default is to end the process
    try:
        limits = {name: head[name] for name in ("max_pixels", "max_whole_pixels")}
        pixels = decode(data, Preprocessing.model_validate(head["preprocessing"]), **limits)
    except ImageError as error:
        return {"code": error.code, "message": str(error)}, b""
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return {"shape": pixels.shape}, pixels.tobytes()


def main() -> None:
    memory = int(sys.argv[1])
    seconds = float(sys.argv[2])
    limit_memory(memory)
    while (request := read_frame(sys.stdin.buffer)) is not None:
        write_frame(sys.stdout.buffer, *answer(*request, seconds))


if __name__ == "__main__":
    main()
