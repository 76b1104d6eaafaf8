"""The command ``melt batch``: many prompts from a file, each answer in another file as soon as it is there."""

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from melt_runtime.arguments import shown, whole_number
from melt_runtime.bundle.manifest import read_manifest
from melt_runtime.cli.batch_answers import Answers
from melt_runtime.cli.batch_prompts import SETTINGS, PromptLine, read_prompts
from melt_runtime.cli.chat import format_seconds
from melt_runtime.cli.json_lines import Id, one_line
from melt_runtime.cli.options import add_answer_options, add_bundle, answer_settings, load_model, require_writable
from melt_runtime.errors import BatchError, MeltError
from melt_runtime.memory.estimate import format_bytes
from melt_runtime.memory.plan import MAX_BATCH
from melt_runtime.memory.process import resident_bytes
from melt_runtime.model import MeltModel
from melt_runtime.progress import Line
from melt_runtime.request.generation_config import GenerationConfig

_SLOTS = 8
_SHOWN_ERRORS = 8
_SHOWN_ID = 80
_EPILOG = f"""\
examples:
  melt batch build/melt-tiny prompts.jsonl --out answers.jsonl
  melt batch build/melt-tiny prompts.jsonl --out deep.jsonl --loops 4 --max-new-tokens 16 --slots 16 --kv-cache int8
  melt batch build/melt-tiny - --out answers.jsonl --quiet < prompts.jsonl

A line of PROMPTS.jsonl, and its answer:
  {{"id": 7, "prompt": "Ana reports to Ben. Who is one level above Ana?", "loops": 2}}
  {{"id": 7, "text": "Ben.", "finish_reason": "stop", "loops": 2, "prompt_tokens": 14, "new_tokens": 3,
   "seconds": 0.1}}

A line has an id (a string or a whole number, once in the file), either prompt or messages (a list of
{{"role": ..., "content": ...}}), and settings of its own where they shall differ from the options:
{", ".join(SETTINGS[:-3])},
{", ".join(SETTINGS[-3:])}.

Answers come in any order, each on disk when it is finished. The same command again answers what ANSWERS.jsonl does not,
by id: after Ctrl-C or kill -9, where prompts could not be answered, where lines were added to PROMPTS.jsonl.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``melt batch``."""
    parser.description = (
        "Answer many prompts, several at a time, each as melt generate would alone. A line's own settings go over the "
        "command's."
    )
    parser.epilog = _EPILOG
    add_bundle(parser)
    parser.add_argument("prompts", metavar="PROMPTS.jsonl", help="a JSON object on each line; - reads standard input")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="ANSWERS.jsonl", help="made, or continued where it is there"
    )
    parser.add_argument(
        "--slots",
        type=int,
        default=_SLOTS,
        metavar="N",
        help="prompts under way at a time: more are faster together, up to what the machine can do, and each takes the "
        "state of a whole capacity (default: %(default)s)",
    )
    parser.add_argument("--raw", action="store_true", help="give every prompt as it is, without the chat template")
    parser.add_argument("--quiet", action="store_true", help="nothing on standard error but errors")
    add_answer_options(parser)


def run(args: argparse.Namespace) -> None:
    """Answers what is not answered yet.

    Raises:
        ValueError, OSError: an argument or a line of the files outside its rule; nothing was written.
        MeltError: the bundle cannot be used; or prompts could not be answered, after those that could.
    """
    settings = GenerationConfig(**answer_settings(args))
    slots = whole_number("slots", args.slots, 1, MAX_BATCH)
    require_writable(args.out)
    prompts = _read_prompts(args.prompts, args.out, settings)
    with Answers(args.out, {prompt.id for prompt in prompts}) as answers:
        left = [prompt for prompt in prompts if prompt.id not in answers.ids]
        if not left:
            if not args.quiet:
                print(f"all {len(prompts)} prompts are answered already in {args.out}", file=sys.stderr)
            return
        model = load_model(args, args.quiet, _deepest(left, args.bundle), min(slots, len(left)))
        work = _Work(model, answers, len(prompts))
        try:
            errors = work.answer(left, args.raw)
        finally:
            if not args.quiet:
                print(work.describe(), file=sys.stderr)
        if errors:
            _print_errors(left, errors)
            raise MeltError(
                f"{len(errors)} of {len(prompts)} prompts could not be answered; the same command tries them again"
            )


