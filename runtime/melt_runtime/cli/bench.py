"""The command ``melt bench``: its options, the bundles of random weights that it asks the exporter for, its output."""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

from melt_plots import require_picture_path
from melt_runtime.bench.measure import BenchOptions, as_json, machine, read_bandwidth, run_bench
from melt_runtime.bench.report import format_header, format_row, plot_rows
from melt_runtime.bundle.contract import KV_CACHES, PRECISIONS
from melt_runtime.cli.options import names_option, numbers_option, require_writable
from melt_runtime.progress import Line

EPILOG = """\
examples:
  melt bench build/melt-tiny
  melt bench --shape melt-1.6b --shape ouro-1.4b --loops 1,2,4,8 --positions 100,1000,4000 --plot bench.png
  melt bench --shape melt-1.6b:4 --kv-cache float,int8,int4 --positions 16000 --json bench.json
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``melt bench``."""
    defaults = BenchOptions()
    parser.description = (
        "Measure loading, the first token, prompts and decoding on the CPU, each case in a process of its own; a line "
        "of a Markdown table for each, as they come."
    )
    parser.epilog = EPILOG
    parser.add_argument("bundles", nargs="*", type=Path, metavar="BUNDLE", help="folders written by melt-export")
    parser.add_argument(
        "--shape",
        action="append",
        default=[],
        metavar="NAME",
        help="random weights of a published shape (melt-export --help lists them), made by the exporter; NAME:4 takes "
        "4 layers; may be given again",
    )
    parser.add_argument("--precision", default="int4", choices=PRECISIONS, help="of shapes (default: %(default)s)")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("build/bench"),
        metavar="FOLDER",
        help="where shapes are kept (default: %(default)s)",
    )
    for name, text in (
        ("loops", "depths"),
        ("positions", "tokens in the cache when one is decoded"),
        ("chunks", "tokens in parallel in prefill"),
        ("batches", "sequences decoded together"),
    ):
        shown = ",".join(map(str, getattr(defaults, name)))
        parser.add_argument(f"--{name}", type=numbers_option, metavar="N,N", help=f"{text} (default: {shown})")
    parser.add_argument(
        "--kv-cache", type=names_option, metavar="KIND,KIND", help=f"of {', '.join(KV_CACHES)} (default: float)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: one per physical core)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw speed and memory")


def run(args: argparse.Namespace) -> None:
    """Measures and prints row by row.

    Raises:
        ValueError: nothing to measure, a bad number, or a shape without the exporter.
    """
    require_writable(args.json)
    if args.plot is not None:
        require_picture_path(args.plot)
    given = {name: getattr(args, name) for name in ("loops", "positions", "chunks", "batches", "threads")}
    given["kv_caches"] = args.kv_cache
    options = BenchOptions(**{name: value for name, value in given.items() if value is not None})
    bundles = [*args.bundles, *(_shape_bundle(shape, args.precision, args.work) for shape in args.shape)]
    if not bundles:
        raise ValueError("name a bundle or a --shape to measure; see: melt bench --help")
    rows = []
    with Line("case") as line:
        line("reading memory", 0, 0)
        bandwidth = read_bandwidth(options.threads)
        line.print("; ".join(f"{name} {value}" for name, value in machine().items()))
        line.print(f"a plain loop reads {bandwidth / 1e9:.1f} GB/s\n\n{format_header()}")
        for row in run_bench(bundles, options, line):
            rows.append(row)
            line.print(format_row(row, bandwidth))
    if args.json is not None:
        args.json.write_text(json.dumps(as_json(rows, options, bandwidth), indent=1) + "\n", encoding="utf-8")
    if args.plot is not None:
        plot_rows(rows, args.plot)


def _shape_bundle(shape: str, precision: str, work: Path) -> Path:
    """The bundle of a shape, made once by the exporter in a process of its own."""
    bundle = work / f"{shape.replace(':', '-')}-{precision}"
    if bundle.is_dir():
        return bundle
    if any(importlib.util.find_spec(name) is None for name in ("torch", "melt_export")):
        raise ValueError("--shape needs the exporter: pip install 'melt-onnx[export]'")
    command = [
        sys.executable,
        "-m",
        "melt_export.cli",
        "--shape",
        shape,
        "--precision",
        precision,
        "--out",
        str(bundle),
    ]
    done = subprocess.run(command, stdout=sys.stderr, check=False)
    if done.returncode:
        raise ValueError(f"--shape {shape} could not be made: see the exporter's message above")
    return bundle
