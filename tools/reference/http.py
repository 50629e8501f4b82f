"""docs/reference/http.md: every route, from the OpenAPI document."""

import json
from collections.abc import Iterator
from typing import Any

from service.http.openapi import COMMITTED
from tools.reference.text import prose, table

HEAD = """# HTTP

A running service shows this at `/docs`, from its own files. [openapi.json](../openapi.json) has every field, for
programs that generate clients. [Send images](../howto/send-images.md) has examples. `python -m tools.reference` writes
this page.

Where the service has a key, send `Authorization: Bearer KEY`. [Keys](settings.md#keys) says which route needs which.
Every failure is JSON: `error` has a `code`, a `message` and, where one is at fault, a `field`. `/v1` and `/v2` answer
in the shapes of their protocols. 429 and 503 carry `Retry-After`.
"""


def routes(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(method, path, operation) in the document's order."""
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def kind(schema: dict[str, Any]) -> str:
    """A parameter's type in words."""
    if "enum" in schema:
        return ", ".join(f"`{it}`" for it in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(kind(it) for it in schema["anyOf"] if it.get("type") != "null")
    return str(schema.get("type", ""))


def described(parameter: dict[str, Any]) -> str:
    """What a parameter means, in its own words or its schema's."""
    return str(parameter.get("description") or parameter.get("schema", {}).get("description", ""))


def section(method: str, path: str, operation: dict[str, Any]) -> str:
    """One route: what it does, its parameters, the bodies it takes and the statuses it answers with."""
    made = f"\n### {method} {path}\n\n{prose(operation.get('description', operation['summary']))}\n"
    parameters = operation.get("parameters", [])
    if parameters:
        made += "\n" + table(
            ("parameter", "in", "type", "meaning"),
            ((f"`{it['name']}`", it["in"], kind(it.get("schema", {})), prose(described(it))) for it in parameters),
        )
    if bodies := operation.get("requestBody", {}).get("content"):
        made += f"\nBody: {', '.join(f'`{it}`' for it in bodies)}.\n"
    made += f"\nStatuses: {', '.join(sorted(operation['responses']))}.\n"
    return made


def page() -> str:
    document = json.loads(COMMITTED.read_text())
    groups: dict[str, str] = {}
    for method, path, operation in routes(document):
        (tag, *_) = operation.get("tags", ["other"])
        groups[tag] = groups.get(tag, "") + section(method, path, operation)
    return HEAD + "".join(f"\n## {tag.capitalize()}\n{text}" for tag, text in groups.items())
