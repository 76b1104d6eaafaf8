"""The commands ``melt generate`` and ``melt chat``: one answer, and a conversation."""

import argparse
import sys
from dataclasses import asdict

from melt_runtime.cli.chat import Chat, describe_costs, open_lines
from melt_runtime.cli.depth import colours, describe_depth
from melt_runtime.cli.options import (
    add_answer_options,
    add_bundle,
    add_json,
    answer_settings,
    load_model,
    most_loops,
    print_json,
)
from melt_runtime.cli.streams import read_input, require_utf8
from melt_runtime.memory.estimate import format_bytes
from melt_runtime.memory.process import resident_bytes
from melt_runtime.progress import PROMPT_DELAY, Line

_GENERATE = """\
examples:
  melt generate build/melt-tiny "Ana reports to Ben. Ben reports to Cleo. Who is two levels above Ana?"
  melt generate build/melt-tiny "Ana reports to Ben. Ben reports to Cleo. Who is two levels above Ana?" --loops 1
  melt generate build/melt-tiny "Ana reports to Ben. Who is one level above Ana?" --loops auto --show-depth
  melt generate build/melt-tiny - --quiet < question.txt
  melt generate build/melt-tiny "Ana reports to Ben. Who is one level above Ana?" --json --quiet --logprobs 3
"""
_CHAT = """\
examples:
  melt chat build/melt-tiny
  melt chat build/melt-tiny --loops 2 --threads 1 --kv-cache int8
  melt chat build/melt-tiny --max-new-tokens 16 < questions.txt

On a terminal lines can be edited, and arrow keys bring back what was typed; Ctrl-C stops an answer, twice it leaves;
/help lists the commands. Elsewhere every line of standard input is a message, also one that begins with /; where
messages were not answered, the run fails at its end.
"""


def add_generate_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``melt generate``."""
    parser.description = "Answer one prompt: the answer on standard output as it comes, its costs on standard error."
    parser.epilog = _GENERATE
    add_bundle(parser)
    parser.add_argument("prompt", metavar="PROMPT", help="a user's message; - reads standard input")
    parser.add_argument("--raw", action="store_true", help="give the prompt as it is, without the chat template")
    parser.add_argument("--quiet", action="store_true", help="the answer alone, no costs on standard error")
    parser.add_argument(
        "--show-depth",
        action="store_true",
        help="on a terminal colour each piece of the answer by the loops that it took (NO_COLOR: no colours), and say "
        "how often each depth was enough",
    )
    add_json(parser, "the answer with its tokens, depths and costs, once it is whole,")
    parser.add_argument(
        "--logprobs",
        type=int,
        metavar="N",
        help="with --json: logarithms of the model's own probabilities, of each token and of the N likeliest",
    )
    add_answer_options(parser)


def generate(args: argparse.Namespace) -> None:
    """Answers one prompt, piece by piece.

    Raises:
        MeltError, ValueError, OSError: before anything is computed, but for numbers that a damaged model gives.
    """
    settings = answer_settings(args)  # refuses bad values before the model is loaded
    if args.logprobs is not None and not args.json:
        raise ValueError("--logprobs must go with --json, which shows them")
    if args.json and args.show_depth:
        raise ValueError("--show-depth must be left out with --json, which has loops_per_token")
    prompt = read_input() if args.prompt == "-" else require_utf8(args.prompt, "the prompt")
    if not args.raw:
        prompt = prompt.rstrip("\r\n")  # the end of a line is how a shell ends its text, and no part of a message
    if not prompt.strip():
        raise ValueError("the prompt is empty: give at least one character")
    model = load_model(args, args.quiet, most_loops(settings))
    if args.json:
        with Line("token", PROMPT_DELAY) as line:
            print_json(asdict(model.generate(prompt, raw=args.raw, progress=line.prompt, **settings)))
        return
    paint = colours(sys.stdout)
    with (
        Line("token", PROMPT_DELAY) as line,
        model.stream(prompt, raw=args.raw, progress=line.prompt, **settings) as stream,
    ):
        for piece in stream:
            print(paint(piece, stream.loops) if args.show_depth else piece, end="", flush=True)
    print(flush=True)
    if args.show_depth:
        print(describe_depth(stream.result, colours(sys.stderr)), file=sys.stderr)
    if not args.quiet:
        result = stream.result
        print(
            f"{describe_costs(result)}, state {format_bytes(result.state_bytes)}, "
            f"process peak {format_bytes(resident_bytes())}",
            file=sys.stderr,
        )


def add_chat_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``melt chat``."""
    parser.description = "Talk in turns over one state: what was said is kept, and not computed again."
    parser.epilog = _CHAT
    add_bundle(parser)
    parser.add_argument("--system", default="", metavar="TEXT", help="instructions that begin the conversation")
    add_answer_options(parser)


def chat(args: argparse.Namespace) -> None:
    """Answers until there are no more messages.

    Raises:
        MeltError, ValueError, OSError: before the first of them; where nobody types them also at their end, if
            messages were not answered.
    """
    settings = answer_settings(args)
    system = require_utf8(args.system, "--system")
    read_line, is_typed = open_lines()
    model = load_model(args, False, most_loops(settings))
    talk = Chat(model.session, settings, system)
    (talk.run if is_typed else talk.answer_all)(read_line)
