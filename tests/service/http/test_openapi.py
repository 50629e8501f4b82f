"""The OpenAPI document: committed as it is made, its examples work, and the service keeps to it."""

import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import hypothesis
import pytest
import schemathesis
from schemathesis.specs.openapi.checks import positive_data_acceptance

from service.http import openapi
from service.http.app import create_app
from service.settings import PRETRAINED, Settings
from tests.support.app import Start
from tests.support.process import running

DOCUMENT: dict[str, Any] = json.loads(openapi.COMMITTED.read_text())
STREAM = "/events"  # does not end; tests/service/http/test_history.py reads it
UPLOAD = "/admin/references/{model}"  # takes binary data alone; tests/service/watching/test_sidecar_bodies.py sends it
APART = STREAM, UPLOAD
OPERATIONS = [(method, path) for path, methods in DOCUMENT["paths"].items() for method in methods if path not in APART]
VALUES = {"{name}": "fashion-byol", "{version}": "26bac791d1d4"}
BINARY = {("get", "/moments")}  # its answer has no text form


def test_the_committed_document_is_what_the_service_says() -> None:
    made = openapi.text(create_app(Settings()))
    assert openapi.COMMITTED.read_text() == made, "docs/openapi.json is not up to date; run make openapi"


@pytest.fixture(scope="module")
async def pretrained(start: Start) -> AsyncIterator[httpx.AsyncClient]:
    async with start(encoder=PRETRAINED / "fashion-byol", encoders_dir=PRETRAINED) as (client, _):
        yield client


@pytest.mark.anyio
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
async def test_every_operation_has_an_example_that_works(pretrained: httpx.AsyncClient, method: str, path: str) -> None:
    operation = DOCUMENT["paths"][path][method]
    status = min(operation["responses"])
    content = operation["responses"][status]["content"]
    example = next((media["example"] for media in content.values() if "example" in media), None)
    assert example is not None or (method, path) in BINARY
    sent = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    model = DOCUMENT["components"]["schemas"].get(sent.get("schema", {}).get("$ref", "").rpartition("/")[2], {})
    body = sent.get("example", model.get("example"))
    assert (body is not None) == (method == "post")
    for name, value in VALUES.items():
        path = path.replace(name, value)
    response = await pretrained.request(method, path, json=body)
    assert response.status_code == int(status), response.text
    if isinstance(example, dict):
        assert_has_the_fields_of(response.json(), example)


def assert_has_the_fields_of(value: Any, example: Any) -> None:
    """All that the example shows is there in a real answer, down to the leaves."""
    if value is None:  # not known yet
        return
    if isinstance(example, dict):
        assert example.keys() <= value.keys()
        for key in example.keys() & value.keys():
            assert_has_the_fields_of(value[key], example[key])
    elif isinstance(example, list) and isinstance(value, list) and example and value:
        assert_has_the_fields_of(value[0], example[0])
    elif example is not None and value is not None:
        assert isinstance(value, int | float) if isinstance(example, int | float) else type(value) is type(example)


@pytest.fixture(scope="module")
def url(settings: Callable[..., Settings]) -> Iterator[str]:
    limits = {"max_images_per_request": 4, "max_pending_images": 4, "max_body_bytes": 65536, "request_timeout": 120}
    with running(settings(**limits)) as (address, _):
        yield address


schema = schemathesis.openapi.from_path(openapi.COMMITTED).exclude(path=STREAM).exclude(path=UPLOAD)
# Text that the schema allows is hardly ever an image, so 422 is the right answer to most of it.
EXCLUDED = [positive_data_acceptance]


def keeps_to_the_document(case: Any, url: str) -> None:
    """Send a generated request and check the answer in every way but one."""
    case.headers.pop("X-Request-Timeout", None)  # with a tiny one, any request may time out
    case.call_and_validate(base_url=url, excluded_checks=EXCLUDED, timeout=240)


def fuzzed(examples: int, derandomize: bool) -> hypothesis.settings:
    return hypothesis.settings(
        max_examples=examples,
        derandomize=derandomize,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


@schema.parametrize()
@fuzzed(5, derandomize=True)
def test_it_answers_generated_requests_as_documented(case: Any, url: str) -> None:
    keeps_to_the_document(case, url)


@pytest.mark.soak
@schema.parametrize()
@fuzzed(200, derandomize=False)
def test_it_answers_many_generated_requests_as_documented(case: Any, url: str) -> None:
    keeps_to_the_document(case, url)
