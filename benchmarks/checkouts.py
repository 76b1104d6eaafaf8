"""Two checkouts of this project side by side: milliseconds of a decoded token and of a prompt, over the same bundle.

    git worktree add /tmp/before v1 && python benchmarks/checkouts.py build/melt-tiny --other /tmp/before

Each measurement is a process of its own; the two alternate, so that a slow moment of the machine meets both. A ratio is
that of neighbours. Both must read the bundle: its schema is the manifest's.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from melt_runtime.bench.measure import machine

HERE = Path(__file__).parent.parent
CODE = """
import json, sys
from melt_runtime import MeltModel
bundle, prompt, new, repeats = sys.argv[1], *map(int, sys.argv[2:])
model = MeltModel.load(bundle, device="cpu", capacity=prompt + new)
ids = [token % 200 + 5 for token in range(prompt)]
timings = [model.generate(ids, loops=4, max_new_tokens=new, stop_ids=()).timings for _ in range(repeats)]
print(json.dumps([
    min(t.decode_seconds / t.decode_tokens for t in timings), min(t.prefill_seconds for t in timings)
]))
"""


def main() -> int:
    """Prints both, and ours over theirs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    parser.add_argument("--other", type=Path, required=True, metavar="CHECKOUT")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--prompt", type=int, default=100, metavar="TOKENS")
    parser.add_argument("--tokens", type=int, default=64, help="new ones of an answer (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="answers of a process, the fastest counts")
    args = parser.parse_args()
    print("; ".join(f"{name} {value}" for name, value in machine().items()))
    print("\n| bundle | decode, ms | other | ours / other | prompt, ms | other | ours / other |")
    print(f"{'|---' * 7}|")
    for bundle in args.bundles:
        arguments = [str(bundle), str(args.prompt), str(args.tokens), str(args.repeats)]
        rounds = [(run(HERE, arguments), run(args.other, arguments)) for _ in range(args.rounds)]
        cells = []
        for place in range(2):
            ours, theirs = [mine[place] for mine, _ in rounds], [other[place] for _, other in rounds]
            ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
            cells += [f"{1e3 * statistics.median(values):.3f}" for values in (ours, theirs)]
            cells.append(f"{statistics.median(ratios):.3f} ({ratios[0]:.3f}-{ratios[-1]:.3f})")
        print(f"| {bundle.name} | {' | '.join(cells)} |", flush=True)
    return 0


def run(checkout: Path, arguments: list[str]) -> list[float]:
    """Seconds of a decoded token and of the prompt, by a checkout's own code."""
    environment = {**os.environ, "PYTHONPATH": str(checkout / "runtime")}
    command = [sys.executable, "-c", CODE, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: list[float] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    sys.exit(main())
