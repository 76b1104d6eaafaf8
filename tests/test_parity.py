"""L3: random weights, torch against ONNX Runtime through the runtime's own driver, after every loop."""

import shutil

import numpy as np
import onnx
import pytest
import torch
from conftest import random_model
from tolerances import assert_close, assert_far

from melt_export import reference
from melt_export import verify as verify_module
from melt_export.probe import Passage, Probe
from melt_export.verify import ParityError, verify_bundle
from melt_export.waves import measure_waves
from melt_models.modeling import KVCache
from melt_runtime.bundle.contract import loop_graph
from melt_runtime.bundle.manifest import read_manifest
from melt_runtime.bundle.measured import Parity
from melt_runtime.device.providers import choose_provider
from melt_runtime.execute.executor import Executor
from melt_runtime.loading.opening import open_sessions
from melt_runtime.memory.buffers import State
from melt_runtime.memory.plan import plan_state
from melt_runtime.runner import LoopRunner

KINDS = ("elementwise", "scalar", "ema", "mean", "last", "none")
SHAPES = (
    {"num_key_value_heads": 4},
    {"num_key_value_heads": 1, "tie_word_embeddings": True},
    {"head_dim": 32, "num_hidden_layers": 1},
)
MODELS = [(kind, {}) for kind in KINDS] + [("elementwise", shape) for shape in SHAPES] + [("none", SHAPES[1])]


def open_runner(
    bundle, batch: int = 1, capacity: int = 128, chunk: int = 32, loops: int = 4, kv_cache="float"
) -> LoopRunner:
    manifest = read_manifest(bundle)
    sessions = open_sessions(bundle, manifest, choose_provider("cpu", manifest.activations), kv_cache=kv_cache)
    return LoopRunner(sessions, State(plan_state(manifest, capacity, batch, chunk, loops, kv_cache), "cpu"))


def verify(bundle, model) -> Parity:
    """Raises where any tensor is beyond its tolerance, or a first choice that is clear differs."""
    return verify_bundle(bundle, read_manifest(bundle), model, draw_ids(13)[0].tolist())


def draw_ids(length: int, seed: int = 0, batch: int = 1) -> torch.Tensor:
    return torch.randint(0, 703, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("kind", "shape"), MODELS, ids=str)
def test_every_tensor_after_every_loop(random_bundle, kind, shape):
    """Latent, keys, values, hidden, exit logit, logits; prefill of a chunk and a half, then 32 decoded tokens."""
    bundle = random_bundle(gate_kind=kind, **shape)
    parity = verify(bundle, random_model(gate_kind=kind, **shape))
    assert [run.kv_cache for run in parity.runs] == ["float", "int8", "int4"]
    for run in parity.runs:
        assert (run.loops, run.chunk, run.prompt_tokens, run.decode_tokens, run.greedy_tokens) == (4, 8, 13, 32, 34)
        assert list(run.hidden_by_loop) == ["1", "2", "3", "4"]
        wanted = {"key", "value", "hidden", "exit_logit", "logits"} | (
            {"latent"} - {kind in ("none", "last") and "latent"}
        )
        assert set(run.tensors) == wanted
        for found in run.tensors.values():
            assert 0 <= found.error <= found.allowed
        assert (run.codes_equal is None) == (run.kv_cache == "float")
        assert run.codes_equal is None or run.codes_equal > 0.99


def test_a_large_model_is_compared_whole_through_every_loop(random_bundle, monkeypatch):
    """Its matrices are read piece by piece, and over fewer tokens: no loop, layer or KV cache is left out."""
    monkeypatch.setattr(reference, "WHOLE_BYTES", 0)
    weights, bundle = random_model().state_dict(), random_bundle()
    read: list[str] = []
    model = reference.reference_model(random_model().config, lambda name: (read.append(name), weights[name])[1])
    parity = verify_bundle(bundle, read_manifest(bundle), model, brief=True)
    assert [run.kv_cache for run in parity.runs] == ["float", "int8", "int4"]
    for run in parity.runs:
        assert (run.loops, run.chunk, run.prompt_tokens, run.decode_tokens) == (4, 8, 13, 3)
        assert list(run.hidden_by_loop) == ["1", "2", "3", "4"]
    steps = 2 + 3  # chunks and tokens; the three caches share what is read
    assert read.count("model.layers.2.mlp.up_proj.weight") == 4 * steps


