"""Encoders: backbones, heads, the artifact on disk, and the one path from image bytes to embedding."""

import os

# onnxruntime's official builds send usage data to Microsoft, and keep an identifier in the user's cache folder, unless
# this is set before onnxruntime is imported. Nothing here reports anything about its users to anybody.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
