"""Encoders: backbones, heads, the artifact on disk, and the one path from image bytes to embedding."""