def read_plainly(runner: LoopRunner, probe: Probe, loops: int) -> tuple[list[int], list[int], float]:
    """First choices of what counts before the last loop and after it, token by token, and perplexity."""
    before, after, losses = [], [], []
    for passage in probe.passages:
        runner.reset()
        known = passage.start - 1
        if known:
            runner.prefill(passage.ids[:known], loops)
        for token, following in zip(passage.ids[known:-1], passage.ids[known + 1 :], strict=True):
            hidden = []
            logits = runner.decode([token], loops, lambda _, hidden=hidden: hidden.append(runner.flight.hidden))[0]
            (early,) = runner.sessions.head.run(None, {"hidden": hidden[-2][None]})
            before.append(int(early.argmax()))
            after.append(int(logits.argmax()))
            losses.append(torch.nn.functional.cross_entropy(torch.from_numpy(logits), torch.tensor(following)).item())
    return before, after, float(np.exp(np.mean(losses)))


def test_what_waves_change_is_measured_beside_plain_decoding(random_bundle):
    """At the longest lag nothing; at a shorter one first choices too, and their perplexity with them."""
    first, second = (draw_ids(length, seed=length)[0].tolist() for length in (60, 75))
    probe = Probe((Passage(first, 1), Passage(second, 20)), "random tokens")
    runner = open_runner(random_bundle(), chunk=8)
    waves = measure_waves(Executor(runner.sessions, runner.state), probe, 4)
    before, after, perplexity = read_plainly(runner, probe, 4)
    assert len(after) == probe.scored == 114
    assert list(waves) == ["1", "2", "3"]
    assert waves["3"].agreement == 1.0
    assert waves["3"].held == sum(one == other for one, other in zip(before, after, strict=True)) / 114
    assert_close(waves["3"].perplexity, perplexity)
    for lag in ("1", "2"):
        assert 0 < waves[lag].agreement < 1
        assert_far(waves[lag].perplexity, perplexity)
    assert 0 < waves["1"].held < waves["3"].held


@pytest.mark.parametrize("kind", ["none", "mean"])
def test_where_waves_are_plain_decoding_or_refused_there_is_nothing_to_measure(random_bundle, kind):
    runner = open_runner(random_bundle(gate_kind=kind))
    executor = Executor(runner.sessions, runner.state)
    assert measure_waves(executor, Probe((Passage([1, 2, 3], 1),), "three tokens"), 4) == {}
    assert executor.slots.lengths == [0]


@pytest.mark.parametrize("kind", ["float", "int8", "int4"])
def test_a_wrong_loop_over_any_kv_cache_is_found(random_bundle, tmp_path, kind):
    """One norm of the last layer with another epsilon."""
    bundle = shutil.copytree(random_bundle(), tmp_path / "wrong")
    path = bundle / f"{loop_graph(kind)}.onnx"
    graph = onnx.load(path, load_external_data=False)
    norm = [node for node in graph.graph.node if node.op_type == "SkipSimplifiedLayerNormalization"][-1]
    (epsilon,) = (attribute for attribute in norm.attribute if attribute.name == "epsilon")
    epsilon.f = 0.1
    onnx.save(graph, path)
    with pytest.raises(ParityError, match=rf"in hidden at loop 1 of prefill from token 0, {kind} KV cache: largest"):
        verify(bundle, random_model())


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_wrong_code_of_a_quantized_cache_is_found(random_bundle, monkeypatch, kind):
    """A single code, off by one where torch's value is not on the boundary."""
    read = verify_module.cache_codes

    def wrong(rows, kv_cache):
        found = read(rows, kv_cache)
        found[1, 2, 3] += kv_cache == kind
        return found

    monkeypatch.setattr(verify_module, "cache_codes", wrong)
    with pytest.raises(ParityError, match=rf"in key at layer 0, loop 1 of prefill from token 0, {kind} KV cache"):
        verify(random_bundle(), random_model())


@pytest.mark.parametrize("chunk", [1, 7, 32])
@pytest.mark.parametrize("kind", ["elementwise", "none"])
@pytest.mark.parametrize("loops", [1, 2, 4])
def test_chunks_mean_the_same_in_both(random_bundle, kind, chunk, loops):
    runner, model = open_runner(random_bundle(gate_kind=kind)), random_model(gate_kind=kind)
    ids = draw_ids(41)
    hidden = []
    actual = runner.prefill(ids[0].tolist(), loops, chunk=chunk, observe=lambda _: hidden.append(runner.flight.hidden))
    with torch.no_grad():
        expected = model(ids, loops=loops, chunk_size=chunk)
    assert_close(actual, expected.logits[0, -1])
    for place, start in enumerate(range(0, 41, chunk)):
        for loop_idx in range(loops):
            wanted = expected.loop_hidden_states[loop_idx][0, start : start + chunk]
            assert_close(hidden[place * loops + loop_idx], wanted)


