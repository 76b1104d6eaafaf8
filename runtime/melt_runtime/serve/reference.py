"""What ``/openapi.json`` says of each endpoint, and ``/docs``, the same as a page; it loads nothing from elsewhere."""

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from pydantic import BaseModel
from starlette.responses import PlainTextResponse

_MEANINGS = {
    400: "The request breaks a rule: `param` names its field, `message` the rule and the value.",
    401: "A key is needed: `Authorization: Bearer KEY`.",
    403: "The header `Host` is not a name of this server.",
    404: "There is no such model, session or address.",
    408: "The body did not arrive in time.",
    409: "The session cannot be used.",
    413: "The body is too large.",
    415: "The header `Content-Type` is not `application/json`.",
    429: "The queue is full: retry after `Retry-After` seconds.",
    500: "The model failed.",
    503: "The server is shutting down.",
    504: "The answer exceeded the time limit.",
    507: "The session cannot be stored.",
}
_OF_BODIES = (408, 413, 415)


class ErrorDetail(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """An error in OpenAI's form."""

    error: ErrorDetail


def documented(
    summary: str, answer: str, *errors: int, body: bool = False, events: str = "", plain: bool = False
) -> dict[str, Any]:
    """Arguments of ``FastAPI.add_api_route`` that describe an endpoint.

    Args:
        summary: the endpoint's task.
        answer: the object that it answers.
        errors: statuses beside 403, and beside those of every body.
        body: whether there is a body.
        events: the object of each event, where the answer can be a stream.
        plain: whether the answer is plain text.
    """
    # FastAPI gives the models of errors the media type of the answer.
    reference = {"schema": {"$ref": "#/components/schemas/ErrorBody"}}
    error: dict[str, Any] = {"content": {"application/json": reference}} if plain else {"model": ErrorBody}
    responses: dict[int | str, dict[str, Any]] = {200: {"description": answer}}
    if events:
        schema = {"type": "string", "description": events}
        responses[200]["content"] = {"text/event-stream": {"schema": schema}}
    for status in sorted({403, *errors, *(_OF_BODIES if body else ())}):
        responses[status] = {**error, "description": _MEANINGS[status]}
    responses["default"] = {**error, "description": "Any other error."}
    kind = {"response_class": PlainTextResponse} if plain else {}
    return {"summary": summary, "description": summary + ".", "responses": responses, **kind}


def reference_page(openapi: Mapping[str, Any]) -> str:
    """The page of ``/docs``.

    Args:
        openapi: the document of ``/openapi.json``.
    """
    parts = []
    for path, methods in openapi["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<h2>{method.upper()} {escape(path)}</h2><p>{escape(operation['description'])}</p>")
            for content in operation.get("requestBody", {}).get("content", {}).values():
                parts.append(f"<p>Body: {_type(content['schema'])}</p>")
            answers = [(escape(status), _text(found)) for status, found in operation["responses"].items()]
            parts.append(_table(("status", "meaning"), answers))
    parts.append("<h1>Objects</h1>")
    for name, schema in openapi["components"]["schemas"].items():
        parts.append(f'<h2 id="{escape(name)}">{escape(name)}</h2><p>{_text(schema)}</p>')
        required = schema.get("required", ())
        rows = [
            (escape(key), _type(field), "required" if key in required else _default(field), _text(field))
            for key, field in schema.get("properties", {}).items()
        ]
        parts.append(_table(("field", "type", "default", "meaning"), rows))
    return _PAGE.format(title=escape(openapi["info"]["title"]), about=_text(openapi["info"]), body="\n".join(parts))


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}: endpoints</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="docs.css">
<h1>{title}</h1>
<p>{about} The same for programs: <a href="openapi.json">openapi.json</a>.</p>
{body}
</html>
"""


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    if not rows:
        return ""
    first = "".join(f"<th>{name}</th>" for name in head)
    rest = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{first}</tr>{rest}</table>"


def _text(values: Mapping[str, Any]) -> str:
    """A description, whose code is between backticks."""
    text = escape(" ".join(values.get("description", "").split()))
    return re.sub("`+([^`]+)`+", r"<code>\1</code>", text)


def _default(field: Mapping[str, Any]) -> str:
    return f"<code>{escape(json.dumps(field['default']))}</code>" if field.get("default") is not None else ""


def _type(schema: Mapping[str, Any]) -> str:
    """A JSON schema in a line."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rsplit("/", 1)[1])
        return f'<a href="#{name}">{name}</a>'
    for key in ("anyOf", "oneOf"):
        if key in schema:
            kinds = [_type(one) for one in schema[key] if one.get("type") != "null"]
            return " or ".join(dict.fromkeys(kinds))
    if "const" in schema or "enum" in schema:
        return " or ".join(
            f"<code>{escape(json.dumps(one))}</code>" for one in schema.get("enum", [schema.get("const")])
        )
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}" if "items" in schema else "list"
    limits = [f"{word} {schema[key]}" for key, word in (("minimum", "from"), ("maximum", "to")) if key in schema]
    return " ".join([escape(schema.get("type", "any")), *limits])
