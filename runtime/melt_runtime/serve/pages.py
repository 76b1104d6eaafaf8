"""The pages: a few files of this package, read once. No path of a request reaches the file system."""

from collections.abc import Callable
from functools import cache, partial
from importlib.resources import files

from starlette.responses import Response
from starlette.routing import Route

_TYPES = {
    "index.html": "text/html",
    "chat.css": "text/css",
    "page.js": "text/javascript",
    "engine.js": "text/javascript",
    "conversations.js": "text/javascript",
    "docs.css": "text/css",
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src data:; base-uri 'none'; "
    "frame-ancestors 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
PAGES = frozenset({"/", "/docs", "/openapi.json", *(f"/{name}" for name in _TYPES if name != "index.html")})
"""Paths of the pages, and of what they name."""


def page_routes(make_reference: Callable[[], str]) -> list[Route]:
    """A route for each file of the chat page, and ``/docs``.

    Args:
        make_reference: called once, when ``/docs`` is first asked for.
    """
    folder = files("melt_runtime.serve") / "page"
    routes = [_route("/docs", cache(make_reference), "text/html")]
    for name, kind in _TYPES.items():
        content = (folder / name).read_bytes()
        routes.append(_route("/" if name == "index.html" else f"/{name}", partial(bytes, content), kind))
    return routes


def _route(path: str, read: Callable[[], bytes | str], kind: str) -> Route:
    async def send(_: object) -> Response:
        return Response(read(), headers=_HEADERS, media_type=kind)

    return Route(path, send, methods=["GET"])
