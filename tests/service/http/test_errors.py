"""One table gives every failure below HTTP its status, and each protocol its own shape of it."""

import orjson
import pytest

from service import failures
from service.http.errors import LONGEST_FIELD, LONGEST_MESSAGE, STATUS, respond


def test_every_kind_of_failure_has_a_status() -> None:
    kinds = {it for it in vars(failures).values() if isinstance(it, type) and issubclass(it, failures.ServiceError)}
    assert set(STATUS) == kinds - {failures.ServiceError}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/embed", {"error": {"code": "no_such_thing", "message": "it is not here", "field": "model"}}),
        (
            "/v1/embeddings",
            {
                "error": {
                    "message": "it is not here",
                    "type": "invalid_request_error",
                    "param": "model",
                    "code": "no_such_thing",
                }
            },
        ),
        ("/v2/models/x/infer", {"error": "model: it is not here"}),
    ],
)
def test_a_failure_becomes_an_answer_in_the_shape_of_its_route(path: str, body: dict[str, object]) -> None:
    failure = failures.NotFoundError("no_such_thing", "it is not here", field="model", retry_after=7)
    response = respond(path, failure)
    assert response.status_code == 404
    assert response.headers["retry-after"] == "7"
    assert orjson.loads(response.body) == body


@pytest.mark.parametrize("path", ["/embed", "/v1/embeddings", "/v2/models/x/infer"])
def test_what_a_client_sent_is_quoted_in_part_only(path: str) -> None:
    failure = failures.NotFoundError("no_such_thing", f"no encoder {'a' * 10_000!r}; there are: b", field="f" * 10_000)
    content = bytes(respond(path, failure).body)
    assert b"no encoder 'aaa" in content
    assert b"; there are: b" in content
    assert len(content) < 1500
    short = failures.NotFoundError("no_such_thing", "m" * LONGEST_MESSAGE, field="f" * LONGEST_FIELD)
    assert b"..." not in bytes(respond(path, short).body)
