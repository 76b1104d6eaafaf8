"""Command line of the exporter: ``python export.py`` and ``melt-export``."""

import argparse
import logging
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from transformers.utils import logging as transformers_logging

from melt_export.bundle import ExportOptions, export_bundle, export_source
from melt_export.quantize import ROUNDINGS
from melt_export.source import random_source
from melt_models import CheckpointError
from melt_models.shapes import SHAPES, shape_config
from melt_runtime import Manifest, MeltError
from melt_runtime.contract import PRECISIONS
from melt_runtime.memory import format_bytes, resident_bytes

_EPILOG = """\
examples:
  python export.py models/melt-tiny --out build/melt-tiny
  melt generate build/melt-tiny "Ana reports to Ben. Ben reports to Cleo. Who is two levels above Ana?"

  python export.py CHECKPOINT --out build/small --precision int4 --eval-text book.txt
  python export.py CHECKPOINT --out build/mixed --precision int4 --layer '*.gate.*=int8' --layer lm_head=int8
  python export.py --shape melt-1.6b --out build/bench --precision int4      random weights, for benchmarks
"""


def main(argv: list[str] | None = None) -> int:
    """Exports one checkpoint; returns the exit status."""
    args = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _stop)  # so that a terminated export cleans up as an interrupted one does
    begin = time.monotonic()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()  # the stages below are the progress
    try:
        manifest = _export(args)
    except (MeltError, CheckpointError, ValueError, OSError) as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; no bundle was written", file=sys.stderr)
        return 130
    print(_summary(args.out, manifest))
    print(f"took {time.monotonic() - begin:.0f} s and at most {format_bytes(resident_bytes())} of memory")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="melt-export",
        description="Trace ONE loop of a MELT or LoopLM checkpoint into ONNX, quantize it, verify it against torch, "
        "write a bundle.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "checkpoint", nargs="?", type=Path, help="folder with config.json, safetensors weights, tokenizer.json"
    )
    what.add_argument(
        "--shape", help=f"random weights of a published shape instead: {', '.join(SHAPES)}; NAME:4 takes 4 layers"
    )
    parser.add_argument("--out", type=Path, required=True, help="bundle folder to make; it must not exist")
    parser.add_argument(
        "--precision",
        default="float32",
        choices=PRECISIONS,
        help="of the weights (default: %(default)s); float16 is that of activations and KV cache too",
    )
    parser.add_argument(
        "--layer",
        action="append",
        default=[],
        metavar="PATTERN=PRECISION",
        help="another precision for layers whose name matches, such as '*.gate.*=int8'; may be given again",
    )
    parser.add_argument(
        "--rounding",
        default="search",
        choices=ROUNDINGS,
        help="how 4-bit scales are found: searched, or from the largest weight (default: %(default)s)",
    )
    parser.add_argument(
        "--eval-text",
        type=Path,
        metavar="FILE",
        help="text to calibrate and measure on (default: the checkpoint's evaluation.jsonl, else random tokens)",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _export(args: argparse.Namespace) -> Manifest:
    options = ExportOptions(
        precision=args.precision,
        layers=dict(map(_layer, args.layer)),
        rounding=args.rounding,
        text=None if args.eval_text is None else args.eval_text.read_text(encoding="utf-8"),
        verified=args.shape is None,
        report=lambda line: print(line, file=sys.stderr),
    )
    if args.shape is not None:
        return export_source(random_source(shape_config(args.shape)), args.out, options)
    return export_bundle(args.checkpoint, args.out, options)


def _layer(text: str) -> tuple[str, str]:
    pattern, separator, precision = text.partition("=")
    if not separator:
        raise ValueError(f"--layer must be PATTERN=PRECISION, got {text!r}")
    return pattern, precision


def _summary(out: Path, manifest: Manifest) -> str:
    """What was made, in a line or two."""
    line = f"{out}: {manifest.weight_bytes / 1e6:.2f} MB of {manifest.precision} weights"
    if not manifest.parity:
        return f"{line}, not compared with torch"
    parity, quality = manifest.parity, manifest.quality
    cost = quality["kv_cache"]["float"]
    return (
        f"{line}, largest difference from torch {max(parity['max_abs_error'].values()):.1e}, "
        f"{parity['greedy_tokens_equal']} of {parity['decode_tokens']} greedy tokens equal\n"
        f"beside float32, on {quality['text']}: perplexity {cost['perplexity']:.4g} against "
        f"{quality['perplexity_of_float32']:.4g}, KL divergence {cost['kl']:.2g}, first choice equal for "
        f"{100 * cost['greedy_agreement']:.1f} % of {quality['tokens']} tokens"
    )


def _stop(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
