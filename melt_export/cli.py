"""Command line of the exporter: ``melt-export``, and ``python export.py`` in the repository.

torch and transformers are imported when there is work to do: help and refused arguments need neither.
"""

import argparse
import logging
import signal
import sys
import time
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from melt_export.choices import BLOCKS, PROMPTS, ROUNDINGS
from melt_export.progress import Stages
from melt_export.summary import summarize
from melt_files import require_absent
from melt_models.errors import CheckpointError, missing_package
from melt_models.model_types import KNOWN_TYPES
from melt_models.shapes import SHAPES, shape_config
from melt_runtime import MeltError
from melt_runtime.bundle.contract import ACTIVATIONS, PRECISIONS
from melt_runtime.memory.estimate import format_bytes
from melt_runtime.memory.process import resident_bytes

if TYPE_CHECKING:
    from melt_export.bundle import ExportOptions

_EPILOG = """\
examples:
  melt-export models/melt-tiny --out build/melt-tiny
  melt generate build/melt-tiny "Ana reports to Ben. Ben reports to Cleo. Who is two levels above Ana?"

  melt-export ByteDance/Ouro-1.4B --out build/ouro --precision int4     # from the hub: a LoopLM bundle
  melt-export ByteDance/Ouro-1.4B --out build/melt-init --melt          # a MELT checkpoint, to be trained

  melt-export CHECKPOINT --out build/small --precision int4 --eval-text book.txt
  melt-export CHECKPOINT --out build/mixed --precision int4 --layer '*.gate.*=int8' --layer lm_head=int8
  melt-export CHECKPOINT --out build/fast --precision int4 --prompts int8
  melt-export --shape melt-1.6b --out build/bench --precision int4      # random weights, for benchmarks
  melt-export CHECKPOINT --out build/genai --format genai --loops 4     # for ONNX Runtime GenAI, at a fixed depth
"""


