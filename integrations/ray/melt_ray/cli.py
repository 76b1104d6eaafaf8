"""The command ``melt-ray``: batches over a cluster, and the fingerprint of a bundle."""

import argparse
import sys
from pathlib import Path

from melt_runtime.cli.options import add_answer_options, answer_settings, most_loops
from melt_runtime.cli.streams import prepare_streams
from melt_runtime.errors import MeltError
from melt_runtime.progress import Line

_EPILOG = """\
examples:
  melt-ray batch prompts.jsonl --bundle build/melt-tiny --out answers
  melt-ray batch prompts.jsonl more.parquet --bundle build/melt-tiny --out deep --loops 4 --actors 8 --cpus 4
  melt-ray batch chats --column messages --bundle build/melt-tiny --out told --format jsonl

The answers stand in OUT/parts, a file for each range of rows: file, row, text, finish_reason, tokens, loops_per_token,
prompt_tokens, passes, seconds, error. The same command again goes on where it was stopped. The cluster is the one of
RAY_ADDRESS or --address, else one of this machine alone, which ends with the command.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 1 for a failure, 2 for wrong usage, 130 where it is interrupted."""
    prepare_streams()
    args = _parser().parse_args(argv)
    try:
        args.command(args)
    except (MeltError, ValueError, OSError) as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="melt-ray", description="MELT models on a Ray cluster.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    about = "answer files of prompts on all nodes; goes on where it was stopped"
    one = commands.add_parser(
        "batch", help=about, description=about, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_batch(one)
    about = "what a deployment's fingerprint must be, for a bundle that not every node has"
    one = commands.add_parser("fingerprint", help=about, description=about)
    one.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder written by melt-export")
    one.set_defaults(command=_fingerprint)
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_batch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", nargs="+", type=Path, metavar="SOURCE", help="file that ends in .jsonl or .parquet, or folder of such"
    )
    parser.add_argument("--bundle", type=Path, required=True, metavar="BUNDLE", help="by this path on every node")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="made, or gone on with")
    parser.add_argument("--column", default="prompt", help="with text, messages or token ids (default: %(default)s)")
    parser.add_argument("--raw", action="store_true", help="give every text as it is, without the chat template")
    parser.add_argument("--format", default="parquet", choices=("parquet", "jsonl"), help="default: %(default)s")
    parser.add_argument("--part-rows", type=int, default=256, metavar="N", help="of a part (default: %(default)s)")
    cluster = parser.add_argument_group("the cluster")
    cluster.add_argument("--address", metavar="ADDRESS", help="of its head (default: RAY_ADDRESS, else this machine)")
    cluster.add_argument("--actors", type=int, default=1, metavar="N", help="processes with a model, at most")
    cluster.add_argument("--cpus", type=float, default=1.0, metavar="N", help="of each (default: %(default)g)")
    cluster.add_argument("--gpus", type=float, default=0.0, metavar="N", help="of each (default: %(default)g)")
    cluster.add_argument("--slots", type=int, default=8, metavar="N", help="of each (default: %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="nothing on standard error but errors")
    add_answer_options(parser)
    parser.set_defaults(command=_batch)


def _batch(args: argparse.Namespace) -> None:
    generation = answer_settings(args)
    from melt_ray.job import batch, connect  # here: help needs no Ray
    from melt_ray.settings import BatchSettings

    settings = BatchSettings(
        column=args.column,
        raw=args.raw,
        generation=generation,
        capacity=args.capacity,
        kv_cache=args.kv_cache,
        chunk=args.chunk,
        most_loops=most_loops(generation),
        device=args.device,
        format=args.format,
        part_rows=args.part_rows,
        slots=args.slots,
        actors=args.actors,
        cpus=args.cpus,
        gpus=args.gpus,
        threads=args.threads,
    )
    if args.address is not None:
        connect(address=args.address)
    with Line("row") as line:
        summary = batch(args.source, args.bundle, args.out, settings, lambda *told: line("rows", *told))
    if not args.quiet:
        print(summary.describe(), file=sys.stderr)


def _fingerprint(args: argparse.Namespace) -> None:
    from melt_ray.bundles import fingerprint_of

    print(fingerprint_of(args.bundle))


if __name__ == "__main__":
    sys.exit(main())
