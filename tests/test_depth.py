"""Adaptive depth: a token leaves the loop when a rule says so, and everything else goes on as if it had been told."""

import json
import shutil
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from melt_export.probe import Passage, Probe
from melt_export.record import open_runner
from melt_runtime import GenerationConfig, MeltModel
from melt_runtime.bundle.manifest import file_entry, read_manifest, write_manifest
from melt_runtime.execute.executor import Executor
from melt_runtime.request.settings import settle
from melt_runtime.schedule.depth import Depth, GateExit, SettledExit

sys.path.insert(0, str(ROOT / "benchmarks"))
import text

CAPACITY, CHUNK = 120, 8
FREE = {"stop_ids": ()}
KINDS = {"MELT": {}, "mean gate": {"gate_kind": "mean"}, "LoopLM": {"gate_kind": "none"}}
RULES = {
    "gate": {"exit_rule": "gate", "exit_threshold": 0.74},
    "gate, at least 2": {"exit_rule": "gate", "exit_threshold": 0.5, "min_loops": 2, "max_loops": 3},
    "settled": {"exit_rule": "settled", "exit_threshold": 0.02},
    "settled, at least 3": {"exit_rule": "settled", "exit_threshold": 0.5, "min_loops": 3},
}


def load(random_bundle, slots: int = 1, **changes) -> MeltModel:
    return MeltModel.load(random_bundle(**changes), device="cpu", capacity=CAPACITY, chunk=CHUNK, slots=slots)


@given(st.lists(st.floats(-900, 900), min_size=1, max_size=6), st.floats(0.05, 0.95))
def test_the_gate_cumulates_as_ouro_does(logits, threshold):
    """Beside the sum of p_t = lambda_t * prod (1 - lambda_s)."""
    rule, lambdas = GateExit(Depth(9, 2, "gate", threshold)), [1 / (1 + np.exp(-np.clip(logits, -700, 700)))]
    for loops in range(1, len(logits) + 1):
        total = sum(lambdas[0][t] * np.prod(1 - lambdas[0][:t]) for t in range(loops))
        leaves = rule.leaves(loops, np.array(logits[loops - 1 : loops]))
        if abs(total - threshold) > 1 / 512:
            assert leaves == (loops >= 2 and total >= threshold)


def test_settled_means_neither_choice_nor_probability_moved():
    def run(*logits: list[float], least: int = 1, threshold: float = 0.1) -> list[bool]:
        rule = SettledExit(Depth(9, least, "settled", threshold))
        return [
            rule.leaves(loops, np.array(row, dtype=np.float32))
            for loops, row in enumerate(logits, start=1)
            if rule.wants(loops)
        ]

    sure, other, unsure = [9.0, 0.0], [0.0, 9.0], [1.0, 0.0]
    assert run(sure, sure) == [False, True]
    assert run(sure, other, other) == [False, False, True]
    assert run(unsure, sure, sure) == [False, False, True]
    assert run(unsure, sure, threshold=0.3) == [False, True]
    assert run(sure, sure, sure, sure, least=3) == [False, True, True]  # asked from the second loop on
    assert run([np.nan, 0.0], [np.nan, 0.0]) == [False, False]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_token_takes_the_loops_that_the_rule_says(random_bundle, kind, rule):
    """Told again, token by token, with the rule by its definition: the same loops, the same choices, the same cache."""
    model, settings, prompt = load(random_bundle, **KINDS[kind]), dict(RULES[rule]), list(range(30, 51))
    for threshold in thresholds(model, settings):
        settings["exit_threshold"] = threshold
        result = model.generate(prompt, loops="auto", max_new_tokens=40, **settings, **FREE)
        if len(set(result.loops_per_token)) > 1:
            break
    else:
        assert "min_loops" in settings, "nothing to see here: every token took as many loops"
    assert len(result.loops_per_token) == len(result.token_ids) == sum(result.depth_histogram.values()) == 40
    assert result.passes == sum(result.loops_per_token[1:])
    most, least = settings.get("max_loops", 4), settings.get("min_loops", 1)
    assert result.loops == most
    assert set(result.loops_per_token) <= set(range(least, most + 1))
    check_read_alike(random_bundle(**KINDS[kind]), prompt, result, Depth(most, least, settings["exit_rule"], threshold))
    slot, state = model.session._slot, model.session._engine.executor.state
    starts = [0, CHUNK, 2 * CHUNK, 20]  # the prompt's last token leaves on its own
    chunks = [abs(int(slot.depths[start])) for start in starts]
    assert chunks[:3] == [most] * 3
    if kind == "LoopLM":
        check_filled(state, slot, most)
        return
    runner, depth = model.new_runner(), Depth(most, least, settings["exit_rule"], settings["exit_threshold"])
    for place, (start, end) in enumerate(pairwise([*starts, 21])):
        taken, logits = step(runner, prompt[start:end], depth if end == 21 else Depth.fixed(most))
        assert taken == chunks[place]
    assert result.loops_per_token[0] == chunks[-1]
    for token, loops, after in zip(result.token_ids, result.loops_per_token[1:], result.token_ids[1:], strict=False):
        assert token == int(logits.argmax())
        taken, logits = step(runner, [token], depth)
        assert taken == loops
        assert after == int(logits.argmax())
    for ours, theirs in zip(state.caches[0], runner.state.caches[0], strict=True):
        np.testing.assert_array_equal(ours[0].read()[:, :, : slot.length], theirs[0].read()[:, :, : slot.length])


