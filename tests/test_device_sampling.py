"""L1/L3: the graphs that choose tokens on a device, run on the CPU: as the host's sampler, and as numpy."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from conftest import SMALL

from melt_export.trace import model_shape, sampling_modules, trace_graph
from melt_models import MeltConfig
from melt_runtime.bundle.contract import graph_specs
from melt_runtime.bundle.manifest import read_manifest
from melt_runtime.device.ort import ort
from melt_runtime.device.providers import choose_provider, make_session
from melt_runtime.errors import NumericalError
from melt_runtime.execute.device_sampler import DeviceSampler
from melt_runtime.loading.opening import open_sessions
from melt_runtime.memory.buffers import Buffer, State
from melt_runtime.memory.plan import plan_state
from melt_runtime.request.generation_config import GenerationConfig
from melt_runtime.request.sampler import candidates
from melt_runtime.request.settings import GenerationSettings, settle
from melt_runtime.runner import LoopRunner

VOCABULARY = 37


@pytest.fixture(scope="module")
def sessions(tmp_path_factory):
    config = MeltConfig(**{**SMALL, "vocab_size": VOCABULARY})
    specs = graph_specs(model_shape(config), "float16")
    made = {}
    for name, module in sampling_modules(config).items():
        path = tmp_path_factory.mktemp("graphs") / f"{name}.onnx"
        ir.save(trace_graph(name, module, specs[name]), path)
        made[name] = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        assert {value.name for value in made[name].get_inputs()} == {tensor.name for tensor in specs[name].inputs}
    return made


def settings(**said) -> GenerationSettings:
    return settle(GenerationConfig(**said), GenerationConfig(), trained_loops=4, room=100)


def draw_logits(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (1, 1, VOCABULARY)).astype(np.float32)


class Drawing:
    """A sampler over the graphs, and the buffer that the next step would read."""

    def __init__(self, sessions, settings: GenerationSettings):
        self.sampler = DeviceSampler(sessions["greedy"], sessions["sample"], VOCABULARY, "cpu", 0)
        self.ids = Buffer((1, 1), "int64", "cpu")
        self.bindings = self.sampler.bind(self.ids)
        self.sampler.start(settings)

    def draw(self, logits: np.ndarray) -> int:
        self.sampler.logits.write(logits)
        token = self.sampler.draw(self.bindings)
        assert self.ids.read()[0, 0] == token
        return token


def test_greedy_takes_the_largest(sessions):
    drawing = Drawing(sessions, settings(temperature=0.0))
    for seed in range(20):
        logits = draw_logits(seed)
        assert drawing.draw(logits) == logits.argmax()


@pytest.mark.parametrize(
    "said",
    [
        {"temperature": 1.0, "top_k": 0, "top_p": 1.0},
        {"temperature": 0.7, "top_k": 5, "top_p": 1.0},
        {"temperature": 1.5, "top_k": 0, "top_p": 0.8},
        {"temperature": 1.0, "top_k": 12, "top_p": 0.5},
        {"temperature": 1.0, "top_k": 1, "top_p": 1.0},
    ],
    ids=str,
)
def test_frequencies_are_the_host_samplers_probabilities(sessions, said):
    """Every uniform number of a fine grid instead of random ones: each token as often as its probability says."""
    config = settings(**said, seed=1)
    logits = draw_logits(3)
    expected = np.zeros(VOCABULARY)
    tokens, probabilities = candidates(logits[0, 0], config)
    expected[tokens] = probabilities
    drawing, count = Drawing(sessions, config), 2000
    grid = iter((np.arange(count, dtype=np.float32) + 0.5) / count)
    drawing.sampler._random = type("Grid", (), {"random": lambda *_, **__: np.array([[next(grid)]], np.float32)})()
    found = np.bincount([drawing.draw(logits) for _ in range(count)], minlength=VOCABULARY) / count
    # A token is drawn for the grid points inside its share: at each end one may count or not.
    assert np.abs(found - expected).max() <= 1.5 / count


def test_a_seed_repeats_an_answer(sessions):
    config = settings(temperature=1.0, seed=7)
    logits = [draw_logits(seed) for seed in range(30)]
    first = [Drawing(sessions, config).draw(one) for one in logits[:1]]
    runs = [[drawing.draw(one) for one in logits] for drawing in (Drawing(sessions, config), Drawing(sessions, config))]
    assert runs[0] == runs[1]
    assert runs[0][0] == first[0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_refused(sessions, temperature):
    drawing = Drawing(sessions, settings(temperature=temperature, seed=0))
    for value, places in ((np.nan, 5), (np.inf, 5), (-np.inf, slice(None))):
        logits = draw_logits(0)
        logits[0, 0, places] = value
        with pytest.raises(NumericalError, match="NaN or infinite logits"):
            drawing.draw(logits)
    logits = draw_logits(0)
    logits[0, 0, 1:] = -np.inf
    assert drawing.draw(logits) == 0


def test_what_the_host_must_do():
    assert DeviceSampler.can_draw(settings(temperature=0.7, top_k=3, top_p=0.9))
    assert not DeviceSampler.can_draw(settings(repetition_penalty=1.1))
    assert not DeviceSampler.can_draw(settings(min_p=0.1))


@pytest.mark.parametrize("loops", [1, 4])
def test_the_driver_goes_on_from_the_token_that_was_drawn(random_bundle, loops):
    """The path of a device, run on the CPU: tokens stay where they were drawn, and are those of the host's path."""
    bundle = random_bundle("float16")
    manifest, choice = read_manifest(bundle), choose_provider("cpu", "float16")
    sessions = open_sessions(bundle, manifest, choice)
    drawn = {name: make_session(bundle / f"{name}.onnx", choice) for name in ("greedy", "sample")}
    host, device = (
        LoopRunner(graphs, State(plan_state(manifest, 96, chunk=8), "cpu"))
        for graphs in (sessions, replace(sessions, **drawn))
    )
    device.sampler.start(settings(temperature=0.0))
    prompt = list(range(20, 41))
    token = int(host.prefill(prompt, loops).argmax())
    assert device.prefill_and_draw(prompt, loops) == token
    sent = []
    write = device.state.step.ids.write
    device.state.step.ids.write = lambda values: sent.append(values) or write(values)
    for step in range(40):
        if step == 20:  # a token of the caller's choice in between
            token = 3
        logits = host.decode([token], loops)[0]
        following = device.decode_and_draw(token, loops)
        assert following == int(logits.argmax())
        token = following
    assert len(sent) == 1