class _Work:
    """One run over a file of answers.

    Attributes:
        answers: the file.
    """

    def __init__(self, model: MeltModel, answers: Answers, total: int):
        self.answers = answers
        self._model, self._total, self._before = model, total, len(answers.ids)
        self._tokens, self._seconds = 0, 0.0

    def answer(self, prompts: Sequence[PromptLine], raw: bool) -> dict[int, Exception]:
        """Answers prompts; each answer is on disk as soon as it is finished.

        Returns:
            What was wrong with those that could not be answered, by their place in ``prompts``.
        """
        asked, configs = [prompt.prompt for prompt in prompts], [prompt.config for prompt in prompts]
        began = time.perf_counter()
        with Line("answer") as line, _warnings_above(line):

            def tell(done: int, _: int) -> None:
                line("answers", self._before + done, self._total, f"{self._rate:.0f} tokens/s")

            tell(0, 0)
            with self._model.stream_batch(asked, configs, raw, tell) as stream:
                try:
                    for place, result in stream:
                        self.answers.add(prompts[place].id, result)
                        self._tokens += len(result.token_ids)
                        self._seconds = time.perf_counter() - began
                except BatchError as error:
                    return error.errors
        return {}

    def describe(self) -> str:
        """What the run did, and what it took."""
        done = len(self.answers.ids)
        speed = (
            f", {self._tokens} tokens in {format_seconds(self._seconds)} at {self._rate:.0f}/s" if self._tokens else ""
        )
        return (
            f"{done} of {self._total} prompts are answered, {done - self._before} of them now{speed}, "
            f"state {format_bytes(self._model.state_bytes)}, process peak {format_bytes(resident_bytes())}"
        )

    @property
    def _rate(self) -> float:
        """Tokens per second, prompts' time included."""
        return self._tokens / self._seconds if self._seconds else 0.0


@contextmanager
def _warnings_above(line: Line) -> Iterator[None]:
    """Prints warnings above a line of progress rather than into it."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        line.print(f"warning: {message}", sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _read_prompts(name: str, out: Path, settings: GenerationConfig) -> list[PromptLine]:
    """The prompts of a file, or of standard input.

    Raises:
        ValueError: the file is where the answers shall be, or has lines that cannot be used.
        OSError: it cannot be read.
    """
    if name == "-":
        if sys.stdin is None:
            raise OSError("standard input is closed")
        if sys.stdin.isatty():
            print("prompts, a JSON object on each line, from this terminal; Ctrl-D ends them:", file=sys.stderr)
        return read_prompts(sys.stdin.buffer, "standard input", settings)
    path = Path(name)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file")
    if path.exists() and out.exists() and os.path.samefile(path, out):
        raise ValueError(f"--out must be another file than the prompts', got {out}")
    with path.open("rb") as file:
        return read_prompts(file, str(path), settings)


def _deepest(prompts: Sequence[PromptLine], bundle: Path) -> int:
    """Loops that a state must have caches for, where each loop has its own."""
    trained, configs = read_manifest(bundle).model.trained_loops, [prompt.config for prompt in prompts]
    said = [config.max_loops if config.loops == "auto" else config.loops for config in configs]
    return max(trained if loops is None else int(loops) for loops in said)


def _print_errors(prompts: Sequence[PromptLine], errors: dict[int, Exception]) -> None:
    for place in sorted(errors)[:_SHOWN_ERRORS]:
        prompt = prompts[place]
        print(f"error: line {prompt.number} (id {_quoted(prompt.id)}): {one_line(errors[place])}", file=sys.stderr)
    if len(errors) > _SHOWN_ERRORS:
        print(f"and {len(errors) - _SHOWN_ERRORS} more", file=sys.stderr)


def _quoted(id: Id) -> str:
    """An id as the file has it, where that is short and can be printed."""
    text = json.dumps(id, ensure_ascii=False)
    return text if text.isprintable() and len(text) <= _SHOWN_ID else shown(id)
