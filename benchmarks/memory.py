"""Memory of whole models by context and loops: measured processes beside the plan, and the paper's table by allocation.

    python benchmarks/make_checkpoint.py melt-1.6b build/melt-1.6b
    python benchmarks/make_checkpoint.py ouro-1.4b build/ouro-1.4b
    python export.py build/melt-1.6b --out build/melt-1.6b-int4 --precision int4
    python export.py build/ouro-1.4b --out build/ouro-1.4b-int4 --precision int4
    python benchmarks/memory.py build/melt-1.6b-int4 build/ouro-1.4b-int4 --json docs/data/memory.json

Each point is a process of its own: it loads the bundle with an int8 KV cache for that context and those loops, fills
the cache, processes a prompt of 128 tokens at its end, decodes one token, and states its peak.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from melt_runtime import MeltModel
from melt_runtime.bench.measure import fill_cache, new_process
from melt_runtime.bundle.contract import ModelShape
from melt_runtime.bundle.manifest import read_manifest
from melt_runtime.memory.buffers import State
from melt_runtime.memory.estimate import format_bytes, plan_memory
from melt_runtime.memory.plan import StatePlan
from melt_runtime.memory.process import resident_bytes

CONTEXTS = (1000, 4000, 8000, 16000)
LOOPS = (1, 2, 4, 8)
CHUNK = 128
KV_CACHE = "int8"
LIMIT = 18 << 30
"""Points that would take more are left out."""
PUBLISHED_CONTEXT = 32_000
PUBLISHED = {
    "MELT-1.6B": ("melt-1.6b", PUBLISHED_CONTEXT, "6.29, 3.272 GB"),
    "Ouro-1.4B": ("ouro-1.4b", PUBLISHED_CONTEXT // 2, "25.17, 2.869 GB"),
}
"""Shape, tokens to allocate for (half of them where 32,000 would not fit), and what arXiv 2605.07721 says."""


@dataclass(frozen=True)
class Point:
    """One process; ``plan`` and ``peak`` are bytes of all that is resident."""

    bundle: str
    loops: int
    context: int
    state: int
    plan: int
    peak: int


def measure(bundle: str, loops: int, context: int) -> Point:
    """Runs one point; in a process of its own."""
    manifest = read_manifest(bundle)
    plan = plan_memory(manifest, context, loops=loops, kv_cache=KV_CACHE, chunk=CHUNK)
    model = MeltModel.load(bundle, device="cpu", capacity=context, chunk=CHUNK, loops=loops, kv_cache=KV_CACHE)
    runner = model.new_runner()
    fill_cache(runner.state, context)
    start = context - CHUNK - 1
    runner.slots[0].advance(start, loops)
    runner.prefill([token % manifest.model.vocab_size for token in range(CHUNK)], loops)
    runner.decode([1], loops)
    return Point(Path(bundle).name, loops, context, runner.state_bytes, plan.process_bytes, resident_bytes())


def allocate(shape: ModelShape, loops: int, context: int) -> tuple[int, int]:
    """Allocates a float16 state and writes it; in a process of its own.

    Returns:
        Bytes of the KV cache by the plan, and by how many bytes the process grew.
    """
    plan = StatePlan(shape, "float16", 1, context, 1, loops)
    before = resident_bytes()
    state = State(plan, "cpu")
    fill_cache(state, context)
    return plan.cache_bytes, resident_bytes() - before


def run(task, *arguments):
    """Runs a task in a new process."""
    with new_process() as pool:
        return pool.submit(task, *arguments).result()


def print_published() -> None:
    """The paper's table at 2 bytes: KV caches from states that were allocated and written, weights by their count."""
    # Here and not above: the processes that are measured import this file, and they shall hold no torch.
    from melt_export.trace import model_shape
    from melt_models.checkpoint import empty_model
    from melt_models.shapes import shape_config

    head = ("4 loops", "KV / token", "allocated", "grew by", "KV at 32,000", "weights", "total", "paper: KV, weights")
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for name, (shape, context, paper) in PUBLISHED.items():
        config = shape_config(shape)
        planned, grown = run(allocate, model_shape(config), 4, context)
        cache = grown * PUBLISHED_CONTEXT // context
        weights = 2 * sum(parameter.numel() for parameter in empty_model(config).parameters())
        sizes = [format_bytes(size) for size in (grown, cache, weights, cache + weights)]
        row = [name, format_bytes(planned // context), f"{context} tokens", *sizes, paper]
        print(f"| {' | '.join(row)} |", flush=True)


def main() -> int:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="*", type=Path)
    parser.add_argument("--json", type=Path, help="keep the points here")
    args = parser.parse_args()
    print_published()
    points = []
    print("\n| bundle | loops | context | state | plan | peak | peak / plan |\n|---|---|---|---|---|---|---|")
    for bundle in args.bundles:
        manifest = read_manifest(bundle)
        for loops in LOOPS:
            for context in CONTEXTS:
                if plan_memory(manifest, context, loops=loops, kv_cache=KV_CACHE, chunk=CHUNK).total_bytes > LIMIT:
                    continue
                point = run(measure, str(bundle), loops, context)
                points.append(point)
                sizes = [format_bytes(size) for size in (point.state, point.plan, point.peak)]
                cells = [point.bundle, str(loops), str(context), *sizes, f"{point.peak / point.plan:.3f}"]
                print(f"| {' | '.join(cells)} |", flush=True)
                if args.json is not None:
                    args.json.write_text(json.dumps({"points": [asdict(point) for point in points]}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
