"""Runs a bundle on the CUDA provider over the fake runtime and prints, as JSON, what each step called.

    LD_LIBRARY_PATH=FAKE python tests/fakecuda/worker.py BUNDLE [graphs]

Kernels compute nothing, so tokens and logits are whatever lies in memory; only what was called counts.
"""

import json
import sys
from collections.abc import Callable
from contextlib import suppress

from fake_libraries import read_counters

from melt_runtime import CudaOptions, GenerationConfig, MeltModel, NumericalError
from melt_runtime.request.settings import GenerationSettings, settle

CAPACITY, CHUNK, LOOPS, GROWTH_TOKENS, SLOTS = 240, 16, (1, 2, 4), 200, 3


def main(bundle: str, graphs: bool) -> None:
    """Prints the counts: of a prompt; of a decoded token by what chooses it and by loops, once warm; of 200 tokens."""
    options = CudaOptions(graphs=graphs)
    model = MeltModel.load(bundle, device="cuda", capacity=CAPACITY, chunk=CHUNK, cuda=options)
    runner = model.new_runner()
    assert runner.sampler is not None
    counts: dict[str, dict] = {}
    model_loops = LOOPS if model.manifest.model.trained_loops > 1 else (1,)

    def decode_on_device(loops: int) -> None:
        runner._executor._drawn = 0  # as if the device had drawn a token of the vocabulary
        with suppress(NumericalError):
            runner.decode_and_draw(0, loops)

    def measure(name: str, step: Callable[[int], object]) -> None:
        for loops in model_loops:
            runner.reset()
            runner.prefill([1] * (CHUNK + 3), loops)
            for _ in range(3):
                step(loops)  # arenas grow with the first ones
            counts[f"{name} {loops}"] = count(lambda loops=loops: step(loops))

    counts["prompt"] = count(lambda: runner.prefill([1] * (CHUNK + 3), 4 if model_loops == LOOPS else 1))
    measure("host", lambda loops: runner.decode([1], loops))
    runner.sampler.start(settings(temperature=0.0))
    measure("greedy", decode_on_device)
    runner.sampler.start(settings(temperature=0.8, top_k=40, top_p=0.9, seed=0))
    measure("sample", decode_on_device)
    runner.reset()
    runner.prefill([1] * CHUNK, model_loops[-1])
    decode_on_device(model_loops[-1])
    counts["growth"] = count(lambda: [decode_on_device(model_loops[-1]) for _ in range(GROWTH_TOKENS)])
    together = model.new_runner(SLOTS)
    for loops in model_loops:
        together.reset()
        for number in range(SLOTS):
            together.prefill([1] * (CHUNK + number), loops, sequence=number)
        for _ in range(3):
            together.decode([1] * SLOTS, loops)
        counts[f"together {loops}"] = count(lambda loops=loops: together.decode([1] * SLOTS, loops))
    print(json.dumps({"counts": counts, "providers": runner.sessions.loop.get_providers()}))


def settings(**said) -> GenerationSettings:
    """What the sampler is told."""
    return settle(GenerationConfig(**said), GenerationConfig(), trained_loops=4, room=1)


def count(step: Callable[[], object]) -> dict[str, int]:
    """What a step calls."""
    before = read_counters()
    step()
    after = read_counters()
    return {name: after[name] - before[name] for name in after}


if __name__ == "__main__":
    main(sys.argv[1], "graphs" in sys.argv[2:])
