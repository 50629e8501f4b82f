"""The service's OpenAPI document; `python -m service.http.openapi` writes docs/openapi.json, which a test compares."""

import json
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from service.http.routes import schemas

COMMITTED = Path(__file__).parents[2] / "docs" / "openapi.json"
DESCRIPTION = """Images in, embeddings out, and a verdict on whether they have collapsed.

Where the service has a key, send it as `Authorization: Bearer KEY`. Every answer carries `X-Request-ID`, the request's
own if it had a sane one. A refusal names the field, the limit and the remedy; 429 and 503 say in `Retry-After` when to
come again."""


def document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document of an app, cached."""
    if app.openapi_schema is None:
        app.openapi_schema = get_openapi(
            title=app.title,
            version=app.version,
            summary=app.summary,
            description=DESCRIPTION,
            routes=app.routes,
            license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
            servers=[{"url": "/"}],
        )
        key = {"type": "http", "scheme": "bearer", "description": "FULLRANK_API_KEY, where it is set."}
        components = app.openapi_schema["components"]
        components["securitySchemes"] = {"key": key}
        models: list[tuple[type[BaseModel], JsonSchemaMode]] = [(model, "validation") for model in schemas.BODIES]
        components["schemas"] |= models_json_schema(models, ref_template=schemas.REFERENCE)[1]["$defs"]
    return app.openapi_schema


def operation_id(route: APIRoute) -> str:
    """The operation's name in generated clients: the function's name, and whether the path names a version."""
    return route.name + ("_of_version" if "{version}" in route.path else "")


def text(app: FastAPI) -> str:
    """The document as text, in the form that is committed."""
    return json.dumps(document(app), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    from service.http.app import create_app
    from service.settings import Settings

    COMMITTED.write_text(text(create_app(Settings.model_validate({}))))
