"""Command line ``melt``: says what the package does, decides nothing."""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from melt_runtime import cli_bench, cli_demo
from melt_runtime.cli_info import describe_bundle
from melt_runtime.contract import KV_CACHES
from melt_runtime.cuda import CudaOptions
from melt_runtime.doctor import diagnose
from melt_runtime.errors import MeltError
from melt_runtime.generation_config import GENERAL_DEFAULTS, GenerationConfig
from melt_runtime.load_cache import LoadCache, folder_bytes
from melt_runtime.manifest import check_files, read_manifest
from melt_runtime.memory import format_bytes, format_plan, plan_memory
from melt_runtime.model import MeltModel
from melt_runtime.plots import plot_plan
from melt_runtime.process_memory import resident_bytes
from melt_runtime.version import __version__

_DESCRIPTION = """\
Run MELT looped language models through ONNX Runtime. Depth (--loops) is a knob: more loops, more steps of reasoning,
in the same memory.
"""
_EPILOG = """\
examples:
  melt demo                                           the model in this package answers with 1, 2, 3 and 4 loops
  melt generate build/melt-tiny "Ana reports to Ben. Ben reports to Cleo. Who is two levels above Ana?"
  melt generate build/melt-tiny "..." --loops 1       answer with less depth
  melt chat build/melt-tiny                           several turns, the past is not recomputed
  melt plan build/melt-tiny --capacity 32768 --plot plan.png
"""


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 1 for a failure, 2 for wrong usage."""
    args = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], None] = args.command
    try:
        command(args)
    except (MeltError, ValueError, OSError) as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="melt",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"melt {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = _add(commands, "demo", cli_demo.run, "ask the small model in this package, at several depths", bundle=False)
    cli_demo.add_options(demo)

    generate = _add(commands, "generate", _generate, "answer one prompt", bundle=True)
    generate.add_argument("prompt", help="a user's message; '-' reads standard input")
    generate.add_argument("--raw", action="store_true", help="give the prompt as it is, without the chat template")
    generate.add_argument("--quiet", action="store_true", help="print the text only, no costs on standard error")
    _add_generation_options(generate)

    chat = _add(commands, "chat", _chat, "talk in turns; /reset forgets, /quit ends", bundle=True)
    _add_generation_options(chat)

    info = _add(commands, "info", _info, "what a bundle holds, what it costs beside float32", bundle=True)
    info.add_argument("--graphs", action="store_true", help="list every input and output of the graphs")

    plan = _add(commands, "plan", _plan, "exact bytes of weights and state, before loading", bundle=True)
    plan.add_argument("--capacity", type=int, help="tokens per sequence (default: 2048, or the model's most)")
    plan.add_argument("--batch", type=int, default=1, help="sequences (default: %(default)s)")
    plan.add_argument("--loops", type=int, help="depth (default: as trained)")
    plan.add_argument("--kv-cache", default="float", choices=KV_CACHES, help="how it is stored (default: %(default)s)")
    plan.add_argument("--plot", type=Path, metavar="FILE.png", help="draw state against loops")

    bench = _add(commands, "bench", cli_bench.run, "speed and memory by loops, position, chunk, batch", bundle=False)
    cli_bench.add_options(bench)

    cache = _add(
        commands, "cache", _cache, "list the copies that make a second load fast, or delete them", bundle=False
    )
    cache.add_argument("--clear", action="store_true", help="delete them all; they are made again when needed")

    _add(commands, "doctor", _doctor, "what this machine can run, and what CUDA would lack", bundle=False)
    return parser


def _add(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    command: Callable[[argparse.Namespace], None],
    text: str,
    bundle: bool,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(command=command)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if bundle:
        parser.add_argument("bundle", type=Path, help="folder written by melt-export")
    return parser


def _add_generation_options(parser: argparse.ArgumentParser) -> None:
    defaults = GENERAL_DEFAULTS
    parser.add_argument("--loops", type=int, help="depth T (default: as trained)")
    parser.add_argument("--max-new-tokens", type=int, help="default: what is left of the capacity")
    parser.add_argument("--temperature", type=float, help=f"0 is greedy (default: {defaults.temperature})")
    parser.add_argument("--top-k", type=int, help=f"0 keeps all (default: {defaults.top_k})")
    parser.add_argument("--top-p", type=float, help=f"default: {defaults.top_p}")
    parser.add_argument("--min-p", type=float, help=f"default: {defaults.min_p}")
    parser.add_argument("--repetition-penalty", type=float, help=f"default: {defaults.repetition_penalty}")
    parser.add_argument("--seed", type=int, help="repeat a random choice")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end at this text; may be given again")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, or cuda:1 (default: %(default)s)")
    parser.add_argument("--cuda-graphs", action="store_true", help="on CUDA: capture a token's steps and replay them")
    parser.add_argument("--capacity", type=int, help="tokens of all turns (default: 2048, or the model's most)")
    parser.add_argument(
        "--kv-cache", default="float", choices=KV_CACHES, help="how it is stored (default: %(default)s)"
    )


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The generation options that were given; the others keep the bundle's defaults."""
    names = (
        "loops",
        "max_new_tokens",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "seed",
    )
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.stop:
        given["stop"] = tuple(args.stop)
    return given


