"""L3 to L5 on a real GPU: CUDA beside the CPU, graphs beside plain runs, memory, speed. ``make test-cuda``.

Left out unless asked for, since they need a GPU and the CUDA libraries.
"""

import statistics
import time

import numpy as np
import pytest
from conftest import MELT_TINY, random_model, save_checkpoint
from tolerances import CAPTURED, CUDA_TYPES, PARITY, assert_close

from melt_export.bundle import ExportOptions, export_bundle
from melt_models.evaluation import read_examples
from melt_runtime import CudaOptions, MeltModel
from melt_runtime.device.cuda import cuda_obstacle, free_memory

pytestmark = pytest.mark.cuda
PROMPT = list(range(5, 45))


@pytest.fixture(scope="session", autouse=True)
def gpu():
    assert cuda_obstacle() is None, f"these tests need a GPU: {cuda_obstacle()}"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    out = tmp_path_factory.mktemp("cuda") / "melt-tiny"
    export_bundle(MELT_TINY, out, ExportOptions("float16"))
    return out


def logits(model: MeltModel, loops: int) -> np.ndarray:
    """After a prompt and after each of eight given tokens, [9, V]."""
    runner = model.new_runner()
    found = [runner.prefill(PROMPT, loops).copy()]
    found += [runner.decode([token], loops)[0].copy() for token in range(8)]
    return np.stack(found)


@pytest.mark.parametrize("kind", ["elementwise", "mean", "none"])
def test_cuda_computes_what_the_cpu_does(random_bundle, kind):
    bundle = random_bundle("float16", gate_kind=kind)
    cpu, cuda = (MeltModel.load(bundle, device=device, capacity=64) for device in ("cpu", "cuda"))
    for loops in (1, 2, 4):
        expected = logits(cpu, loops)
        assert_close(logits(cuda, loops), expected, PARITY["float16"])


@pytest.mark.parametrize("precision", ["bfloat16", "int8", "int4"])
def test_other_types_compute_what_float32_does(tmp_path, precision):
    checkpoint = save_checkpoint(random_model(), tmp_path / "checkpoint")
    activations = None if precision == "bfloat16" else "float16"
    export_bundle(checkpoint, tmp_path / "cuda", ExportOptions(precision, activations=activations, verified=False))
    weights = "float32" if precision == "bfloat16" else precision
    export_bundle(checkpoint, tmp_path / "cpu", ExportOptions(weights, verified=False))
    expected = logits(MeltModel.load(tmp_path / "cpu", device="cpu", capacity=64), 4)
    actual = logits(MeltModel.load(tmp_path / "cuda", device="cuda", capacity=64), 4)
    assert_close(actual, expected, CUDA_TYPES)


def test_melt_tiny_answers(tiny):
    model = MeltModel.load(tiny, device="cuda", capacity=512)
    for example in read_examples(MELT_TINY):
        assert model.generate(example.chat, loops=4, temperature=0.0).text.strip() == example.answer


def test_captured_graphs_give_what_plain_runs_give(tiny):
    plain = MeltModel.load(tiny, device="cuda", capacity=256)
    captured = MeltModel.load(tiny, device="cuda", capacity=256, cuda=CudaOptions(graphs=True))
    for loops in (1, 2, 4):
        expected = logits(plain, loops)
        assert_close(logits(captured, loops), expected, CAPTURED)
        for settings in ({"temperature": 0.0}, {"temperature": 0.8, "top_k": 20, "seed": 1}):
            one, other = (
                m.generate(PROMPT, loops=loops, max_new_tokens=100, stop_ids=(), **settings) for m in (plain, captured)
            )
            assert one.token_ids == other.token_ids


def test_device_and_host_choose_the_same_greedy_tokens(tiny):
    model = MeltModel.load(tiny, device="cuda", capacity=256)
    settings = {"temperature": 0.0, "max_new_tokens": 100, "stop_ids": ()}
    on_device = model.generate(PROMPT, **settings)
    executor = model.session._engine.executor
    sampler, executor.sampler = executor.sampler, None
    assert sampler is not None
    assert model.generate(PROMPT, **settings).token_ids == on_device.token_ids


def test_memory_is_the_same_for_every_depth_and_every_token(tiny):
    model = MeltModel.load(tiny, device="cuda", capacity=1024)
    model.generate(PROMPT, loops=16, max_new_tokens=8, stop_ids=())
    before = free_memory(0)
    for loops in (1, 4, 16):
        model.generate(PROMPT, loops=loops, max_new_tokens=200, stop_ids=())
    assert free_memory(0) == before


@pytest.mark.parametrize("graphs", [False, True])
def test_speed_is_reported(tiny, graphs, capsys):
    """Prints milliseconds a token by loops; the figures themselves are not judged."""
    runner = MeltModel.load(tiny, device="cuda", capacity=512, cuda=CudaOptions(graphs=graphs)).new_runner()
    for loops in (1, 2, 4):
        runner.reset()
        runner.prefill(PROMPT, loops)
        seconds = []
        for _ in range(50):
            started = time.perf_counter()
            runner.decode([1], loops)
            seconds.append(time.perf_counter() - started)
        assert len(seconds) == 50
        with capsys.disabled():
            print(
                f"\nmelt-tiny float16, graphs {graphs}, loops {loops}: {1e3 * statistics.median(seconds):.3f} ms/token"
            )
