"""The command ``melt demo``: the model that this package carries answers one question at several depths."""

import argparse
import shlex
import textwrap
from pathlib import Path

from melt_runtime.cli.options import numbers_option
from melt_runtime.cli.streams import require_utf8
from melt_runtime.memory.estimate import format_bytes, plan_memory
from melt_runtime.model import MeltModel
from melt_runtime.request.generation_config import GenerationConfig
from melt_runtime.request.result import GenerationResult

BUNDLE = Path(__file__).parents[1] / "demo" / "melt-tiny"
"""melt-tiny, exported by ``make demo-bundle``."""
QUESTION = (
    "Ana reports to Ben. Cleo reports to Ana. Ben works for Dan. Eva reports to Cleo. Dan reports to Finn. "
    "Gina works for Hugo. Hugo reports to Ana. Iris reports to Gina. Who is three levels above Cleo?"
)
LOOPS = (1, 2, 3, 4)
MAX_NEW_TOKENS = 24
"""An answer takes three; one that does not end shows that the question was none of the model's."""

_EPILOG = """\
examples:
  melt demo
  melt demo "Ana reports to Ben. Ben works for Cleo. Cleo reports to Dan. Who is two levels above Ana?"
  melt demo --loops 2,4,8
"""
_HEADER = f"{'loops':<7}{'state':<11}{'a cache per loop':<19}{'first token':<14}{'whole answer':<15}answer"
_WHY = """\
Cleo reports to Ana, Ana to Ben, and Ben works for Dan. A loop is one more pass through the same layers, and takes the
model one step along that chain: after three loops it has arrived, and a fourth stays there.
"""
_SCOPE = """\
The model knows one thing: who or what stands so many steps further, among people, trains, rooms and a ball, worded as
in `melt demo`. To anything else it answers something.
"""
_MEMORY = """\
The state (KV cache and buffers for {capacity} tokens) is the same for every number of loops: MELT rewrites one KV cache
in place. A looped model with a cache for each loop needs what stands beside it.
"""
_NEXT = """\
try next:
  melt demo "Ana reports to Ben. Ben works for Cleo. Cleo reports to Dan. Who is two levels above Ana?"
  melt demo --loops 4,5,6                        deeper than it was trained
  melt chat {bundle}
  melt plan {bundle} --loops 16
a model of your own, with torch (pip install 'melt-onnx[export]'):
  melt-export CHECKPOINT --out my-bundle --precision int4
  melt generate my-bundle "a question" --loops 4
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``melt demo``."""
    parser.epilog = _EPILOG
    parser.add_argument("question", nargs="?", default=QUESTION, help="of your own, worded as in the example")
    shown = ",".join(map(str, LOOPS))
    parser.add_argument(
        "--loops", type=numbers_option, default=LOOPS, metavar="N,N", help=f"depths to answer at (default: {shown})"
    )


def run(args: argparse.Namespace) -> None:
    """Answers at each depth, on the CPU, and says what is seen.

    Raises:
        ValueError: a number of loops below 1.
        MeltError: the bundle is damaged, or the question is longer than its state.
    """
    question = require_utf8(args.question, "the question")
    for loops in args.loops:
        GenerationConfig(loops=loops)  # refuse bad values before the model is loaded
    model = MeltModel.load(BUNDLE, device="cpu")
    shape = model.manifest.model
    print(
        f"melt-tiny, in this package: {shape.layers} layers, {format_bytes(model.manifest.weight_bytes)} of weights "
        f"({model.manifest.precision}), trained with {shape.trained_loops} loops, on the CPU\n"
    )
    print(f"{textwrap.fill(question, 118)}\n")
    print(_HEADER)
    model.generate(question, loops=1, max_new_tokens=1)  # a graph's first run takes longer: not one to show
    for loops in args.loops:
        result = model.generate(question, loops=loops, max_new_tokens=MAX_NEW_TOKENS, temperature=0.0)
        per_loop = plan_memory(model.manifest, loops=loops).per_loop.total_bytes
        print(_row(result, per_loop), flush=True)
    print()
    print(_WHY if question == QUESTION else _SCOPE)
    print(_MEMORY.format(capacity=model.session.plan.capacity))
    print(_NEXT.format(bundle=shlex.quote(str(BUNDLE))), end="")


def _row(result: GenerationResult, per_loop_bytes: int) -> str:
    first, rest = result.timings.prefill_seconds, result.timings.decode_seconds
    answer = " ".join(result.text.split()) or "(nothing)"
    if result.finish_reason == "length":
        answer += " ..."
    return (
        f"{result.loops:<7}{format_bytes(result.state_bytes):<11}{format_bytes(per_loop_bytes):<19}"
        f"{f'{1e3 * first:.1f} ms':<14}{f'{1e3 * (first + rest):.1f} ms':<15}{answer}"
    )