def _load(args: argparse.Namespace, verbose: bool) -> MeltModel:
    plan = plan_memory(read_manifest(args.bundle), args.capacity, loops=args.loops, kv_cache=args.kv_cache)
    if verbose:
        ours, theirs = format_bytes(plan.state.total_bytes), format_bytes(plan.per_loop.total_bytes)
        print(
            f"memory: {format_bytes(plan.weight_bytes)} of weights + {ours} of state for {plan.state.capacity} tokens "
            f"(with a KV cache per loop: {theirs})",
            file=sys.stderr,
        )
    model = MeltModel.load(
        args.bundle,
        device=args.device,
        capacity=args.capacity,
        loops=args.loops,
        kv_cache=args.kv_cache,
        cuda=CudaOptions(graphs=args.cuda_graphs),
    )
    if verbose:
        print(f"device: {model.provider.device} ({model.provider.reason})", file=sys.stderr)
    return model


def _generate(args: argparse.Namespace) -> None:
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    settings = _settings(args)
    GenerationConfig().with_changes(**settings)  # refuse bad values before the model is loaded
    model = _load(args, verbose=not args.quiet)
    stream = model.stream(prompt, raw=args.raw, **settings)
    for piece in stream:
        print(piece, end="", flush=True)
    print()
    if not args.quiet:
        result, timings = stream.result, stream.result.timings
        print(
            f"loops {result.loops}, prefill {timings.prefill_tokens} tokens at {timings.prefill_rate:.0f}/s, decode "
            f"{timings.decode_tokens} at {timings.decode_rate:.0f}/s, state {format_bytes(result.state_bytes)}, "
            f"process peak {format_bytes(resident_bytes())}, finish: {result.finish_reason}",
            file=sys.stderr,
        )


def _chat(args: argparse.Namespace) -> None:
    settings = _settings(args)
    GenerationConfig().with_changes(**settings)
    session = _load(args, verbose=True).session
    while True:
        try:
            message = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if message == "/quit":
            return
        if message == "/reset":
            session.reset()
            continue
        if not message:
            continue
        try:
            for piece in session.stream(message, **settings):
                print(piece, end="", flush=True)
            print()
        except MeltError as error:
            print(f"error: {error} (/reset forgets the conversation)", file=sys.stderr)


def _info(args: argparse.Namespace) -> None:
    manifest = read_manifest(args.bundle)
    check_files(args.bundle, manifest)
    print(describe_bundle(args.bundle, manifest, graphs=args.graphs))


def _plan(args: argparse.Namespace) -> None:
    plan = plan_memory(read_manifest(args.bundle), args.capacity, args.batch, args.loops, args.kv_cache)
    print(format_plan(plan))
    if args.plot is not None:
        plot_plan(plan, args.plot)
        print(f"drew {args.plot}")


def _cache(args: argparse.Namespace) -> None:
    cache = LoadCache()
    if args.clear:
        cleared = cache.clear()
        print(f"{cache.folder}: freed {format_bytes(cleared.freed)}")
        for path in cleared.left:
            print(f"  left alone, not ours or in use: {path}")
        return
    entries = cache.entries()
    partials = [(folder_bytes(partial.folder), partial.dead) for partial in cache.partials()]
    total = sum(entry.nbytes for entry in entries) + sum(nbytes for nbytes, _ in partials)
    print(f"{cache.folder}: {format_bytes(total)} of at most {format_bytes(cache.limit)}")
    for entry in entries:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.last_used))
        print(f"  {format_bytes(entry.nbytes):>10}  used {used}  {entry.source}")
    for nbytes, dead in partials:
        state = "left by a process that died; the next copy or --clear removes it" if dead else "being made now"
        print(f"  {format_bytes(nbytes):>10}  {state}")


def _doctor(args: argparse.Namespace) -> None:
    print(diagnose())


if __name__ == "__main__":
    sys.exit(main())