def main(argv: list[str] | None = None) -> int:
    """Exports one checkpoint; returns the exit status."""
    args = _parser().parse_args(argv)
    _heed_signals()
    begin = time.monotonic()
    try:
        _require_packages()
        print(_make_checkpoint(args) if args.melt else _make_bundle(args))
    except (MeltError, CheckpointError, ValueError, OSError) as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return 130
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
        "checkpoint",
        nargs="?",
        help="folder with config.json, safetensors weights, tokenizer.json, or a name on the hub; "
        f"model types: {', '.join(KNOWN_TYPES)}",
    )
    what.add_argument(
        "--shape", help=f"random weights of a published shape instead: {', '.join(SHAPES)}; NAME:4 takes 4 layers"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to make; it must not exist")
    parser.add_argument(
        "--melt",
        action="store_true",
        help="write no bundle but a MELT checkpoint: the LoopLM's weights and fresh gates, where training starts",
    )
    parser.add_argument(
        "--format",
        default="bundle",
        choices=("bundle", "genai"),
        help="bundle: for this project's runtime, loops are a knob; genai: one decoder graph with a fixed number of "
        "loops that ONNX Runtime GenAI loads unchanged (default: %(default)s)",
    )
    parser.add_argument("--loops", type=int, help="of --format genai (default: as many as the model was trained with)")
    parser.add_argument(
        "--precision",
        default=PRECISIONS[0],
        choices=PRECISIONS,
        help="of the weights (default: %(default)s); a float type is that of activations and KV cache too",
    )
    parser.add_argument(
        "--activations",
        choices=ACTIVATIONS,
        help="type of activations and KV cache; float16 and bfloat16 make a bundle for CUDA (default: as --precision, "
        "float32 for integers)",
    )
    parser.add_argument(
        "--layer",
        action="append",
        default=[],
        metavar="PATTERN=PRECISION",
        help="another precision for layers whose name matches, such as '*.gate.*=int8'; may be given again",
    )
    parser.add_argument(
        "--block",
        type=int,
        default=BLOCKS[0],
        choices=BLOCKS,
        help="most weights that share a scale (default: %(default)s); 32 costs a small model less quality",
    )
    parser.add_argument(
        "--prompts",
        choices=PROMPTS,
        help="int8: a copy of the layers' weights at 8 bits for passes of several rows, such as prompts: they take "
        "little more than half the time; a byte a weight more on disk, and mapped into memory while they run "
        "(default: int8 for --precision int8 on the CPU, else none)",
    )
    parser.add_argument(
        "--rounding",
        default=ROUNDINGS[0],
        choices=ROUNDINGS,
        help="how 4-bit scales are found: searched, or from the largest weight (default: %(default)s)",
    )
    parser.add_argument(
        "--eval-text",
        type=Path,
        metavar="FILE",
        help="text to calibrate and measure on (default: the checkpoint's evaluation.jsonl, else random tokens)",
    )
    parser.add_argument(
        "--allow-loss",
        action="store_true",
        help="write the bundle, with every KV cache, even where rounding costs more than docs/quantization.md allows",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _make_checkpoint(args: argparse.Namespace) -> str:
    """Writes a MELT checkpoint; returns what was made."""
    from melt_models.checkpoint import Checkpoint
    from melt_models.convert import looplm_to_melt
    from melt_models.hub import checkpoint_folder

    parser = _parser()
    for name in (
        "format",
        "loops",
        "precision",
        "activations",
        "layer",
        "block",
        "prompts",
        "rounding",
        "eval_text",
        "allow_loss",
    ):
        if getattr(args, name) != parser.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')} is for bundles: --melt writes weights as they are")
    if args.checkpoint is None:
        raise ValueError("--melt needs a checkpoint: --shape has none")
    checkpoint = Checkpoint(checkpoint_folder(args.checkpoint))
    for note in checkpoint.notes:
        print(f"note: {note}", file=sys.stderr)
    checkpoint.require_finite()
    config = looplm_to_melt(checkpoint, args.out)
    return (
        f"{args.out}: a MELT checkpoint of {config.num_hidden_layers} layers with fresh gates "
        f"(bias {config.gate_bias_init:g}); it answers like its LoopLM only after training"
    )


def _make_bundle(args: argparse.Namespace) -> str:
    """Writes a bundle; returns what was made."""
    from melt_export.bundle import ExportOptions, export_bundle, export_source
    from melt_export.source import random_source

    options = ExportOptions(
        precision=args.precision,
        layers=dict(map(_layer, args.layer)),
        block=args.block,
        activations=args.activations,
        prompts=args.prompts,
        rounding=args.rounding,
        text=None if args.eval_text is None else args.eval_text.read_text(encoding="utf-8"),
        verified=args.shape is None,
        allow_loss=args.allow_loss,
        report=Stages(),
    )
    if args.format == "genai":
        return _make_genai(args, options)
    if args.loops is not None:
        raise ValueError("--loops is for --format genai: in a bundle the number of loops is a knob of every call")
    if args.shape is not None:
        manifest = export_source(random_source(shape_config(args.shape)), args.out, options)
    else:
        manifest = export_bundle(args.checkpoint, args.out, options)
    return summarize(args.out, manifest)


def _make_genai(args: argparse.Namespace, options: "ExportOptions") -> str:
    """Writes a folder for ONNX Runtime GenAI; returns what was made."""
    from melt_export.genai import decoder_loops, export_genai
    from melt_export.source import ExportError, checkpoint_source, random_source
    from melt_models.checkpoint import examine_config
    from melt_models.hub import checkpoint_folder

    require_absent(args.out, ExportError)
    if args.shape is not None:
        source = random_source(shape_config(args.shape))
    else:
        folder = checkpoint_folder(args.checkpoint)
        config, _ = examine_config(folder, [])
        if config is not None:  # before every weight is read, where all faults are told
            decoder_loops(config, args.loops, options)
        source = checkpoint_source(folder)
    manifest = export_genai(source, args.out, args.loops, options)
    return f"{args.out}: a decoder for ONNX Runtime GenAI; {summarize(args.out, manifest)}"


def _layer(text: str) -> tuple[str, str]:
    pattern, separator, precision = text.partition("=")
    if not separator:
        raise ValueError(f"--layer must be PATTERN=PRECISION, got {text!r}")
    return pattern, precision


def _require_packages() -> None:
    """Imports what any work needs.

    Raises:
        MeltError: a package that is not installed, with the command that installs it.
    """
    try:
        from transformers.utils import logging as transformers_logging

        for module in ("melt_export.genai", "melt_models.convert"):
            import_module(module)
    except ModuleNotFoundError as error:
        raise MeltError(missing_package(error, "melt-export", "export")) from error
    # The stages of an export are its progress. torch sets its loggers when it is imported, so ours comes after it.
    transformers_logging.disable_progress_bar()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)


def _heed_signals() -> None:
    """A terminated export, or one whose terminal is closed, cleans up as an interrupted one does."""
    for name in ("SIGTERM", "SIGHUP"):  # the second one is not on Windows
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # as nohup asks
            signal.signal(number, _stop)


def _stop(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
