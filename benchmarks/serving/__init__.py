"""How close the service comes to a bare decode-and-forward loop, and its peers; `python -m benchmarks.serving`."""
