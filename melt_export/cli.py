"""Command line of the exporter: ``python export.py`` and ``melt-export``."""

import argparse
import logging
import signal
import sys
from pathlib import Path
from types import FrameType

from transformers.utils import logging as transformers_logging

from melt_export.bundle import export_bundle
from melt_models import CheckpointError
from melt_runtime import MeltError
from melt_runtime.manifest import PRECISIONS

_EPILOG = """\
example:
  python export.py models/melt-tiny --out build/melt-tiny
  melt generate build/melt-tiny "Ana reports to Ben. Ben reports to Cleo. Who is two levels above Ana?"
"""


def main(argv: list[str] | None = None) -> int:
    """Exports one checkpoint; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="melt-export",
        description="Trace ONE loop of a MELT or LoopLM checkpoint into ONNX, verify it against torch, write a bundle.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="folder with config.json, safetensors weights, tokenizer.json")
    parser.add_argument("--out", type=Path, required=True, help="bundle folder to make; it must not exist")
    parser.add_argument(
        "--precision",
        default="float32",
        choices=PRECISIONS,
        help="of weights, state and KV cache (default: %(default)s)",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _stop)  # so that a terminated export cleans up as an interrupted one does
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)

    transformers_logging.disable_progress_bar()  # the stages below are the progress
    try:
        manifest = export_bundle(
            args.checkpoint, args.out, args.precision, report=lambda line: print(line, file=sys.stderr)
        )
    except (MeltError, CheckpointError, ValueError, OSError) as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; no bundle was written", file=sys.stderr)
        return 130
    parity = manifest.parity
    print(
        f"{args.out}: {manifest.weight_bytes / 1e6:.2f} MB of {manifest.precision} weights, largest difference from "
        f"torch {max(parity['max_abs_error'].values()):.1e}, {parity['greedy_tokens_equal']} of "
        f"{parity['decode_tokens']} greedy tokens equal"
    )
    return 0


def _stop(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
