"""What several commands share: types of options, a bundle's sizes and device, the wait until it is loaded."""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from melt_runtime.bundle.contract import KV_CACHES
from melt_runtime.bundle.manifest import read_manifest
from melt_runtime.cli.streams import require_utf8
from melt_runtime.device.cuda import CudaOptions
from melt_runtime.memory.estimate import format_bytes, plan_memory
from melt_runtime.model import MeltModel
from melt_runtime.progress import Line
from melt_runtime.request.generation_config import DECODINGS, GENERAL_DEFAULTS, OF_GRAMMAR, GenerationConfig
from melt_runtime.request.settings import SETTLED_THRESHOLD
from melt_runtime.schedule.depth import EXIT_RULES

_DEPTH = ("exit_rule", "exit_threshold", "min_loops", "max_loops", "decode", "lag")
_SAMPLING = (
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("logit_bias", "logprobs", "seed"),
)


def numbers_option(value: str) -> tuple[int, ...]:
    """The type of an option that takes several whole numbers: ``1,4``."""
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers separated by commas, got {value!r}") from None


def loops_option(value: str) -> int | str:
    """The type of ``--loops``: a whole number, or ``auto``."""
    try:
        return value if value == "auto" else int(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number or auto, got {value!r}") from None


def text_option(value: str) -> str:
    """The type of an option that is a text, or ``@FILE``."""
    if not value.startswith("@"):
        return value
    try:
        return Path(value[1:]).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{value[1:]} cannot be read as text: {error}") from None


def bias_option(value: str) -> tuple[str, float]:
    """The type of ``--logit-bias``: ``ID=X``."""
    token, equals, bias = value.partition("=")
    try:
        return token if equals else "", float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a token id, = and a number, as in 7=-100, got {value!r}") from None


def names_option(value: str) -> tuple[str, ...]:
    """The type of an option that takes several names: ``float,int8``."""
    return tuple(value.split(","))


def require_writable(path: Path | None) -> None:
    """Refuses a file that could not be written, before the work that it is for.

    Raises:
        ValueError: its folder does not exist, or it is one.
    """
    if path is not None and not path.parent.is_dir():
        raise ValueError(f"the folder of {path} does not exist: make it first")
    if path is not None and path.is_dir():
        raise ValueError(f"{path} is a folder: name a file")


def add_bundle(parser: argparse.ArgumentParser) -> None:
    """Adds the bundle that a command reads."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder written by melt-export")


def add_json(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds ``--json``; ``what`` says what is printed then."""
    parser.add_argument("--json", action="store_true", help=f"print {what} as a JSON object, for programs")


def print_json(values: Mapping[str, Any]) -> None:
    """Prints an object on one line; what JSON does not have is an error of ours."""
    print(json.dumps(values, ensure_ascii=False, allow_nan=False), flush=True)


def add_sizes(parser: argparse.ArgumentParser | argparse._ArgumentGroup, tokens: str) -> None:
    """Adds what decides how large a state is, but for the loops; ``tokens`` says what the capacity counts."""
    parser.add_argument(
        "--capacity",
        type=int,
        metavar="TOKENS",
        help=f"{tokens} (default: 2048, or the model's most where it has fewer)",
    )
    parser.add_argument(
        "--kv-cache",
        default="float",
        choices=KV_CACHES,
        help="how keys and values are stored: int8 takes a quarter of float32's memory, int4 an eighth; melt info says "
        "what that costs (default: %(default)s)",
    )
    parser.add_argument(
        "--chunk",
        type=int,
        metavar="TOKENS",
        help="prompt tokens processed in parallel; for MELT another number than in training changes results, and a "
        "smaller one lets prompts reuse more (default: as in training)",
    )


def add_answer_options(parser: argparse.ArgumentParser) -> None:
    """Adds what decides how an answer is made, and where."""
    defaults = GENERAL_DEFAULTS
    answer = parser.add_argument_group(
        "the answer", "Where a bundle has defaults of its own, as melt info shows, they hold in place of these."
    )
    answer.add_argument(
        "--loops",
        type=loops_option,
        metavar="N",
        help="depth, or auto: each token leaves when its answer stands (default: as the model was trained)",
    )
    answer.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="most tokens of an answer (default: what is left of the capacity)",
    )
    answer.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be given again")
    answer.add_argument(
        "--temperature",
        type=float,
        metavar="X",
        help=f"0 takes the likeliest token, 1 draws as the model says (default: {defaults.temperature:g})",
    )
    answer.add_argument(
        "--top-k",
        type=int,
        metavar="N",
        help=f"draw from the N likeliest tokens; 0: from all (default: {defaults.top_k})",
    )
    answer.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help=f"draw from the likeliest tokens that sum up to this probability (default: {defaults.top_p:g})",
    )
    answer.add_argument(
        "--min-p",
        type=float,
        metavar="P",
        help=f"draw from tokens this fraction as likely as the likeliest (default: {defaults.min_p:g})",
    )
    answer.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="X",
        help=f"above 1: tokens that stand in the context become less likely (default: {defaults.repetition_penalty:g})",
    )
    answer.add_argument(
        "--presence-penalty",
        type=float,
        metavar="X",
        help=f"taken off every token that stands in the answer (default: {defaults.presence_penalty:g})",
    )
    answer.add_argument(
        "--frequency-penalty",
        type=float,
        metavar="X",
        help=f"taken off once for each time that it stands there (default: {defaults.frequency_penalty:g})",
    )
    answer.add_argument(
        "--logit-bias",
        type=bias_option,
        action="append",
        metavar="ID=X",
        help="added to a token's logit, -100 to 100; may be given again",
    )
    grammar = answer.add_mutually_exclusive_group()
    grammar.add_argument(
        "--json-schema",
        type=text_option,
        metavar="SCHEMA",
        help="the answer is JSON of this schema: its text, or @FILE (grammars need the extra serve)",
    )
    grammar.add_argument("--regex", metavar="PATTERN", help="the whole answer matches this regular expression")
    grammar.add_argument(
        "--lark", type=text_option, metavar="GRAMMAR", help="the answer follows this grammar in Lark's form, or @FILE"
    )
    answer.add_argument("--seed", type=int, metavar="N", help="of what is drawn, to draw it again (default: a new one)")
    depth = parser.add_argument_group("the depth", "When a token leaves with --loops auto; several tokens in a pass.")
    depth.add_argument(
        "--exit-rule",
        choices=EXIT_RULES,
        help="gate: when the model's exit gate says so; settled: when a loop changed neither the likeliest token nor, "
        "by more than the threshold, its probability (default: gate, where the bundle has a threshold for it)",
    )
    depth.add_argument(
        "--exit-threshold",
        type=float,
        metavar="X",
        help=f"of the rule: a cumulated exit probability, or how much a probability may move (default: the bundle's, "
        f"{SETTLED_THRESHOLD:g} for settled)",
    )
    depth.add_argument("--min-loops", type=int, metavar="N", help="loops that every token takes (default: 1)")
    depth.add_argument(
        "--max-loops", type=int, metavar="N", help="loops that a token takes at most (default: as trained)"
    )
    depth.add_argument(
        "--decode",
        choices=DECODINGS,
        help="wave: the next token starts from a draft while this one still takes its loops; faster, and of MELT its "
        "numbers are not quite those of plain (default: plain)",
    )
    depth.add_argument(
        "--lag", type=int, metavar="N", help="of a wave: loops of a token before the next one starts (default: 1)"
    )
    machine = parser.add_argument_group("the machine")
    machine.add_argument(
        "--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1 ..., or auto (default: %(default)s)"
    )
    machine.add_argument("--threads", type=int, metavar="N", help="on the CPU (default: one per physical core)")
    add_sizes(machine, "that prompts and answers may take together")
    machine.add_argument("--cuda-graphs", action="store_true", help="on CUDA: capture a token's steps and replay them")


