"""Every figure we quote, as a command: `python -m benchmarks.NAME`."""
