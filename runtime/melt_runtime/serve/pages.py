"""The chat page: a few files of this package, read once. No path of a request reaches the file system."""

from importlib.resources import files

from starlette.responses import Response
from starlette.routing import Route

_TYPES = {
    "index.html": "text/html",
    "chat.css": "text/css",
    "page.js": "text/javascript",
    "engine.js": "text/javascript",
    "conversations.js": "text/javascript",
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src data:; base-uri 'none'; "
    "frame-ancestors 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
PAGES = frozenset({"/", *(f"/{name}" for name in _TYPES if name != "index.html")})
"""Paths of the page."""


def page_routes() -> list[Route]:
    """A route for each of its files."""
    folder = files("melt_runtime.serve") / "page"
    return [
        _route("/" if name == "index.html" else f"/{name}", (folder / name).read_bytes(), kind)
        for name, kind in _TYPES.items()
    ]


def _route(path: str, content: bytes, kind: str) -> Route:
    async def send(_: object) -> Response:
        return Response(content, headers=_HEADERS, media_type=kind)

    return Route(path, send, methods=["GET"])