def test_another_chunk_gives_other_numbers(random_bundle):
    """By design; if this failed, chunks would not be processed in parallel."""
    runner = open_runner(random_bundle())
    logits = []
    for chunk in (1, 7):
        runner.reset()
        logits.append(runner.prefill(draw_ids(41)[0].tolist(), 4, chunk=chunk).copy())
    assert_far(*logits)


def test_loops_beyond_training(random_bundle):
    runner, model = open_runner(random_bundle()), random_model()
    ids = draw_ids(11)
    with torch.no_grad():
        expected = model(ids, loops=9, chunk_size=8)
    assert_close(runner.prefill(ids[0].tolist(), 9, chunk=8), expected.logits[0, -1])


@pytest.mark.parametrize("kind", ["elementwise", "mean", "none"])
def test_a_ragged_batch_decodes_like_single_sequences(random_bundle, kind):
    """Three prompts of different lengths, prefilled into their rows, then decoded together."""
    runner, model = open_runner(random_bundle(gate_kind=kind), batch=3), random_model(gate_kind=kind)
    prompts = [draw_ids(length, seed=length) for length in (5, 19, 12)]
    caches = []
    for row, prompt in enumerate(prompts):
        caches.append(KVCache(model.config))
        actual = runner.prefill(prompt[0].tolist(), 4, chunk=7, sequence=row)
        with torch.no_grad():
            expected = model(prompt, past_key_values=caches[-1], chunk_size=7)
        assert_close(actual, expected.logits[0, -1])
    for step in range(12):
        tokens = draw_ids(3, seed=100 + step)[0]
        actual = runner.decode(tokens.tolist(), 4)
        for row in range(3):
            with torch.no_grad():
                expected = model(tokens[None, row : row + 1], past_key_values=caches[row], chunk_size=1)
            assert_close(actual[row], expected.logits[0, -1])
    assert runner.slots.lengths == [17, 31, 24]


def test_binding_in_place_changes_no_bit(random_bundle):
    """Outputs bound to the buffers of their inputs against outputs in arrays of their own."""
    bundle = random_bundle()
    runner, ids = open_runner(bundle), draw_ids(20)
    sessions, shape = runner.sessions, runner.state.plan.shape
    cache = {name: np.zeros(runner.state.plan.cache_shape, np.float32) for name in _cache_inputs(shape.layers)}
    for start in range(0, 20, 8):
        piece = ids[:, start : start + 8].numpy()
        hidden, latent = sessions.embed.run(None, {"ids": piece})
        end = start + piece.shape[1]
        for _ in range(4):
            feeds = {f"latent.{i}": latent[i] for i in range(shape.layers)} | {"hidden": hidden} | cache
            feeds["seqlens_k"] = np.array([end - 1], np.int32)
            feeds["total_sequence_length"] = np.array(end, np.int32)
            names = [output.name for output in sessions.loop.get_outputs()]
            out = dict(zip(names, sessions.loop.run(names, feeds), strict=True))
            hidden, latent = out["hidden_out"], [out[f"latent_out.{i}"] for i in range(shape.layers)]
            cache = {name: out[name.replace("past", "present")] for name in cache}
    runner.prefill(ids[0].tolist(), 4, chunk=8)
    np.testing.assert_array_equal(runner.flight.hidden, hidden[0])
    for layer_idx, pair in enumerate(runner.state.caches[0]):
        for name, buffer in zip(("past_key", "past_value"), pair, strict=True):
            np.testing.assert_array_equal(buffer.read()[:, :, :20], cache[f"{name}.{layer_idx}"][:, :, :20])


def test_float16_stays_near(random_bundle):
    (run,) = verify(random_bundle(precision="float16"), random_model().half().float()).runs
    assert 0 < run.tensors["hidden"].error <= run.tensors["hidden"].allowed


def test_a_reset_state_gives_the_same_bits(random_bundle):
    runner, ids = open_runner(random_bundle()), draw_ids(20)[0].tolist()
    first = runner.prefill(ids, 4).copy()
    runner.prefill(draw_ids(30, seed=1)[0].tolist(), 3)
    runner.reset()
    np.testing.assert_array_equal(first, runner.prefill(ids, 4))


def _cache_inputs(layers: int) -> list[str]:
    return [f"{name}.{layer_idx}" for layer_idx in range(layers) for name in ("past_key", "past_value")]
