"""A server of S3's protocol on loopback."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def s3_server() -> Iterator[Any]:
    """The server's file system. It is found as botocore finds any: by the environment. Skips without moto and s3fs."""
    server_of = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = server_of.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        host, port = server.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "a")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "b")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        yield s3fs.S3FileSystem(use_listings_cache=False)
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def contents(store: Any, address: str) -> dict[str, bytes]:
    """name -> bytes of all objects under an address, or of all files in a folder."""
    if "://" not in address:
        return {it.name: it.read_bytes() for it in Path(address).iterdir()}
    return {name.rpartition("/")[2]: store.cat_file(name) for name in store.find(address)}
