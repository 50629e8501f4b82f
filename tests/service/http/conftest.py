"""A server that asks for a key."""

from collections.abc import Callable, Iterator

import pytest

from service.http.app import Server
from service.settings import Settings
from tests.support.process import running
from tests.support.sockets import KEY


@pytest.fixture(scope="module")
def locked(settings: Callable[..., Settings]) -> Iterator[tuple[str, Server]]:
    with running(settings(api_key=KEY)) as both:
        yield both
