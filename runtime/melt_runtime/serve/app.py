"""The endpoints, as an ASGI application over one service."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match
from starlette.types import Receive, Scope, Send

from melt_runtime.errors import MeltError
from melt_runtime.model import MeltModel
from melt_runtime.reply import Part
from melt_runtime.request.result import GenerationResult
from melt_runtime.serve.answers import Writer
from melt_runtime.serve.asks import asks_of, messages_of, needs_grammar
from melt_runtime.serve.compiling import Compiler
from melt_runtime.serve.departing import unless_gone, wait_until_gone
from melt_runtime.serve.errors import Fault, FaultError, FieldError, about, fault_of, fault_of_form
from melt_runtime.serve.following import MAX_TOKEN_LOOPS, Choices, RequestLimits, submit
from melt_runtime.serve.forms import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Generation,
    SessionRequest,
    TokenizeRequest,
)
from melt_runtime.serve.guard import App, Guard
from melt_runtime.serve.metrics import Metrics
from melt_runtime.serve.pages import page_routes
from melt_runtime.serve.reference import documented, reference_page
from melt_runtime.serve.sessions import SessionFiles
from melt_runtime.service import QUEUE, Service
from melt_runtime.version import __version__


@dataclass(frozen=True)
class ServeOptions:
    """How a server treats its clients.

    Attributes:
        name: of the model, by which requests may ask for it.
        key: what a request must show, as ``Authorization: Bearer KEY``; None: nothing.
        origins: of web pages that may ask, ``https://example.org``; none: only the server's own page.
        queue: requests that may wait for a slot.
        sessions: folder of saved conversations; None: there are none.
        most_bytes: of a body.
        body_seconds: that it may take to come.
        answer_seconds: that an answer may take, waiting included.
        max_loops: largest depth that a request may ask for; None: what the model can run.
        hosts: names that the header ``Host`` may have beside addresses; None: any. Without a key, a page of another
            name that was made to lead here must not ask.
    """

    name: str
    key: bytes | None = field(default=None, repr=False)
    origins: tuple[str, ...] = ()
    queue: int = QUEUE
    sessions: Path | None = None
    most_bytes: int = 4 << 20
    body_seconds: float = 30.0
    answer_seconds: float = 3600.0
    max_loops: int | None = None
    hosts: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Application:
    """What a server of ASGI runs.

    Attributes:
        asgi: the application; its service begins with the event loop's lifespan and ends with it.
        drain: takes no request more, and gives those under way so many seconds to end; from any thread.
    """

    asgi: App
    drain: Callable[[float], None]


def make_app(model: MeltModel, options: ServeOptions) -> Application:
    """The application over a model."""
    server = _Server(model, options)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        server.open()
        try:
            yield
        finally:
            await asyncio.to_thread(server.close)

    app = FastAPI(
        title="melt serve",
        version=__version__,
        description="OpenAI's endpoints over a looped language model; `docs/serving.md` explains the fields.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    _add_endpoints(app, server)
    app.router.routes.extend(page_routes(lambda: reference_page(app.openapi())))
    app.add_exception_handler(RequestValidationError, _refuse_form)
    app.add_exception_handler(HTTPException, _refuse_path)
    for kind in (FaultError, MeltError, ValueError):
        app.add_exception_handler(kind, _refuse)
    app.add_exception_handler(Exception, _refuse)
    asgi: App = Guard(app, options.key, options.hosts, options.most_bytes, options.body_seconds, server.count_response)
    if options.origins:
        asgi = CORSMiddleware(
            asgi, allow_origins=options.origins, allow_methods=["GET", "POST", "DELETE"], allow_headers=["*"]
        )
    return Application(asgi, lambda seconds: server.service.close(seconds))


def _add_endpoints(app: FastAPI, server: "_Server") -> None:
    def add(method: str, path: str, endpoint: Callable[..., Any], *about: Any, **more: Any) -> None:
        errors = () if path == "/health" else (401,)
        described = documented(*about, *errors, body=method == "POST", **more)
        app.add_api_route(path, endpoint, methods=[method], **described)

    answering = (400, 404, 429, 500, 503, 504)
    add("POST", "/v1/chat/completions", server.chat, "Answer a chat", "`chat.completion`", *answering,
        events="`chat.completion.chunk`, then `[DONE]`")  # fmt: skip
    add("POST", "/v1/completions", server.complete, "Continue a text", "`text_completion`", *answering,
        events="`text_completion`, then `[DONE]`")  # fmt: skip
    add("GET", "/v1/models", server.models, "List the model", "A list of one `model`")
    add("GET", "/v1/models/{name:path}", server.show_model, "Describe the model", "`model`", 404)
    add("POST", "/tokenize", server.tokenize, "Text or messages to token ids", "`tokens` and their `count`", 400)
    add("POST", "/detokenize", server.detokenize, "Token ids to text", "`text`", 400)
    add(
        "GET", "/health", server.health, "Whether the server takes requests, and its load", "`status` and the load", 503
    )
    add("GET", "/metrics", server.show_metrics, "Metrics for Prometheus", "Prometheus's text format", plain=True)
    add("GET", "/v1/sessions", server.list_sessions, "List the saved conversations", "A list of `session`", 404)
    add("POST", "/v1/sessions", server.save_session, "Save a conversation", "`session`", 400, 404, 409, 503, 507)
    add("POST", "/v1/sessions/{name}/restore", server.restore_session, "Restore a conversation", "`session`",
        400, 404, 409, 429, 503)  # fmt: skip
    add("DELETE", "/v1/sessions/{name}", server.delete_session, "Delete a conversation", "`id` and `deleted`", 400, 404)


class _Server:
    """What the endpoints share.

    Attributes:
        service: answers; there once ``open`` was called.
    """

    service: Service
    _metrics: Metrics

    def __init__(self, model: MeltModel, options: ServeOptions):
        self._model, self._options, self._codec = model, options, model.codec
        self._created = int(time.time())
        self._compiler = Compiler(model.grammars)
        trained = model.session.plan.capacity * model.manifest.model.trained_loops
        self._limits = RequestLimits(options.answer_seconds, max(MAX_TOKEN_LOOPS, trained), options.max_loops)
        self._sessions = SessionFiles(options.sessions)

    def open(self) -> None:
        """Begins."""
        self.service = self._model.new_service(self._options.queue)
        self._metrics = Metrics(self.service, self._model.state_bytes)

    def close(self) -> None:
        """Ends the answers under way, and the processes of grammars."""
        self.service.close()
        self._compiler.close()

    async def chat(self, form: ChatRequest, request: Request) -> Response:
        """``POST /v1/chat/completions``."""
        max_calls = None if form.parallel_tool_calls else 1
        writer = Writer(self._codec, self._options.name, True, form.logprobs, bool(form.offered), max_calls)
        return await self._generate(form, request, writer)

    async def complete(self, form: CompletionRequest, request: Request) -> Response:
        """``POST /v1/completions``."""
        writer = Writer(self._codec, self._options.name, False, form.logprobs is not None, False)
        return await self._generate(form, request, writer)

    async def models(self) -> dict[str, Any]:
        """``GET /v1/models``: the one that is served, and what it can."""
        return {"object": "list", "data": [self._describe_model()]}

    async def show_model(self, name: str) -> dict[str, Any]:
        """``GET /v1/models/{name}``: the same by its name."""
        self._require_model(name)
        return self._describe_model()

    def _describe_model(self) -> dict[str, Any]:
        shape = self._model.manifest.model
        plan = self._model.session.plan
        facts = {
            "capacity": plan.capacity,
            "slots": plan.batch,
            "trained_loops": shape.trained_loops,
            "has_exit_gate": shape.has_exit_gate,
            "has_chat_template": self._codec.chat_template is not None,
            "takes_tools": self._codec.takes_tools,
            "state_bytes": self._model.state_bytes,
        }
        entry = {"id": self._options.name, "object": "model", "created": self._created, "owned_by": "melt"}
        return {**entry, "melt": facts}

    def _require_model(self, name: str | None) -> None:
        if name is not None and name != self._options.name:
            message = f"model must be {self._options.name!r}, the one that is served, got {name!r}"
            raise FaultError(Fault(404, message, param="model", code="model_not_found"))

    def tokenize(self, form: TokenizeRequest) -> dict[str, Any]:
        """``POST /tokenize``."""
        self._require_model(form.model)
        desk = self.service.desk
        with about(form):
            if form.messages is None:
                self._codec.require_length(form.text or "", desk.plan.capacity)
                tokens = self._codec.encode(form.text or "")
            else:
                tokens = desk.encode_chat(messages_of(form.messages), None, form.ending).ids
        return {"tokens": tokens, "count": len(tokens)}

    def detokenize(self, form: DetokenizeRequest) -> dict[str, Any]:
        """``POST /detokenize``."""
        self._require_model(form.model)
        most = self._model.manifest.model.vocab_size
        wrong = [token for token in form.tokens if not 0 <= token < most]
        if wrong:
            raise FieldError("tokens", f"tokens must be in [0, {most}), got {wrong[:8]}")
        return {"text": self._codec.decode(form.tokens)}

    def list_sessions(self) -> dict[str, Any]:
        """``GET /v1/sessions``."""
        return {"object": "list", "data": self._sessions.all()}

    def save_session(self, form: SessionRequest) -> dict[str, Any]:
        """``POST /v1/sessions``: writes what is cached of a conversation; its size is the same at every depth."""
        self._require_model(form.model)
        with about(form):
            messages = messages_of(form.messages)
        with self._sessions.one(form.name, exists=False) as path:
            with about(form):
                tokens = self.service.save(messages, path)
            return {**self._sessions.describe(path), "cached_tokens": tokens}

    def restore_session(self, name: str) -> dict[str, Any]:
        """``POST /v1/sessions/{name}/restore``: what goes on from it finds it in the cache."""
        with self._sessions.one(name, exists=True) as path:
            tokens = self.service.restore(path)
            return {**self._sessions.describe(path), "cached_tokens": tokens}

    def delete_session(self, name: str) -> dict[str, Any]:
        """``DELETE /v1/sessions/{name}``."""
        with self._sessions.one(name, exists=True) as path:
            path.unlink()
        return {"id": name, "object": "session", "deleted": True}

    async def health(self) -> Response:
        """``GET /health``: 503 where no request is taken any more."""
        is_open = self.service.is_open
        values = {"status": "ok" if is_open else "closing", **asdict(self.service.load)}
        return JSONResponse(values, 200 if is_open else 503)

    async def show_metrics(self) -> Response:
        """``GET /metrics``."""
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    def count_response(self, path: str, status: int) -> None:
        """Counts a response by path and status."""
        self._metrics.responses.labels(path, status).inc()

    async def _generate(self, form: ChatRequest | CompletionRequest, request: Request, writer: Writer) -> Response:
        self._require_model(form.model)
        with about(form):
            if needs_grammar(form):  # which takes its time: other requests do not wait for it
                work = self._compiler.run(lambda: asks_of(form, self.service.desk, self._compiler.compile))
                asks = await unless_gone(request, work)
            else:
                asks = await asyncio.to_thread(asks_of, form, self.service.desk, self._compiler.compile)
            writer.contexts = [ask.prompt.ids if ask.prompt.continues else () for ask in asks]
            choices = await submit(self.service, asks, self._limits, self._metrics.count)
        prompts = len(asks) // form.n
        if form.stream:
            writer.with_usage = form.stream_options is not None and form.stream_options.include_usage
            return _EventStream(choices, self._events(choices, writer, prompts, form))
        results: dict[int, GenerationResult] = {}
        gone = asyncio.ensure_future(wait_until_gone(request))
        gone.add_done_callback(lambda _: choices.cancel())
        try:
            with about(form):
                async with aclosing(choices.follow()) as following:
                    async for index, came in following:
                        if isinstance(came, GenerationResult):
                            results[index] = came
        finally:
            gone.cancel()
        ordered = [results[index] for index in range(len(results))]
        # In a thread: with log probabilities it may be megabytes, and the event loop serves everyone.
        return await asyncio.to_thread(lambda: JSONResponse(writer.whole(ordered, prompts)))

    async def _events(
        self, choices: Choices, writer: Writer, prompts: int, form: Generation
    ) -> AsyncGenerator[bytes, None]:
        """Server-sent events of one stream; an error in its middle is its last one."""
        results: dict[int, GenerationResult] = {}
        try:
            if writer.is_chat:
                for index in range(len(choices.replies)):
                    yield _event(writer.first(index))
            async with aclosing(choices.follow()) as following:
                async for index, came in following:
                    if isinstance(came, Part):
                        yield _event(writer.part(index, came))
                    else:
                        results[index] = came
                        for values in writer.last(index, came):
                            yield _event(values)
            if writer.with_usage:
                yield _event(writer.usage([results[index] for index in range(len(results))], prompts))
        except Exception as error:
            yield _event(fault_of(error, form).body)
        else:
            yield b"data: [DONE]\n\n"


class _EventStream(StreamingResponse):
    """Events of one stream, whose answers end with it: also where the client goes away before the first event."""

    def __init__(self, choices: Choices, events: AsyncGenerator[bytes, None]):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._choices = choices

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends them."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._choices.cancel()


def _event(values: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(values, ensure_ascii=True).encode() + b"\n\n"


async def _refuse_form(_: Request, error: Any) -> Response:
    return _respond(fault_of_form(list(error.errors())))


async def _refuse_path(request: Request, error: Any) -> Response:
    method, path = request.method, request.url.path
    if error.status_code == 404:
        return _respond(Fault(404, f"there is no {method} {path}", code="unknown_url"))
    if error.status_code != 405:
        return _respond(Fault(error.status_code, str(error.detail)))
    allowed: set[str] = set()
    for route in request.app.routes:  # a path may have a route for each of its methods
        if route.matches(request.scope)[0] is not Match.NONE:
            allowed |= route.methods
    names = ", ".join(sorted(allowed))
    response = _respond(Fault(405, f"{path} takes {names}, got {method}", code="method_not_allowed"))
    response.headers["Allow"] = names
    return response


async def _refuse(_: Request, error: Exception) -> Response:
    return _respond(fault_of(error))


def _respond(fault: Fault) -> Response:
    return Response(json.dumps(fault.body), fault.status, fault.headers, "application/json")
