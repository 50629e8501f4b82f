"""Every series with a known label exists at zero from the start, and after a swap: a rate needs a zero to rise from."""

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.http.app import create_app
from service.metrics import CODES
from service.settings import Settings
from tests.support.app import Start

pytestmark = pytest.mark.anyio
Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


async def series(client: httpx.AsyncClient) -> Series:
    families = text_string_to_metric_families((await client.get("/metrics")).text)
    return {(it.name, tuple(sorted(it.labels.items()))): it.value for f in families for it in f.samples}


def requests(seen: Series, route: str, code: int) -> float:
    return seen["fullrank_requests_total", (("code", str(code)), ("route", route))]


async def test_all_is_there_before_anything_happens(start: Start) -> None:
    async with start() as (client, _):
        seen = await series(client)
        for route, codes in CODES.items():
            for code in codes:
                assert requests(seen, route, code) == 0
            assert seen["fullrank_request_seconds_count", (("route", route),)] == 0
            assert seen["fullrank_request_seconds_bucket", (("le", "+Inf"), ("route", route))] == 0
        for route in CODES:
            if route.startswith(("/embed", "/v1", "/v2")):
                assert {200, 408, 429, 500, 503, 504} <= set(CODES[route])


def test_the_routes_that_are_counted_are_there() -> None:
    paths = create_app(Settings()).openapi()["paths"]
    assert set(CODES) - {"other"} <= set(paths)
    assert all("post" not in paths[it] for it in set(paths) - set(CODES))


async def test_a_swap_brings_the_series_of_its_revision(start: Start) -> None:
    async with start() as (client, service):
        before = await series(client)
        old = service.current.revision
        swapped = await client.post("/admin/encoders", json={"name": "beta"})
        assert swapped.status_code == 200, swapped.text
        new = service.current.revision
        after = await series(client)
        assert after["fullrank_encoder_images_total", (("model", "beta"), ("revision", new))] == 0

        def of(revision: str, found: Series) -> set[tuple[str, tuple[tuple[str, str], ...]]]:
            named = ("model", "revision")
            return {
                (name, tuple(it for it in labels if it[0] not in named))
                for name, labels in found
                if ("revision", revision) in labels
            }

        assert of(old, before) <= of(new, after)
