"""The command ``melt serve``: OpenAI's endpoints over HTTP."""

import argparse
import ipaddress
import os
import re
import socket
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from melt_runtime.arguments import real_number, whole_number
from melt_runtime.bundle.contract import MAX_LOOPS
from melt_runtime.cli.options import add_bundle, add_sizes, load_model
from melt_runtime.memory.plan import MAX_BATCH
from melt_runtime.service import QUEUE

KEY_VARIABLE = "MELT_API_KEY"
_SLOTS = 8
_SHORTEST_KEY = 16
_EPILOG = f"""\
examples:
  melt serve build/melt-tiny
  curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"messages": [{{"role": "user", "content": "Ana reports to Ben. Who is one level above Ana?"}}], "loops": 2}}'
  melt serve build/melt-tiny --host 0.0.0.0 --api-key-file key.txt --slots 16 --kv-cache int8

With the official client: OpenAI(base_url="http://127.0.0.1:8080/v1", api_key="none"); our own fields, such as loops,
go into extra_body. Endpoints: /v1/chat/completions, /v1/completions, /v1/models, /tokenize, /detokenize, /health,
/metrics. A field that is not supported is refused by name.

An API key comes from a file or from the environment variable {KEY_VARIABLE}, never from an argument, which every user
of the machine could read.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``melt serve``."""
    parser.description = (
        "Answer over HTTP, with OpenAI's endpoints: several requests in every pass, each with a depth of its own. "
        "Memory is allocated once, and said before."
    )
    parser.epilog = _EPILOG
    add_bundle(parser)
    network = parser.add_argument_group("the network")
    network.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="to listen on (default: %(default)s)")
    network.add_argument("--port", type=int, default=8080, help="to listen on; 0: a free one (default: %(default)s)")
    network.add_argument("--api-key-file", type=Path, metavar="FILE", help="with the key that requests must show")
    network.add_argument("--no-key", action="store_true", help="let everybody ask who can reach the address")
    network.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="name by which clients may ask for a server without a key, beside localhost, addresses and this machine's "
        "name; may be given again (default: none)",
    )
    network.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="URL",
        help="of a web page that may ask, https://example.org; may be given again (default: none)",
    )
    limits = parser.add_argument_group("the limits")
    limits.add_argument(
        "--slots", type=int, default=_SLOTS, metavar="N", help="answered side by side (default: %(default)s)"
    )
    limits.add_argument(
        "--queue", type=int, default=QUEUE, metavar="N", help="that may wait for a slot (default: %(default)s)"
    )
    limits.add_argument(
        "--timeout", type=float, default=3600.0, metavar="SECONDS", help="of an answer (default: %(default)g)"
    )
    limits.add_argument(
        "--drain",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="for answers under way at the end (default: %(default)g)",
    )
    limits.add_argument("--sessions", type=Path, metavar="DIR", help="folder in which requests may keep conversations")
    limits.add_argument(
        "--parse-special",
        action="store_true",
        help="encode names of control tokens in chat messages as these tokens: only for messages that you wrote",
    )
    machine = parser.add_argument_group("the machine")
    machine.add_argument("--name", metavar="NAME", help="of the model, to ask for it (default: the bundle's folder)")
    machine.add_argument(
        "--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1 ..., or auto (default: %(default)s)"
    )
    machine.add_argument("--threads", type=int, metavar="N", help="on the CPU (default: one per physical core)")
    machine.add_argument(
        "--most-loops",
        type=int,
        metavar="N",
        help="largest depth that a request may ask for; a LoopLM has a cache for each loop (default: for a LoopLM as "
        "trained, for MELT any)",
    )
    add_sizes(machine, "of each slot: prompt and answer together")
    parser.set_defaults(cuda_graphs=False)


