"""The worst image of each format that the default limits let in: what it costs, and where it is decoded.

    python -m benchmarks.worst_images

Each is decoded for an encoder of 224 x 224 in a process of its own, as the service decodes what may take long; CPU
seconds and the peak of its memory are the kernel's. The second table has the largest of each kind that the service
still decodes on a thread of its own, with the bound that its structure promises: its cost must stay below.
"""

import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile

from models import headers
from models.decode import ImageError
from models.preprocess import Preprocessing, decode
from service.encoders.served import SOON
from service.engine.pool import Process, SlowImage
from service.settings import Settings

HOW = Preprocessing(size=224, mean=(0.5,) * 3, std=(0.25,) * 3)
LIMITS = Settings.model_validate({})
PIXELS = {"max_pixels": LIMITS.max_pixels, "max_whole_pixels": LIMITS.max_whole_pixels}
REPEATS = 3
MAX_BODY = LIMITS.max_body_bytes


def noise(side: int, channels: int = 3) -> Image.Image:
    """Colours that compress badly, and repeat after 1,000 pixels."""
    tile = np.random.default_rng(0).integers(0, 256, (min(side, 1000), min(side, 1000), channels), np.uint8)
    times = -(-side // len(tile))
    return Image.fromarray(np.tile(tile, (times, times, 1))[:side, :side])


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    """The image as a file."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def scans(side: int, more: int) -> bytes:
    """A progressive JPEG with its last scan `more` times over."""
    data = saved(noise(side).convert("L").point(lambda value: value // 64 * 64), "JPEG", progressive=True, quality=10)
    last = data.rindex(headers.SCAN)
    return data[:-2] + data[last:-2] * more + data[-2:]


@dataclass(frozen=True)
class Kind:
    """A kind of image by its name, made with a side of so many pixels."""

    name: str
    make: Callable[[int], bytes]
    largest: int  # side that the limits let in


WHOLE, JPEG = int(LIMITS.max_whole_pixels**0.5), int(LIMITS.max_pixels**0.5)
KINDS = (
    Kind("JPEG, noise", lambda side: saved(noise(side), "JPEG", quality=60, subsampling=0), JPEG),
    Kind("JPEG, progressive noise", lambda side: saved(noise(side), "JPEG", quality=50, progressive=True), JPEG),
    Kind("JPEG, one colour", lambda side: saved(Image.new("RGB", (side, side)), "JPEG", subsampling=0), JPEG),
    Kind("JPEG, its last scan eight times", lambda side: scans(side, 7), JPEG),
    Kind("PNG, transparent noise", lambda side: saved(noise(side, 4), "PNG", compress_level=1), WHOLE),
    Kind("PNG, 16 bit", lambda side: saved(sixteen_bits(side), "PNG", compress_level=1), WHOLE),
    Kind("PNG, one colour", lambda side: saved(Image.new("RGBA", (side, side)), "PNG"), WHOLE),
    Kind(
        "WebP, lossless, one colour", lambda side: saved(Image.new("RGBA", (side, side)), "WEBP", lossless=True), WHOLE
    ),
    Kind("WebP, noise", lambda side: saved(noise(side), "WEBP", quality=80, method=0), WHOLE),
    Kind("WebP, transparent noise", lambda side: saved(noise(side, 4), "WEBP", quality=60, method=0), WHOLE),
    Kind("GIF, noise", lambda side: saved(noise(side).quantize(256), "GIF", transparency=3), WHOLE),
    Kind("BMP, 1 bit", lambda side: saved(noise(side).convert("1"), "BMP"), WHOLE),
    Kind("BMP, one colour", lambda side: saved(Image.new("RGB", (side, side)), "BMP"), 3300),
)


def sixteen_bits(side: int) -> Image.Image:
    """Grey noise of 16 bits a pixel."""
    return Image.fromarray(np.asarray(noise(side).convert("L")).astype(np.uint16) * 257)


def apart(data: bytes) -> tuple[float, float, str]:
    """CPU seconds and peak MiB of a process that decodes this image, and what came of it."""
    process = Process(LIMITS.decode_seconds, LIMITS.decode_memory_bytes)
    try:
        small = saved(noise(64), "PNG")
        process.decode(SlowImage(small, HOW, refused=ValueError, **PIXELS), lambda: True)
        before = usage(process.identity)
        try:
            process.decode(SlowImage(data, HOW, refused=ValueError, **PIXELS), lambda: True)
            outcome = "decoded"
        except ImageError as error:
            outcome = error.code
        if not process.running:
            return LIMITS.decode_seconds, float("nan"), outcome
        after = usage(process.identity)
        return after[0] - before[0], after[1], outcome
    finally:
        process.stop()


def usage(process: int) -> tuple[float, float]:
    """CPU seconds of a process so far and the peak of its resident memory in MiB."""
    nanoseconds = int(Path(f"/proc/{process}/schedstat").read_text().split()[0])
    status = Path(f"/proc/{process}/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return nanoseconds / 1e9, peak / 1024


def here(kind: Kind) -> tuple[int, int, float, float]:
    """Side, bytes, bound and least CPU seconds of the largest of a kind that the service decodes on its own threads."""
    low, high = 8, kind.largest
    while high - low > 8:
        middle = (low + high) // 2
        low, high = (middle, high) if headers.seconds(kind.make(middle)) <= SOON else (low, middle)
    data, seconds = kind.make(low), []
    for _ in range(REPEATS):
        started = time.thread_time()
        decode(data, HOW, **PIXELS)
        seconds.append(time.thread_time() - started)
    return low, len(data), headers.seconds(data), min(seconds)


def main() -> None:
    ImageFile.MAXBLOCK = 2**27  # or Pillow refuses to write a JPEG of noise
    print("| image | pixels | bytes | CPU s | peak MiB | |\n" + "|---" * 6 + "|")
    worst = memory = 0.0
    for kind in KINDS:
        data, side = kind.make(kind.largest), kind.largest
        while len(data) > MAX_BODY:
            side = int(side * 0.9)
            data = kind.make(side)
        seconds, peak, outcome = apart(data)
        worst, memory = max(worst, seconds), max(memory, peak)
        print(f"| {kind.name} | {side} x {side} | {len(data):,} | {seconds:.2f} | {peak:.0f} | {outcome} |", flush=True)
    print(f"\nThe worst takes {worst:.2f} s of CPU; the most memory is {memory:.0f} MiB.\n")
    print("| image | pixels | bytes | promised, ms | CPU, ms |\n" + "|---" * 5 + "|")
    for kind in KINDS:
        side, length, bound, seconds = here(kind)
        print(f"| {kind.name} | {side} x {side} | {length:,} | {1e3 * bound:.1f} | {1e3 * seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
