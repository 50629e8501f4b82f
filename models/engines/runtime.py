"""onnxruntime without its telemetry.

From 1.29 on, onnxruntime's Linux packages tell their maker over the network which models a process loads (names of
files and graphs, hashes of weights), unless this variable is set before the library is loaded. They also write a device
id and a database below the home folder.
"""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime  # type: ignore[import-untyped,unused-ignore]

__all__ = ["onnxruntime"]