def check_read_alike(bundle, prompt, result, depth):
    """The benchmark of text, given an answer's tokens, reads of each what the answer read."""
    runner = open_runner(bundle, read_manifest(bundle), CAPACITY, chunk=CHUNK)
    probe = Probe((Passage([*prompt, *result.token_ids], len(prompt)),), "an answer")
    reading = text.read_leaving(Executor(runner.sessions, runner.state), probe, depth)
    assert tuple(reading.loops) == tuple(result.loops_per_token)
    assert tuple(reading.choices) == tuple(result.token_ids)


def thresholds(model: MeltModel, settings: dict) -> list[float]:
    """Some that tokens reach after different loops: random weights know no usual one."""
    if settings["exit_rule"] == "settled":
        return [settings["exit_threshold"], 0.2, 1.0, 0.001, 0.1]
    runner, chances = model.new_runner(), []
    runner.prefill([1], 4)
    for token in range(60, 90):
        seen: list[float] = []
        runner.decode([token], 4, observe=lambda _, seen=seen: seen.append(runner.flight.exit_logits[0]))
        chances += (1 - np.cumprod(1 - 1 / (1 + np.exp(-np.array(seen)))))[1:3].tolist()
    return np.quantile(chances, np.linspace(0.05, 0.95, 19)).tolist()


def step(runner, ids: list[int], depth: Depth) -> tuple[int, np.ndarray]:
    """Runs tokens through 1, 2, ... loops, each time from the state before, until the rule lets them leave."""
    slot, head = runner.slots[0], runner.sessions.head
    start, stays, last = slot.length, np.ones(len(ids)), None
    for loops in range(1, depth.most + 1):
        slot.truncate(start)
        runner.prefill(ids, loops)
        flight = runner.flight
        (logits,) = head.run(None, {"hidden": flight.hidden[None, -1:]})
        logits = logits[0, 0]
        if depth.rule == "gate":
            stays = stays * (1 - 1 / (1 + np.exp(-flight.exit_logits.astype(float))))
            leaves = bool((1 - stays >= depth.threshold).all())
        else:
            chances = np.exp(logits - logits.max())
            now = int(logits.argmax()), float(chances.max() / chances.sum())
            leaves = last is not None and now[0] == last[0] and abs(now[1] - last[1]) <= depth.threshold
            leaves, last = leaves and len(ids) == 1, now
        if leaves and loops >= depth.least:
            break
    return loops, logits


