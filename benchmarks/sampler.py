"""What choosing a token on the host costs, by what is asked of it.

python benchmarks/sampler.py [--vocabulary 49152]
"""

import argparse
import statistics
import sys
import time

import numpy as np

from melt_runtime import GenerationConfig
from melt_runtime.request.sampler import Sampler
from melt_runtime.request.settings import settle

STEPS = 50
ASKED: dict[str, dict[str, float]] = {
    "greedy": {},
    "temperature": {"temperature": 0.8},
    "top-k 50": {"temperature": 0.8, "top_k": 50},
    "top-p 0.9": {"temperature": 0.8, "top_p": 0.9},
    "min-p 0.05": {"temperature": 0.8, "min_p": 0.05},
    "top-k 50, top-p 0.9": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    "penalty 1.1, 1,000 tokens": {"repetition_penalty": 1.1},
}
SPREADS = {"peaked": 4.0, "flat": 0.3}
"""Standard deviation of the logits: a model that is sure, and one that knows nothing."""


def main() -> int:
    """Prints the median milliseconds of a token."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=49152)
    size = parser.parse_args().vocabulary
    draw = np.random.default_rng(0)
    context = draw.integers(0, size, 1000).tolist()
    print(f"{'ms a token':<27}" + "".join(f"{name:>10}" for name in SPREADS))
    for name, said in ASKED.items():
        medians = []
        for spread in SPREADS.values():
            sampler = Sampler(settle(GenerationConfig(**said, seed=0), GenerationConfig(), trained_loops=4, room=1))
            seconds = []
            for _ in range(STEPS):
                logits = draw.normal(0, spread, size).astype(np.float32)
                begin = time.perf_counter()
                sampler.choose(logits, context, 0)
                seconds.append(time.perf_counter() - begin)
            medians.append(1e3 * statistics.median(seconds))
        print(f"{name:<27}" + "".join(f"{median:>10.3f}" for median in medians))
    return 0


if __name__ == "__main__":
    sys.exit(main())