def answer_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The options of the answer that were given; for the others the bundle's word holds.

    Raises:
        ValueError: lists every value outside its rule.
    """
    names = ("loops", "max_new_tokens", *_SAMPLING, *_DEPTH, *OF_GRAMMAR)
    given = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    if "logit_bias" in given:
        given["logit_bias"] = dict(given["logit_bias"])
    if args.stop:
        given["stop"] = tuple(require_utf8(text, "--stop") for text in args.stop)
    GenerationConfig(**given)
    return given


def most_loops(settings: Mapping[str, Any]) -> int | None:
    """The deepest that an answer may go; None: as deep as the model was trained."""
    loops = settings.get("loops")
    return settings.get("max_loops") if loops == "auto" else loops


def load_model(args: argparse.Namespace, quiet: bool, loops: int | None, slots: int = 1) -> MeltModel:
    """Loads the bundle, and says what memory it takes and where it runs unless ``quiet``.

    Args:
        args: what ``add_answer_options`` added.
        quiet: say nothing.
        loops: the deepest that shall be run; None: as many as the model was trained with.
        slots: sequences side by side.

    Raises:
        MeltError, ValueError: as ``MeltModel.load``.
    """
    if not quiet:
        plan = plan_memory(read_manifest(args.bundle), args.capacity, slots, loops, args.kv_cache, args.chunk)
        ours, theirs = format_bytes(plan.state.total_bytes), format_bytes(plan.per_loop.total_bytes)
        times, weights = f"{slots} x " if slots > 1 else "", format_bytes(plan.weight_bytes + plan.prompt_bytes)
        print(
            f"memory: {weights} of weights + {ours} of state for {times}{plan.state.capacity} "
            f"tokens (with a KV cache per loop: {theirs})",
            file=sys.stderr,
        )
    with Line("B") as line:
        model = MeltModel.load(
            args.bundle,
            device=args.device,
            capacity=args.capacity,
            chunk=args.chunk,
            loops=loops,
            threads=args.threads,
            kv_cache=args.kv_cache,
            slots=slots,
            cuda=CudaOptions(graphs=args.cuda_graphs),
            progress=line,
        )
    if not quiet:
        print(f"device: {model.provider.device} ({model.provider.reason})", file=sys.stderr)
    return model