def check_filled(state, slot, most: int) -> None:
    """Caches of loops that a chunk did not take hold what the last one left."""
    starts, early = [*np.flatnonzero(slot.depths[: slot.length]).tolist(), slot.length], 0
    for start, end in pairwise(starts):
        taken = abs(int(slot.depths[start]))
        assert (slot.depths[start] < 0) == (taken < most)
        for cache_set in range(taken, most):
            early += 1
            for last, filled in zip(state.caches[taken - 1], state.caches[cache_set], strict=True):
                for ours, theirs in zip(last, filled, strict=True):
                    rows = ours.read()[0, :, start:end]
                    assert rows.any()
                    np.testing.assert_array_equal(rows, theirs.read()[0, :, start:end])
    assert early or most == min(slot.depths[starts[:-1]])


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_decides_as_each_would_alone(random_bundle, kind):
    model = load(random_bundle, slots=3, **KINDS[kind])
    prompts = [list(range(seed, seed + seed)) for seed in (3, 9, 14, 22, 30)]
    configs = [GenerationConfig(loops="auto", max_new_tokens=12, **FREE, **RULES[rule]) for rule in RULES]
    configs = [*configs, GenerationConfig(loops=2, max_new_tokens=12, **FREE)]
    alone = [model.generate(prompt, config) for prompt, config in zip(prompts, configs, strict=True)]
    for one, other in zip(alone, model.generate_batch(prompts, configs), strict=True):
        assert (one.token_ids, one.loops_per_token) == (other.token_ids, other.loops_per_token)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", ["gate", "settled"])
def test_conversations_reuse_a_prompts_chunks_by_any_rule(random_bundle, kind, rule):
    """They take the most loops, whatever lets the answer's tokens leave; another depth needs rows of its own."""
    model, settings = load(random_bundle, **KINDS[kind]), {"loops": "auto", **RULES[rule], **FREE, "max_new_tokens": 4}
    chat = [{"role": "user", "content": "Ana reports to Ben. Ben reports to Cleo. Who is above Ana?"}]
    session, cached = model.new_session(), []
    for said in (settings, settings, {**settings, "exit_threshold": 0.3}, {"loops": 4, "max_new_tokens": 4, **FREE}):
        result, fresh = session.generate(chat, **said), model.generate(chat, **said)
        assert result.token_ids == fresh.token_ids
        assert result.loops_per_token == fresh.loops_per_token
        cached.append(result.cached_tokens)
    assert cached[0] == 0 < cached[1]
    assert set(cached[1:]) == {cached[1]}
    shallower = session.generate(chat, **{**settings, "max_loops": 2}).cached_tokens
    assert shallower == (cached[1] if kind == "LoopLM" else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_failed_turn_took_is_run_again_at_the_depth_that_it_had(random_bundle, kind):
    model = load(random_bundle, **KINDS[kind])
    settings = {"loops": "auto", **RULES["gate"], "max_new_tokens": 5, **FREE}
    session, fresh = model.new_session(), model.new_session()
    for one in (session, fresh):
        one.generate(list(range(40, 61)), **settings)

    def fail(done: int, total: int) -> None:
        if done > 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.generate([{"role": "user", "content": "x" * 40}], progress=fail, **settings)
    assert session._slot.length < fresh._slot.length
    results = [one.generate([7, 8, 9], **settings) for one in (session, fresh)]
    assert results[0].token_ids == results[1].token_ids
    assert session._slot.depths.tolist() == fresh._slot.depths.tolist()


def test_a_looplm_keeps_as_many_caches_as_its_conversation_began_with(random_bundle):
    session = load(random_bundle, gate_kind="none").new_session()
    auto = {"loops": "auto", "max_loops": 3, "exit_rule": "gate", "exit_threshold": 0.1, **FREE}
    session.generate([1, 2, 3], max_new_tokens=3, **auto)
    for loops in (2, 4):
        with pytest.raises(ValueError, match=f"loops must stay 3 until reset, got {loops}"):
            session.generate([4], loops=loops, max_new_tokens=2)
    session.generate([4], loops=3, max_new_tokens=2, **FREE)
    session.generate([4], max_new_tokens=2, **auto)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"loops": "deep"}, "loops must be a whole number, got 'deep'"),
        ({"loops": 2, "exit_rule": "gate"}, "exit_rule must go with loops='auto', got loops=2"),
        ({"min_loops": 2, "exit_threshold": 0.5}, "exit_threshold, min_loops must go with loops='auto', got loops=4"),
        ({"loops": "auto", "exit_rule": "never"}, "exit_rule must be one of gate, settled, got 'never'"),
        ({"loops": "auto", "exit_threshold": 1.5}, r"exit_threshold must be in \[0, 1\], got 1.5"),
        ({"loops": "auto", "exit_threshold": float("nan")}, r"exit_threshold must be in \[0, 1\], got nan"),
        ({"loops": "auto", "min_loops": 0}, "min_loops must be at least 1, got 0"),
        ({"loops": "auto", "min_loops": 5}, r"min_loops must be at most max_loops \(4\), got 5"),
        ({"loops": "auto", "max_loops": 2, "min_loops": 3}, r"min_loops must be at most max_loops \(2\), got 3"),
        ({"loops": "auto", "exit_rule": "gate"}, "this bundle's exit gate was not trained; give exit_threshold"),
    ],
    ids=str,
)
def test_what_contradicts_itself_is_refused_and_nothing_moves(random_bundle, said, message):
    session = load(random_bundle).new_session()
    session.generate([1, 2, 3], max_new_tokens=2, **FREE)
    before = session.token_ids
    with pytest.raises(ValueError, match=message):
        session.generate([4], **said)
    assert session.token_ids == before


