"""Files of a few bytes that cost a decoder seconds."""

import base64
import io
import struct

from PIL import Image

# 6,250,000 x 8 pixels in 96 bytes: each run-length encoded row is padded in a Python loop.
RLE_BITMAP = base64.b64decode(
    "Qk1gAAAAAAAAAD4AAAAoAAAAEF5fAAgAAAABAAgAAQAAACIAAAAAAAAAAAAAAAIAAAACAAAAAAAAAAAAAAABAAAAAQAAAAEAAAABAAAAAQAAAAEA"
    "AAABAAAAAQAAAAAB"
)
_WEBP = base64.b64decode("UklGRhoAAABXRUJQVlA4TA0AAAAvnpvnFgcQERGIiP4HAA==")  # 7071 x 7071


def webp(width: int, height: int) -> bytes:
    """34 bytes of lossless WebP of this size, 16,384 a side at most."""
    bits = (width - 1) | (height - 1) << 14 | 1 << 28
    return _WEBP[:21] + bits.to_bytes(4, "little") + _WEBP[25:]


def repeated_scans(width: int, height: int, times: int) -> bytes:
    """A progressive grey JPEG whose last scan comes `times` more, some 55 bytes each."""
    file = io.BytesIO()
    Image.new("L", (width, height), 99).save(file, "JPEG", progressive=True)
    data, at, segments = file.getvalue(), 2, []
    while data[at + 1] != 0xD9:
        end = at + 2 + struct.unpack(">H", data[at + 2 : at + 4])[0]
        if data[at + 1] == 0xDA:
            while data[end] != 0xFF or data[end + 1] in (0, *range(0xD0, 0xD8)):
                end += 1
        segments.append(data[at:end])
        at = end
    return data[:2] + b"".join(segments) + b"".join(segments[-2:]) * times + data[at:]
