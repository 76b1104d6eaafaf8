"""L3 without a GPU: ONNX Runtime's real CUDA provider over a fake CUDA runtime. What runs where, and what a step calls.

Every graph is opened with the fall to the CPU switched off, so a node without a CUDA kernel fails the load, and a copy
between devices inside a graph would stand among the counted ones.
"""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from melt_runtime.device.ort import ort

FAKE = ROOT / "tests" / "fakecuda"
sys.path.insert(0, str(FAKE))
import fake_libraries  # noqa: E402 (lies beside this file, not in a package)

pytestmark = pytest.mark.skipif(
    fake_libraries.obstacle() is not None, reason=f"no fake CUDA: {fake_libraries.obstacle()}"
)

LAYERS = 2
BUNDLES = {
    "float16": {"precision": "float16"},
    "bfloat16": {"precision": "bfloat16"},
    "int4": {"precision": "int4", "activations": "float16"},
    "int8": {"precision": "int8", "activations": "float16"},
    "int4 bfloat16": {"precision": "int4", "activations": "bfloat16"},
    "heads of 64": {"precision": "float16", "head_dim": 64},
    "LoopLM": {"precision": "float16", "gate_kind": "none"},
    "mean gate": {"precision": "float16", "gate_kind": "mean"},
}
# Launches and matrix products (cuBLAS) of one loop over two layers, and of everything before and after the loops.
PER_LOOP = {
    "float16": (34, 13),
    "bfloat16": (34, 13),
    "int4": (46, 1),
    "int8": (46, 1),
    "int4 bfloat16": (46, 1),
    "heads of 64": (38, 13),
    "LoopLM": (20, 9),
    "mean gate": (28, 11),
}
BESIDE = {"float16": (4, 1), "bfloat16": (4, 1), "int4": (5, 1), "int8": (5, 1), "int4 bfloat16": (5, 1)}
BESIDE |= {"heads of 64": (4, 1), "LoopLM": (2, 1), "mean gate": (4, 1)}
# What chooses the token: copies in, copies out, copies on the device, launches.
CHOICE = {"host": (2, 1, 0, 0), "greedy": (1, 1, 2, 9), "sample": (2, 1, 6, 32)}
BYTES_IN = {"host": 12, "greedy": 4, "sample": 8}
VOCABULARY = 703


@pytest.fixture(scope="session")
def fake_cuda():
    return fake_libraries.build(ROOT / "build" / "fakecuda" / ort.__version__)


@pytest.fixture(scope="session")
def counts(fake_cuda, random_bundle):
    """Counts by bundle and by whether graphs are captured, each taken once in a process of its own."""
    taken: dict[tuple[str, bool], dict[str, dict[str, int]]] = {}

    def take(name: str, graphs: bool = False) -> dict[str, dict[str, int]]:
        if (name, graphs) not in taken:
            bundle = random_bundle(**BUNDLES[name], num_hidden_layers=LAYERS)
            out = run(fake_cuda, str(FAKE / "worker.py"), str(bundle), *(["graphs"] if graphs else []))
            found = json.loads(out)
            assert found["providers"][0] == "CUDAExecutionProvider"
            taken[name, graphs] = found["counts"]
        return taken[name, graphs]

    return take


def run(fake_cuda, *command: str) -> str:
    environment = {**os.environ, "LD_LIBRARY_PATH": str(fake_cuda)}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def lengths(name: str) -> int:
    """Of a sequence, that are told in one piece: a LoopLM's tokens have one for each loop."""
    return 4 if name == "LoopLM" else 1


