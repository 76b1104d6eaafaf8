"""The same work in melt-onnx, llama.cpp, ONNX Runtime GenAI and torch, taking turns in one run.

    benchmarks/peers/install.sh
    python benchmarks/peers/compare.py

Every runtime has a process of its own and takes its turn in every round, so that a machine that drifts drifts for all.
A token goes through the layers once. Ratios are ours over theirs in the same round, per parameter that the step reads:
gates make our layers 16 % larger than a Llama's, and that counts against nobody. Our bundles have a copy at 8 bits for
prompts; ``alone`` is the one without.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from serving import WORKER, Worker, spread

from melt_export.bundle import ExportOptions, export_source
from melt_export.source import random_source, tensor_shapes
from melt_models.configuration import MeltConfig
from melt_models.shapes import SHAPES
from melt_runtime.bench.measure import machine, read_bandwidth

WORK = Path("build/peers")
OUR_KEYS = ("total_ut_steps", "gate_kind", "norm_placement", "exit_gate")
"""Of a shape; the others are those of a Llama configuration."""
OURS = {
    "melt-onnx int4": ExportOptions(precision="int4", prompts="int8", verified=False, quantized_caches=False),
    "melt-onnx int4 alone": ExportOptions(precision="int4", verified=False, quantized_caches=False),
    "melt-onnx int8": ExportOptions(precision="int8", verified=False, quantized_caches=False),
}
PEERS = {
    "llama.cpp Q4_0": "melt-onnx int4",
    "genai": "melt-onnx int4",
    "torch": "melt-onnx int4",
    "torch.compile": "melt-onnx int4",
    "llama.cpp Q8_0": "melt-onnx int8",
}
"""Each with the bundle of ours that it stands beside."""
BESIDE = {"melt-onnx int4 alone": "melt-onnx int4", **PEERS}


def llama_shape(name: str, **changes: int) -> dict:
    """A published shape for short contexts."""
    return {**SHAPES[name], "max_position_embeddings": 2048, "total_ut_steps": 1, **changes}


WIDE = llama_shape("melt-1.6b", num_hidden_layers=4, vocab_size=256)
DEEP = llama_shape("smollm2-135m")
MODELS = {
    "4 layers of 2048, gated": (WIDE, "elementwise"),
    "4 layers of 2048": (WIDE, "none"),
    "30 layers of 576": (DEEP, "none"),
}
"""Shape, and our gate: a Llama has none."""
POSITION, STEPS, PREFILL = 64, 16, 512


def open_worker(runtime: str, model: Path, threads: int) -> Worker:
    """A runtime in its environment."""
    python = sys.executable if runtime in OURS else str(WORK / "venv" / "bin" / "python")
    return Worker([python, str(WORKER), runtime, str(model), str(threads)])


def main() -> int:
    """Prints a table for each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="turns of each runtime (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--peers", default=",".join(PEERS), help="of %(default)s; torch.compile takes minutes to begin")
    parser.add_argument("--models", type=int, nargs="*", default=[0, 1, 2], help="which (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    args = parser.parse_args()
    print("; ".join(f"{name} {value}" for name, value in machine().items()), f"; {args.threads} threads")
    figures = {}
    for label in [list(MODELS)[number] for number in args.models]:
        shape, gate = MODELS[label]
        figures[label] = compare(label, shape, gate, args.rounds, args.threads, args.peers.split(","))
    if args.json is not None:
        args.json.write_text(json.dumps({"machine": machine(), "models": figures}, indent=1) + "\n", encoding="utf-8")
    return 0


def compare(label: str, shape: dict, gate: str, rounds: int, threads: int, peers: list[str]) -> dict:
    """Measures one shape in every runtime."""
    folder, ours, theirs, streamed = make_models(label, shape, gate)
    workers = {name: open_worker(name, folder, threads) for name in (*OURS, *peers)}
    found: dict[str, dict[str, list[float]]] = {name: {"decode": [], "prefill": []} for name in workers}
    bandwidths = []
    for turn in range(rounds + 1):
        bandwidths.append(read_bandwidth(threads))
        first = turn % len(workers)
        for name in [*workers][first:] + [*workers][:first]:  # whoever comes after another is not always the same
            worker = workers[name]
            decode, prefill = worker.ask(f"decode {POSITION} {STEPS}"), worker.ask(f"prefill {PREFILL}")
            if turn:  # the first turn warms up
                found[name]["decode"].append(decode)
                found[name]["prefill"].append(prefill)
    for worker in workers.values():
        worker.close()
    reached = streamed / (statistics.median(found["melt-onnx int4"]["decode"]) / 1e3)
    share = reached / statistics.median(bandwidths[1:])
    print(f"\n### {label}\n\n{ours / 1e6:.1f} M parameters a step in melt-onnx, {theirs / 1e6:.1f} M in the others.")
    print(f"Weights read in decoding: {reached / 1e9:.1f} GB/s, {100 * share:.0f} % of a plain loop's.\n")
    print("| runtime | decode, ms | prefill of 512, ms | ours / theirs per parameter: decode | prefill |")
    print("|---|---|---|---|---|")
    for name, times in found.items():
        cells = [f"{statistics.median(times[kind]):.2f}" for kind in ("decode", "prefill")]
        for kind in ("decode", "prefill"):
            if name not in BESIDE:
                cells.append("")
                continue
            size = ours if name in OURS else theirs
            pairs = zip(found[BESIDE[name]][kind], times[kind], strict=True)
            cells.append(spread([(m / ours) / (t / size) for m, t in pairs]))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    return {"ours": ours, "theirs": theirs, "bandwidth_share": share, "milliseconds": found}


def make_models(label: str, shape: dict, gate: str) -> tuple[Path, int, int, int]:
    """Makes the model in every format; returns the folder, parameters a step (ours, theirs), our streamed bytes."""
    folder = WORK / label.replace(" ", "-").replace(",", "")
    folder.mkdir(parents=True, exist_ok=True)
    theirs = {key: value for key, value in shape.items() if key not in OUR_KEYS}
    (folder / "shape.json").write_text(json.dumps(theirs), encoding="utf-8")
    config = MeltConfig(**{**shape, "gate_kind": gate})
    for name, options in OURS.items():
        bundle = folder / name.replace("-onnx", "").replace(" ", "-")
        if not bundle.is_dir():
            export_source(random_source(config), bundle, options)
    python = str(WORK / "venv" / "bin" / "python")
    make = Path(__file__).parent / "make_models.py"
    subprocess.run([python, str(make), str(folder / "shape.json"), str(folder)], check=True, stdout=sys.stderr)
    manifest = json.loads((folder / "melt-int4" / "manifest.json").read_text(encoding="utf-8"))
    ours = _matrix_parameters(config)
    llama = _matrix_parameters(MeltConfig(**{**shape, "gate_kind": "none"}))
    return folder, ours, llama, sum(manifest["streamed_bytes"].values())


def _matrix_parameters(config: MeltConfig) -> int:
    """Parameters of the layers' matrices and the head: what a decoded token reads."""
    shapes = tensor_shapes(config)
    shapes.setdefault("lm_head.weight", shapes["model.embed_tokens.weight"])
    return sum(
        size[0] * size[1]
        for name, size in shapes.items()
        if len(size) == 2 and not name.startswith(("model.embed_tokens", "model.early_exit_gate"))
    )


if __name__ == "__main__":
    sys.exit(main())
