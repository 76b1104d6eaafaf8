"""Command line ``melt``: says what the package does, decides nothing."""

import argparse
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from melt_runtime.cli import answer, batch, bench, cache, demo, info, plan, serve
from melt_runtime.cli.options import add_json, print_json
from melt_runtime.cli.streams import drop_output, prepare_streams
from melt_runtime.device.doctor import diagnose
from melt_runtime.errors import MeltError
from melt_runtime.version import __version__

_DESCRIPTION = """\
Run MELT looped language models through ONNX Runtime. Depth (--loops) is a knob: more loops, more steps of reasoning,
in the same memory. A model is a folder, a bundle, that melt-export writes; melt demo needs none.
"""
_EPILOG = """\
examples:
  melt demo                                           # the model in this package answers with 1, 2, 3 and 4 loops
  melt generate build/melt-tiny "Ana reports to Ben. Ben reports to Cleo. Who is two levels above Ana?"
  melt generate build/melt-tiny "Ana reports to Ben. Who is one level above Ana?" --loops 1
  melt chat build/melt-tiny                           # several turns, the past is not computed again
  melt batch build/melt-tiny prompts.jsonl --out answers.jsonl    # many prompts from a file, several at a time
  melt plan build/melt-tiny --capacity 4096 --plot plan.png

melt COMMAND --help explains the rest.
"""
_DOCTOR = """\
examples:
  melt doctor
  melt doctor --json
"""

BROKEN_PIPE = 141
"""The exit status of a program that the system ends because nobody reads what it writes."""


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 1 for a failure, 2 for wrong usage, 130 where it is interrupted."""
    debug = False
    try:
        prepare_streams()
        with warnings.catch_warnings():
            warnings.simplefilter("default", RuntimeWarning)
            warnings.showwarning = _show_warning
            args = _parse(argv)
            debug = args.debug
            args.command(args)
        sys.stdout.flush()
    except BrokenPipeError:
        drop_output()
        return BROKEN_PIPE
    except (MeltError, ValueError, OSError) as error:
        if sys.stdout is not None:
            drop_output()
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    try:
        return _parser().parse_args(argv)
    except SystemExit:
        sys.stdout.flush()  # help that nobody reads is a broken pipe too
        raise


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="melt",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"melt {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, add_options, command, text in (
        ("demo", demo.add_options, demo.run, "ask the small model in this package, at several depths"),
        ("generate", answer.add_generate_options, answer.generate, "answer one prompt"),
        ("chat", answer.add_chat_options, answer.chat, "talk in turns; /help lists the commands"),
        ("batch", batch.add_options, batch.run, "answer a file of prompts; goes on where it was stopped"),
        ("serve", serve.add_options, serve.run, "answer over HTTP, with OpenAI's endpoints"),
        ("info", info.add_options, info.run, "what a bundle holds, what it costs beside float32"),
        ("plan", plan.add_options, plan.run, "exact bytes of weights and state, before loading"),
        ("bench", bench.add_options, bench.run, "speed and memory by loops, position, chunk, batch"),
        ("cache", cache.add_options, cache.run, "list the copies that make a second load fast, or delete them"),
        ("doctor", _add_doctor_options, _doctor, "what this machine can run, and what CUDA would lack"),
    ):
        _add(commands, name, add_options, command, text)
    return parser


def _add(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    add_options: Callable[[argparse.ArgumentParser], None],
    command: Callable[[argparse.Namespace], None],
    text: str,
) -> None:
    parser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=command)
    add_options(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _add_doctor_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _DOCTOR
    add_json(parser, "what was found")


def _doctor(args: argparse.Namespace) -> None:
    found = diagnose()
    if args.json:
        print_json(asdict(found))
    else:
        print(found)


if __name__ == "__main__":
    sys.exit(main())
