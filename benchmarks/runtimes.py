"""One MELT model in our driver, ONNX Runtime GenAI, optimum and a browser, taking turns in one run: speed and memory.

    make test                       # makes the environments of GenAI, optimum and the browser
    python benchmarks/runtimes.py

A token goes through four loops. Every runtime has a process of its own and takes its turn in every round; memory is
the peak of that process (of the page's process for the browser) after all rounds. The whole prompt is one chunk, but
for melt-tiny in the browser, which keeps to the chunk of 64 that it was trained with.
"""

import argparse
import json
import statistics
import subprocess
import sys
from math import prod
from pathlib import Path

from make_checkpoint import write_checkpoint
from peers.serving import WORKER, Worker, spread
from peers.worker import CAPACITY

from melt_export.bundle import ExportOptions, export_source
from melt_export.genai import export_genai
from melt_export.source import checkpoint_source, tensor_shapes
from melt_models.configuration import MeltConfig
from melt_models.shapes import SHAPES
from melt_runtime.bench.measure import machine
from melt_runtime.memory.estimate import format_bytes

ROOT = Path(__file__).parent.parent
WORK = ROOT / "build" / "runtimes"
ENVIRONMENTS = ROOT / "build" / "environments"
WEB = ROOT / "build" / "web"
LOOPS = 4
POSITION, STEPS, PREFILL = 64, 16, 256
CHUNK = {"chunk_size": PREFILL, "max_position_embeddings": 2 * CAPACITY}
MELT_TINY = ROOT / "models" / "melt-tiny"
MIDDLE = {
    **SHAPES["smollm2-135m"],
    **{"gate_kind": "elementwise", "norm_placement": "sandwich", "total_ut_steps": LOOPS, **CHUNK},
}
"""SmolLM2-135M as a MELT model: gates and norms of its own, random weights."""
MODELS = {
    "melt-tiny, float32": (None, "float32", ("melt-onnx", "genai", "optimum", "browser")),
    "30 layers of 576, float32": (
        *(MIDDLE, "float32"),
        ("melt-onnx", "genai", "optimum", "optimum, default session", "browser"),
    ),
    "30 layers of 576, int4": (MIDDLE, "int4", ("melt-onnx", "genai", "browser")),
}
"""Shape (None: the shipped model), precision, and who can run it: optimum's exporter knows no 4-bit weights."""


def main() -> int:
    """Prints a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each runtime (default: %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=2, help="CPU threads; a browser takes all (default: %(default)s)"
    )
    parser.add_argument("--models", type=int, nargs="*", default=[0, 1, 2], help="which (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    args = parser.parse_args()
    missing = [str(place) for place in (ENVIRONMENTS / "genai", ENVIRONMENTS / "optimum", WEB) if not place.is_dir()]
    if missing:
        print(f"error: {', '.join(missing)} not there: run make test once, which makes them", file=sys.stderr)
        return 1
    print("; ".join(f"{name} {value}" for name, value in machine().items()), f"; {args.threads} threads")
    figures = {}
    for label in [list(MODELS)[number] for number in args.models]:
        shape, precision, runtimes = MODELS[label]
        folder = WORK / label.replace(" ", "-").replace(",", "")
        parameters = make_models(folder, shape, precision, runtimes)
        figures[label] = compare(label, folder, parameters, runtimes, args.rounds, args.threads)
    if args.json is not None:
        args.json.write_text(json.dumps({"machine": machine(), "models": figures}, indent=1) + "\n", encoding="utf-8")
    return 0


def compare(label: str, folder: Path, parameters: int, runtimes: tuple[str, ...], rounds: int, threads: int) -> dict:
    """Measures one model in every runtime; prints its table."""
    workers = {name: open_worker(name, folder, threads) for name in runtimes}
    found: dict[str, dict[str, list[float]]] = {name: {"decode": [], "prefill": []} for name in workers}
    for turn in range(rounds + 1):
        for name, worker in workers.items():
            times = {"decode": worker.ask(f"decode {POSITION} {STEPS}"), "prefill": worker.ask(f"prefill {PREFILL}")}
            for kind, value in times.items():
                if turn:  # the first turn warms up
                    found[name][kind].append(value)
    print(f"\n### {label}: {parameters / 1e6:.1f} M parameters, {LOOPS} loops\n")
    print(f"| runtime | ready after | decode | prefill of {PREFILL} | peak memory | times ours: decode | prefill |")
    print("|---|---|---|---|---|---|---|")
    memory = {name: int(worker.ask("memory")) for name, worker in workers.items()}
    for name, times in found.items():
        cells = [f"{workers[name].load_seconds:.1f} s"]
        cells += [f"{statistics.median(times[kind]):.1f} ms" for kind in ("decode", "prefill")]
        cells += [format_bytes(memory[name])]
        for kind in ("decode", "prefill"):
            ratios = [t / m for t, m in zip(times[kind], found["melt-onnx"][kind], strict=True)]
            cells.append("" if name == "melt-onnx" else spread(ratios))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
        workers[name].close()
    loads = {name: worker.load_seconds for name, worker in workers.items()}
    return {"parameters": parameters, "load_seconds": loads, "milliseconds": found, "peak_bytes": memory}


def open_worker(name: str, folder: Path, threads: int) -> Worker:
    """A runtime in its environment."""
    if name == "browser":
        return Worker(["node", "bench.mjs", str(folder / "browser"), str(CAPACITY), str(LOOPS)], cwd=WEB)
    environment = name.split(",")[0]
    python = sys.executable if name == "melt-onnx" else str(ENVIRONMENTS / environment / "bin" / "python")
    return Worker([python, str(WORKER), name, str(folder), str(threads), str(LOOPS)])


def make_models(folder: Path, shape: dict | None, precision: str, runtimes: tuple[str, ...]) -> int:
    """Makes what is not there yet, in every form; returns the number of parameters."""
    checkpoint = MELT_TINY if shape is None else folder / "checkpoint"
    if not checkpoint.is_dir():
        write_checkpoint(MeltConfig(**shape), checkpoint)
    source = checkpoint_source(checkpoint)
    options = ExportOptions(precision=precision, verified=False)
    if not (folder / "melt").is_dir():
        export_source(source, folder / "melt", options)
    if not (folder / "genai").is_dir():
        export_genai(source, folder / "genai", LOOPS, options)
    if "optimum" in runtimes and not (folder / "optimum").is_dir():
        program = ENVIRONMENTS / "optimum" / "bin" / "optimum-cli"
        task = ["--task", "text-generation-with-past", "--model-kwargs", json.dumps({"loops": LOOPS})]
        command = [program, "export", "onnx", "--model", checkpoint, *task, folder / "optimum"]
        subprocess.run(command, check=True, stdout=sys.stderr)
    subprocess.run(["node", "build.mjs", folder / "melt", folder / "browser"], cwd=WEB, check=True, stdout=sys.stderr)
    tied = {"lm_head.weight"} if source.config.tie_word_embeddings else set()
    return sum(prod(size) for name, size in tensor_shapes(source.config).items() if name not in tied)


if __name__ == "__main__":
    sys.exit(main())
