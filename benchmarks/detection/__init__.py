"""The detection benchmark: `python -m benchmarks.detection`."""