def test_a_model_without_an_exit_gate_has_no_rule_of_it(random_bundle):
    model = load(random_bundle, exit_gate=False)
    with pytest.raises(ValueError, match="exit_rule must be 'settled', got 'gate': this model has no exit gate"):
        model.generate([1], loops="auto", exit_rule="gate", exit_threshold=0.5)
    assert model.generate([1, 2], loops="auto", max_new_tokens=3, **FREE).token_ids
    with pytest.raises(ValueError, match="loops must be at most 4, got 5"):
        load(random_bundle, gate_kind="none").generate([1], loops="auto", max_loops=5)


def test_a_bundle_says_how_its_gate_is_to_be_used(random_bundle, tmp_path):
    """A threshold in its defaults means that its gate was trained."""
    bundle = GenerationConfig(exit_threshold=0.7, loops="auto")
    for said, rule, threshold in (
        (GenerationConfig(), "gate", 0.7),
        (GenerationConfig(exit_threshold=0.3), "gate", 0.3),
        (GenerationConfig(exit_rule="settled"), "settled", 0.05),
        (GenerationConfig(exit_rule="settled", exit_threshold=0.2), "settled", 0.2),
    ):
        depth = settle(said, bundle, 4, 10, has_exit_gate=True).depth
        assert (depth.rule, depth.threshold, depth.least, depth.most) == (rule, threshold, 1, 4)
    assert settle(GenerationConfig(loops=3), bundle, 4, 10, has_exit_gate=True).depth == Depth.fixed(3)
    folder = shutil.copytree(random_bundle(), tmp_path / "bundle")
    (folder / "generation_config.json").write_text(json.dumps({"loops": "auto", "exit_threshold": 0.74}))
    manifest, name = read_manifest(folder), "generation_config.json"
    write_manifest(folder, replace(manifest, files={**manifest.files, name: file_entry(folder / name)}))
    model = MeltModel.load(folder, device="cpu", capacity=CAPACITY, chunk=CHUNK)
    same = load(random_bundle).generate([5, 6], loops="auto", max_new_tokens=9, **RULES["gate"], **FREE)
    assert model.generate([5, 6], max_new_tokens=9, **FREE).loops_per_token == same.loops_per_token


def test_a_saved_session_goes_on_by_its_rule(random_bundle, tmp_path):
    for kind, changes in KINDS.items():
        model = load(random_bundle, **changes)
        settings = {"loops": "auto", **RULES["gate"], "max_new_tokens": 6, **FREE}
        session, restored = model.new_session(), model.new_session()
        session.generate(list(range(40, 61)), **settings)
        session.save(tmp_path / kind)
        restored.restore(tmp_path / kind)
        results = [one.generate([7, 8, 9], **settings) for one in (session, restored)]
        assert results[0].token_ids == results[1].token_ids
        assert results[0].loops_per_token == results[1].loops_per_token
