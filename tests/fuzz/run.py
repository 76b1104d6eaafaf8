"""Runs many damaged inputs: ``python tests/fuzz/run.py bundles --count 10000``; exit status 1 if there is a finding."""

import argparse
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from fuzz import bundles, calls, checkpoints
from fuzz.pool import FINDING, Case, run_cases


def main(argv: list[str] | None = None) -> int:
    """Runs the cases; prints every cause of a finding once, with the numbers of its cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--count", type=int, default=1000, help="cases (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first one (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=20.0, help="that a case may take (default: %(default)s)")
    parser.add_argument("--bundle", type=Path, help="for bundles and calls (default: a small one is made)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="melt-fuzz-") as place:
        make, make_base = TARGETS[args.target]
        base = make_base(Path(place)) if args.bundle is None else args.bundle
        kinds: Counter[str] = Counter()
        causes: dict[str, list[int]] = {}
        cases = run_cases(
            make,
            (base, Path(place)),
            range(args.first, args.first + args.count),
            args.workers,
            args.seconds,
        )
        for done, outcome in enumerate(cases, start=1):
            kinds[outcome.kind] += 1
            if outcome.kind == FINDING:
                cause = re.sub(r"0x\w+|\d+", "#", outcome.what.partition("\n")[0])
                if cause not in causes:
                    print(f"\ncase {outcome.number}, {outcome.damage}\n{outcome.what}\n", flush=True)
                causes.setdefault(cause, []).append(outcome.number)
            if sys.stderr.isatty() or done % 500 == 0:
                print(f"\r{done} of {args.count}: {dict(kinds)}", end="", file=sys.stderr, flush=True)
    print(f"\n{args.count} {args.target}: {dict(kinds)}")
    for cause, numbers in sorted(causes.items(), key=lambda item: -len(item[1])):
        print(f"  {len(numbers)} times, cases {numbers[:10]}: {cause}")
    return 1 if causes else 0


def small_bundle(place: Path) -> Path:
    """The bundle of a random model with every kind of graph, its parity and quality in the manifest."""
    from conftest import random_model, save_checkpoint

    from melt_export.bundle import ExportOptions, export_bundle

    checkpoint = save_checkpoint(random_model(num_hidden_layers=2), place / "checkpoint")
    export_bundle(checkpoint, place / "base", ExportOptions(verified=True))
    return place / "base"


TARGETS: dict[str, tuple[Callable[[Path, Path], Case], Callable[[Path], Path]]] = {
    "bundles": (bundles.make, small_bundle),
    "checkpoints": (checkpoints.make, checkpoints.write_checkpoints),
    "calls": (calls.make, small_bundle),
}
"""Who makes the cases of a kind of input, from a base and a folder to work in; who makes the base."""


if __name__ == "__main__":
    sys.exit(main())