@pytest.mark.parametrize("choice", CHOICE)
@pytest.mark.parametrize("name", BUNDLES)
def test_what_a_token_calls(counts, name, choice):
    """No allocation. In: the position; where the host chooses the token, where one is drawn a number. Out: 4 bytes."""
    to_device, to_host, on_device, choosing = CHOICE[choice]
    for loops in (1, 2, 4):
        # The loop's number is told to the gate that averages over loops.
        told = loops if name == "mean gate" else 0
        assert counts(name)[f"{choice} {loops}"] | {"synchronizations": 0} == {
            "allocations": 0,
            "frees": 0,
            "to_device": to_device + told,
            "to_host": to_host,
            "on_device": on_device,
            "launches": BESIDE[name][0] + choosing + loops * PER_LOOP[name][0],
            "products": BESIDE[name][1] + loops * PER_LOOP[name][1],
            "graph_launches": 0,
            "synchronizations": 0,
            "bytes_to_device": BYTES_IN[choice] + 8 * told + 4 * (lengths(name) - 1),
            "bytes_to_host": 4 * VOCABULARY if choice == "host" else 4,
            "bytes_allocated": 0,
        }


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("name", ["float16", "int4", "LoopLM", "mean gate"])
def test_tokens_of_several_slots_call_what_one_does(counts, name, graphs):
    """One launch of each kernel for all of them, nothing allocated; captured or not, since only one slot is."""
    for loops in (1, 2, 4):
        found = counts(name, graphs)[f"together {loops}"]
        told = loops if name == "mean gate" else 0
        assert (found["allocations"], found["frees"], found["on_device"]) == (0, 0, 0)
        assert (found["to_device"], found["to_host"]) == (2 + told, 1)
        assert found["bytes_to_device"] == 3 * 8 + 8 * told + 4 * 3 * lengths(name)
        assert found["bytes_to_host"] == 3 * 4 * VOCABULARY
        assert found["graph_launches"] == 0
        assert found["products"] == counts(name)[f"host {loops}"]["products"]


@pytest.mark.parametrize("name", ["float16", "bfloat16", "int4", "LoopLM"])
def test_captured_graphs_are_one_launch_a_loop(counts, name):
    for choice, (to_device, to_host, _, choosing) in CHOICE.items():
        for loops in (1, 2, 4):
            found = counts(name, graphs=True)[f"{choice} {loops}"]
            head = 0 if choice == "host" else 1  # logits for the host leave the device, so that head is not captured
            assert found["graph_launches"] == loops + 1 + head, (choice, loops)
            assert found["allocations"] == 0
            assert (found["to_device"], found["to_host"]) == (to_device, to_host)
            if choice != "host":
                assert (found["launches"], found["products"]) == (choosing, 0)


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("name", ["float16", "int4 bfloat16"])
def test_two_hundred_tokens_do_not_grow(counts, name, graphs):
    grown = counts(name, graphs)["growth"]
    assert (grown["allocations"], grown["bytes_allocated"], grown["frees"]) == (0, 0, 0)
    assert grown["bytes_to_host"] == 4 * 200
    assert grown["bytes_to_device"] == 8 * 200


STATE_BYTES = """
import sys
from melt_runtime import MeltModel
for loops in (1, 4, 16):
    model = MeltModel.load(sys.argv[1], device="cuda", capacity=128, loops=loops)
    runner = model.new_runner()
    state = runner.state
    assert model.state_bytes == runner.state_bytes == state.plan.total_bytes
    options = runner.sessions.loop.get_provider_options()["CUDAExecutionProvider"]
    limit = model.manifest.weight_bytes + 4 * state.plan.activation_bytes + (256 << 20)
    assert (options["gpu_mem_limit"], options["arena_extend_strategy"]) == (str(limit), "kSameAsRequested")
    assert {state.caches[0][0][0].value.device_name(), state.step.hidden.value.device_name()} == {"cuda"}
    print(model.state_bytes)
"""


def test_state_lies_on_the_device_and_is_the_same_for_every_depth(fake_cuda, random_bundle):
    for name in ("float16", "bfloat16"):
        bundle = random_bundle(**BUNDLES[name], num_hidden_layers=LAYERS)
        assert len(set(run(fake_cuda, "-c", STATE_BYTES, str(bundle)).split())) == 1


REFUSED = """
import sys
from melt_runtime import MeltModel, ProviderError
try:
    MeltModel.load(sys.argv[1], device=sys.argv[2])
except ProviderError as error:
    print(error)
"""


def test_a_bundle_for_the_cpu_and_a_device_too_many_are_refused(fake_cuda, random_bundle):
    said = run(fake_cuda, "-c", REFUSED, str(random_bundle()), "cuda")
    assert "was made for cpu (float32 activations), not for cuda" in said
    said = run(fake_cuda, "-c", REFUSED, str(random_bundle(**BUNDLES["float16"], num_hidden_layers=LAYERS)), "cuda:3")
    assert "device 3 does not exist: there are devices 0 to 0" in said
