"""One replica: the application of ``melt serve`` in a process of a Ray cluster, asked by handle and not by socket."""

import asyncio
from collections.abc import AsyncGenerator

from ray import serve
from uvicorn import Config
from uvicorn.lifespan.on import LifespanOn

from melt_ray.arguments import ServeArgs
from melt_ray.bundles import BundleIdentity, node_name
from melt_ray.exchange import Head, HttpRequest, exchange
from melt_runtime import MeltModel
from melt_runtime.cli.serve import read_key
from melt_runtime.serve.app import ServeOptions, make_app

REPLICA_HEADER = b"x-melt-replica"
"""Of every answer: which replica gave it."""


class Engine:
    """A model, its slots and the endpoints over them.

    Ray waits for the requests under way before it ends a replica (``drain_seconds``), then calls ``__del__``.
    """

    async def __init__(self, args: ServeArgs, expected: BundleIdentity):  # type: ignore[misc]  # Ray awaits it
        """Loads the model.

        Raises:
            BundleError, MeltError: this node has not what the others have; or the bundle cannot be loaded.
            OSError, ValueError: the file of the key, or the folder of sessions, is not as it must be on this node.
        """
        expected.require_here()
        key = read_key(args.api_key_file, None) if args.api_key_file else None
        if args.sessions is not None and not args.sessions.is_dir():
            raise ValueError(f"sessions must be a folder on every node, {node_name()} has no {args.sessions}: make it")
        self._name = serve.get_replica_context().replica_id.unique_id.encode()
        model = await asyncio.to_thread(
            MeltModel.load,
            args.bundle,
            device=args.device,
            capacity=args.capacity,
            loops=args.most_loops,
            threads=args.threads_of_replica,
            kv_cache=args.kv_cache,
            chunk=args.chunk,
            slots=args.slots,
        )
        options = ServeOptions(
            name=args.model_name,
            key=key,
            origins=args.cors_origins,
            queue=args.queue_of_replica,
            sessions=args.sessions,
            most_bytes=args.most_bytes,
            answer_seconds=args.answer_seconds,
            max_loops=args.most_loops,
        )
        self._app = make_app(model, options)
        self._lifespan = LifespanOn(Config(self._app.asgi, lifespan="on", log_config=None))
        await self._lifespan.startup()

    async def answer(self, request: HttpRequest) -> AsyncGenerator[Head | bytes, None]:
        """The answer to a request: its head, then its body in pieces. Cancelled, it frees its slot."""
        async for message in exchange(self._app.asgi, request):
            if isinstance(message, Head):
                yield Head(message.status, (*message.headers, (REPLICA_HEADER, self._name)))
            else:
                yield message

    async def check_health(self) -> None:
        """Asked by Ray again and again: a replica that fails is replaced.

        Raises:
            RuntimeError: the service takes no requests any more.
        """
        async for message in exchange(self._app.asgi, HttpRequest("GET", "/health")):
            if isinstance(message, Head) and message.status != 200:
                raise RuntimeError(f"GET /health must give 200, got {message.status}: the service has ended")

    async def __del__(self) -> None:
        """Ends what Ray did not wait for, each with an error of its own."""
        self._app.drain(0.0)
        await self._lifespan.shutdown()
