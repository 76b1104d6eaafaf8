"""The command ``melt plan``: what a bundle takes in memory, before it is loaded."""

import argparse
import sys
from pathlib import Path

from melt_plots import require_picture_path
from melt_runtime.bench.plots import plot_plan
from melt_runtime.bundle.manifest import read_manifest
from melt_runtime.cli.options import add_bundle, add_json, add_sizes, print_json
from melt_runtime.memory.estimate import format_plan, plan_memory

_EPILOG = """\
examples:
  melt plan build/melt-tiny
  melt plan build/melt-tiny --loops 16 --batch 4 --kv-cache int8
  melt plan build/melt-tiny --capacity 4096 --plot plan.png
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``melt plan``."""
    parser.description = (
        "Say what a bundle takes in memory, before it is loaded: weights and state exactly, beside what a KV cache for "
        "each loop would take."
    )
    parser.epilog = _EPILOG
    add_bundle(parser)
    add_sizes(parser, "of each sequence")
    add_json(parser, "the bytes")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="sequences (default: %(default)s)")
    parser.add_argument("--loops", type=int, metavar="N", help="depth (default: as many as the model was trained with)")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the state against the loops")


def run(args: argparse.Namespace) -> None:
    """Prints the plan, and draws it.

    Raises:
        MeltError: no such bundle.
        ValueError: sizes that could not be allocated.
    """
    if args.plot is not None:
        require_picture_path(args.plot)
    plan = plan_memory(read_manifest(args.bundle), args.capacity, args.batch, args.loops, args.kv_cache, args.chunk)
    if args.json:
        print_json(plan.as_json())
    else:
        print(format_plan(plan))
    if args.plot is not None:
        plot_plan(plan, args.plot)
        print(f"drew {args.plot}", file=sys.stderr if args.json else sys.stdout)
