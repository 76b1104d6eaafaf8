"""What one pass of a bundle's graphs costs by its rows, and where its time goes, node by node.

    python benchmarks/passes.py build/bench/melt-1.6b-4-int8 --rows 1,2,4,6,8,12,16,64,512
    python benchmarks/passes.py build/bench/smollm2-135m-int4 --nodes 1

One pass is one loop over consecutive tokens of a sequence, at position 64 of a float KV cache. With a copy of the
weights for prompts, ``loop.onnx`` and ``prompts.onnx`` take turns; ratios are of the same round. Node by node: kernels
as ONNX Runtime's own profile has them, of the loop and the head; profiling adds about 3 us to each node, so that the
sum is more than a pass takes.
"""

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

from melt_runtime.bench.measure import machine
from melt_runtime.device.ort import ort
from melt_runtime.device.providers import session_options

POSITION, CAPACITY, LONGEST = 64, 1024, 0.25
TYPES = {"tensor(float)": np.float32, "tensor(int32)": np.int32, "tensor(int64)": np.int64}


class Pass:
    """A graph bound to buffers of its own, in place where the contract says so."""

    def __init__(self, path: Path, rows: int, threads: int, profile: Path | None = None):
        options = session_options(threads)
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile)
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.bind(rows)

    def bind(self, rows: int) -> None:
        """Takes buffers for so many tokens."""
        self.binding, self.values = self.session.io_binding(), {}
        sizes = {"B": 1, "C": rows, "S": CAPACITY}
        told = {"seqlens_k": POSITION + rows - 1, "total_sequence_length": POSITION + rows}
        draw = np.random.default_rng(0)
        for tensor in self.session.get_inputs():
            shape = [sizes.get(size, size) for size in tensor.shape]
            dtype = TYPES[tensor.type]
            values = draw.standard_normal(shape) if dtype == np.float32 else np.full(shape, told.get(tensor.name, 0))
            self.values[tensor.name] = ort.OrtValue.ortvalue_from_numpy(values.astype(dtype))
            self.binding.bind_ortvalue_input(tensor.name, self.values[tensor.name])
        for tensor in self.session.get_outputs():
            past = tensor.name.replace("present", "past")
            if past in self.values:
                self.binding.bind_ortvalue_output(tensor.name, self.values[past])
            else:
                self.binding.bind_output(tensor.name, "cpu")

    def run(self) -> None:
        """Runs it once."""
        self.session.run_with_iobinding(self.binding)

    def milliseconds(self) -> float:
        """The median of as many runs as take about ``LONGEST`` seconds, after two."""
        self.run()
        begin = time.perf_counter()
        self.run()
        count = max(2, min(20, int(LONGEST / (time.perf_counter() - begin))))
        times = []
        for _ in range(count):
            begin = time.perf_counter()
            self.run()
            times.append(1e3 * (time.perf_counter() - begin))
        return statistics.median(times)


def by_rows(bundle: Path, rows: list[int], rounds: int, threads: int) -> None:
    """Prints a line for each number of rows."""
    graphs = [path for path in (bundle / "loop.onnx", bundle / "prompts.onnx") if path.is_file()]
    passes = {path.name: Pass(path, rows[0], threads) for path in graphs}
    print(f"| rows | {' | '.join(f'{name}, ms' for name in passes)} | ratio | over one row |")
    print(f"|{'---|' * (3 + len(passes))}")
    single: dict[str, float] = {}
    for count in rows:
        found: dict[str, list[float]] = {name: [] for name in passes}
        for each in passes.values():
            each.bind(count)
        for _ in range(rounds):
            for name, each in passes.items():
                found[name].append(each.milliseconds())
        medians = {name: statistics.median(times) for name, times in found.items()}
        single = single or medians
        ratio = ""
        if len(passes) > 1:
            ratios = [other / own for own, other in zip(found["loop.onnx"], found["prompts.onnx"], strict=True)]
            ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        over = min(medians.values()) / single["loop.onnx"]
        print(f"| {count} | {' | '.join(f'{ms:.2f}' for ms in medians.values())} | {ratio} | {over:.2f} |", flush=True)


def by_node(bundle: Path, rows: int, threads: int, out: Path) -> None:
    """Prints kernels by what they take, of the loop and the head."""
    name = "prompts.onnx" if rows > 1 and (bundle / "prompts.onnx").is_file() else "loop.onnx"
    print("| graph | operator | outputs | nodes | us each | ms a pass | % |\n|---|---|---|---|---|---|---|")
    runs = 40 if rows < 32 else 8
    for path in (bundle / name, bundle / "head.onnx"):
        one = Pass(path, rows if path.stem != "head" else 1, threads, out / path.stem)
        for _ in range(runs):
            one.run()
        profile = Path(one.session.end_profiling())
        events = json.loads(profile.read_text())
        profile.unlink()
        total, count = Counter(), Counter()
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                (shape, *_) = event["args"]["output_type_shape"] or [{"": [0]}]
                key = (event["args"]["op_name"], next(iter(shape.values()))[-1:])
                key = (key[0], str(*key[1]) if "MatMul" in key[0] else "")
                total[key] += event["dur"]
                count[key] += 1
        whole = sum(total.values())
        for key, microseconds in total.most_common():
            each, share = microseconds / count[key], 100 * microseconds / whole
            cells = (path.stem, *key, count[key] // runs, f"{each:.1f}", f"{microseconds / runs / 1e3:.3f}")
            print(f"| {' | '.join(map(str, cells))} | {share:.1f} |")


def main() -> int:
    """Measures one bundle."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rows", default="1,2,4,6,8,12,16,32,64,128,512", help="of a pass (default: %(default)s)")
    parser.add_argument("--nodes", type=int, metavar="ROWS", help="time by node for so many rows instead")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each graph (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    args = parser.parse_args()
    print("; ".join(f"{name} {value}" for name, value in machine().items()), f"; {args.threads} threads\n")
    if args.nodes is not None:
        by_node(args.bundle, args.nodes, args.threads, args.bundle.parent)
    else:
        by_rows(args.bundle, [int(count) for count in args.rows.split(",")], args.rounds, args.threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