def run(args: argparse.Namespace) -> None:
    """Serves until it is told to end.

    Raises:
        MeltError: the bundle cannot be loaded.
        ValueError: an option outside its rule, or an address that needs a key.
        OSError: the address cannot be listened on.
    """
    if not all(map(find_spec, ("fastapi", "uvicorn", "prometheus_client"))):
        raise ValueError("melt serve needs its web framework: pip install 'melt-onnx[serve]'")
    key = read_key(args.api_key_file, os.environ.get(KEY_VARIABLE))
    require_key(args.host, key, args.no_key)
    whole_number("--port", args.port, 0, 65535)
    whole_number("--slots", args.slots, 1, MAX_BATCH)
    whole_number("--queue", args.queue, 1, 1 << 20)
    for name in ("timeout", "drain"):
        real_number(f"--{name}", getattr(args, name), "above 0, at most a day", lambda value: 0 < value <= 86400)
    if args.most_loops is not None:
        whole_number("--most-loops", args.most_loops, 1, MAX_LOOPS)
    if args.sessions is not None and not args.sessions.is_dir():
        raise ValueError(f"--sessions must be a folder that exists, got {str(args.sessions)!r}: make it first")
    hosts = _names(args.host, args.allow_host) if key is None else None
    from melt_runtime.serve.app import ServeOptions, make_app  # here: other commands do without the framework
    from melt_runtime.serve.connections import ConnectionLimits
    from melt_runtime.serve.listening import bound, listen

    with bound(args.host, args.port) as listener:  # before the model is loaded, which takes long
        model = load_model(args, quiet=False, loops=args.most_loops, slots=args.slots)
        model.codec.parse_special = args.parse_special
        options = ServeOptions(
            name=args.name or args.bundle.resolve().name,
            key=key,
            origins=tuple(args.cors_origin),
            queue=args.queue,
            sessions=args.sessions,
            answer_seconds=args.timeout,
            max_loops=args.most_loops,
            hosts=hosts,
        )
        who = "requests with the key" if key else "everybody who can reach it"
        print(f"slots: {args.slots}, then {args.queue} may wait; for {who}", file=sys.stderr)
        limits = ConnectionLimits.for_process(args.slots + args.queue, args.timeout)
        listen(make_app(model, options), listener, args.host, args.drain, limits)


def read_key(file: Path | None, variable: str | None) -> bytes | None:
    """The API key, from a file or else the environment.

    Raises:
        ValueError: it is short, or holds something else than printable characters.
        OSError: the file cannot be read.
    """
    if file is None and variable is None:
        return None
    key = (variable or "").encode("utf-8", "surrogateescape") if file is None else file.read_bytes()
    key, where = key.strip(), KEY_VARIABLE if file is None else str(file)
    if len(key) < _SHORTEST_KEY or not all(33 <= byte <= 126 for byte in key):
        raise ValueError(
            f"the API key in {where} must be one word of at least {_SHORTEST_KEY} printable ASCII characters: "
            "python -c 'import secrets; print(secrets.token_urlsafe())' makes one"
        )
    return key


def require_key(host: str, key: bytes | None, no_key: bool) -> None:
    """Refuses to open a network to everybody by accident.

    Raises:
        ValueError: an address beyond this machine without a key, or a key that nobody shall show.
    """
    if no_key and key is not None:
        raise ValueError(f"--no-key must be left out where a key is given, by --api-key-file or {KEY_VARIABLE}")
    if key is None and not no_key and not _is_loopback(host):
        raise ValueError(
            f"--host {host} is open to other machines: give --api-key-file FILE, or --no-key to let everybody ask"
        )


def _names(host: str, more: Sequence[str] = ()) -> tuple[str, ...]:
    """Names that requests to a server without a key may have in their header ``Host``, beside addresses.

    Raises:
        ValueError: one of ``more`` is no name of a host.
    """
    for name in more:
        if not re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9._-]{0,253})", name):
            raise ValueError(f"--allow-host must be a name without port, got {name!r}")
    names = ["localhost", *(name.lower().removesuffix(".") for name in more)]
    if not _is_loopback(host):
        machine = socket.gethostname().lower()
        names += [host.lower().removesuffix("."), machine, f"{machine}.local"]
    return tuple(dict.fromkeys(names))


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
