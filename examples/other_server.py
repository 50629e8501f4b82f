"""Put the monitor into a server that is not ours: the standard library's, with Prometheus metrics.

    pip install 'fullrank[prometheus]'
    python examples/other_server.py 8001
    curl -d '[[0.1, 0.5, ...]]' 127.0.0.1:8001/embed      # rows of 16 numbers -> rows of 32
    curl 127.0.0.1:8001/metrics

The handler hands rows over and answers; the statistics happen on the monitor's own thread, and /metrics reads a
snapshot.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from prometheus_client import REGISTRY, generate_latest

from fullrank import SpectrumMonitor
from fullrank.exposition import SpectrumCollector

WEIGHTS = np.random.default_rng(0).normal(size=(16, 32)).astype(np.float32)
monitor = SpectrumMonitor(dimension=32)
REGISTRY.register(SpectrumCollector(lambda: [("projection", "1", monitor)]))


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        try:
            rows = np.array(json.loads(self.rfile.read(int(self.headers["Content-Length"]))), np.float32)
            embeddings = rows @ WEIGHTS
        except (ValueError, TypeError) as error:
            return self.answer(400, str(error).encode())
        monitor.observe(embeddings, keys=[row.tobytes() for row in rows])  # one hot input counts once
        self.answer(200, json.dumps(embeddings.tolist()).encode())

    def do_GET(self) -> None:
        self.answer(200, generate_latest(REGISTRY))

    def answer(self, code: int, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    with ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler) as server:
        print(f"http://127.0.0.1:{server.server_port}", flush=True)
        server.serve_forever()
