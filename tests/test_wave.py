"""Wave decoding: tokens start from drafts while those before them still take their loops."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_choices

from melt_runtime import CapacityError, GenerationConfig, MeltModel, NumericalError
from melt_runtime.execute.executor import Executor
from melt_runtime.schedule.depth import Depth
from melt_runtime.schedule.span import Span
from melt_runtime.schedule.wave import Wave

CAPACITY, CHUNK = 160, 16
FREE = {"stop_ids": ()}


def load(random_bundle, **changes) -> MeltModel:
    sizes = {
        "capacity": CAPACITY,
        "chunk": CHUNK,
        **{name: changes.pop(name) for name in ("slots",) if name in changes},
    }
    return MeltModel.load(random_bundle(**changes), device="cpu", **sizes)


@pytest.fixture(scope="module")
def model(random_bundle) -> MeltModel:
    return load(random_bundle)


def simulate(
    loops: int, lag: int, settles: list[int], most: int = 8, leaves: list[int] | None = None, apart: bool = False
) -> tuple[Wave, int, list[int]]:
    """A sequence whose token at each place predicts the next one rightly from a given loop on, and may leave after
    another; passes and tokens."""
    last, (wave, passes, out) = len(settles) - 2, (Wave(0, Depth.fixed(loops), lag, most, apart), 0, [100])
    wave.start(0, 100)

    def predict(span: Span, path: list[int]) -> int:
        right = span.ids[0] == 100 + span.start and all(token == 100 + n for n, token in enumerate(path, out[-1] - 99))
        return 101 + span.start if right and span.loop >= settles[span.start] else -span.loop

    while len(out) < len(settles):
        passes += 1
        spans = wave.spans
        assert [span.start for span in spans] == list(range(len(out) - 1, len(out) - 1 + len(spans)))
        assert len(spans) <= most
        assert not spans[0].is_done
        assert apart or wave.running == spans
        pairs = pairwise(spans)
        assert all(older.is_done or older.loop >= newer.loop + lag for older, newer in pairs)
        for span in wave.running:
            span.loop += 1
        final = wave.advance(predict, lambda span: leaves is not None and span.loop >= leaves[span.start], last)
        for span, token in final:
            assert span.is_done
            out.append(token)
        if not wave.spans and len(out) < len(settles):
            wave.start(len(out) - 1, out[-1])
    return wave, passes, out


@given(st.integers(2, 5), st.data())
def test_whatever_the_drafts_the_last_loop_has_its_way(loops, data):
    """A token costs as many passes as its prediction takes to settle, never more than plain decoding."""
    lag = data.draw(st.integers(1, loops - 1))
    settles = data.draw(st.lists(st.integers(1, loops), min_size=3, max_size=20))
    wave, passes, out = simulate(loops, lag, settles)
    assert out == list(range(100, 100 + len(settles)))
    costs = [max(settle, lag) for settle in settles[: len(settles) - 2]]
    assert passes == sum(costs) + loops
    assert wave.drafts.kept == sum(settle < loops for settle in settles[: len(settles) - 2])
    assert wave.drafts.made == wave.drafts.kept + sum(wave.drafts.corrected.values())


@given(st.booleans(), st.data())
def test_with_a_rule_tokens_leave_as_soon_as_nothing_before_them_is_open(apart, data):
    """What is right when a token leaves is right; a token alone costs the loops that it takes, others less."""
    loops = data.draw(st.integers(2, 5))
    lag = data.draw(st.integers(1, loops - 1))
    leaves = data.draw(st.lists(st.integers(1, loops), min_size=3, max_size=20))
    settles = [data.draw(st.integers(1, leave)) for leave in leaves]
    wave, passes, out = simulate(loops, lag, settles, leaves=leaves, apart=apart)
    assert out == list(range(100, 100 + len(settles)))
    assert passes <= sum(leaves[: len(settles) - 1])
    assert wave.drafts.made == wave.drafts.kept + sum(wave.drafts.corrected.values())


def test_no_more_are_under_way_than_there_is_room_for():
    assert simulate(5, 1, [1] * 12, most=3)[2] == list(range(100, 112))


@pytest.mark.parametrize("loops", [2, 3, 4, 6])
@pytest.mark.filterwarnings("ignore:loops=6 is deeper:RuntimeWarning")
def test_at_the_longest_lag_a_wave_is_plain_decoding(model, loops):
    """Hundreds of tokens, the same to the last, in loops of which the first and the last share a pass."""
    for seed in range(3):
        prompt = np.random.default_rng(seed).integers(0, 700, 20).tolist()
        plain = model.generate(prompt, loops=loops, max_new_tokens=120, **FREE)
        wave = model.generate(prompt, loops=loops, max_new_tokens=120, decode="wave", lag=loops - 1, **FREE)
        assert wave.token_ids == plain.token_ids
        assert plain.passes == 119 * loops
        assert plain.drafts is None
        assert wave.drafts.made >= wave.drafts.kept
        assert wave.passes <= plain.passes - wave.drafts.kept + loops


@pytest.mark.parametrize("lag", [1, 2])
def test_a_shorter_lag_gives_what_the_definition_says(model, lag):
    """Replayed over the graphs themselves: every token sees those before it at their loops, and nothing else."""
    prompt, loops = list(range(30, 51)), 4
    result = model.generate(prompt, loops=loops, max_new_tokens=30, decode="wave", lag=lag, **FREE)
    logits = replay(model, prompt, list(result.token_ids), loops, lag, result)
    assert_choices(torch.from_numpy(np.stack(logits)), list(result.token_ids[1:]))


def replay(model: MeltModel, prompt: list[int], tokens: list[int], loops: int, lag: int, result) -> list[np.ndarray]:
    """The final logits of each token of an answer, in waves of all of them with no drafts: starts told by hand.

    The loop at which each token started is not in the result, so that the replay searches it: the earliest that lag
    allows at which the prediction before was the token already, which is when the draft became right.
    """
    sessions, shape = model.new_runner().sessions, model.manifest.model
    runner = model.new_runner()
    runner.prefill(prompt, loops)
    caches = {}
    for layer, (keys, values) in enumerate(runner.state.caches[0]):
        caches[f"past_key.{layer}"], caches[f"past_value.{layer}"] = keys.read(), values.read()
    start, flight, done, finals = len(prompt), [], 0, []
    while len(finals) < len(tokens) - 1:
        if not flight or (flight[-1]["next"] and done + len(flight) < len(tokens) - 1):
            token = tokens[done + len(flight)]
            embedded = sessions.embed.run(None, {"ids": np.array([[token]])})
            flight.append({"hidden": embedded[0], "latent": embedded[1], "loop": 0, "next": False})
        feeds = {"hidden": np.concatenate([row["hidden"] for row in flight], axis=1), **caches}
        for layer in range(shape.layers):
            feeds[f"latent.{layer}"] = np.concatenate([row["latent"][layer] for row in flight], axis=1)
        last = start + done + len(flight) - 1
        feeds["seqlens_k"], feeds["total_sequence_length"] = np.array([last], np.int32), np.array(last + 1, np.int32)
        names = [output.name for output in sessions.loop.get_outputs()]
        out = dict(zip(names, sessions.loop.run(names, feeds), strict=True))
        caches = {name: out[name.replace("past", "present")] for name in caches}
        for place, row in enumerate(flight):
            row["hidden"] = out["hidden_out"][:, place : place + 1]
            row["latent"] = [out[f"latent_out.{layer}"][:, place : place + 1] for layer in range(shape.layers)]
            row["loop"] += 1
            (logits,) = sessions.head.run(None, {"hidden": row["hidden"]})
            row["logits"] = logits[0, 0]
        newest = flight[-1]
        newest["next"] = newest["loop"] >= lag and int(newest["logits"].argmax()) == tokens[done + len(flight)]
        # A token in the middle whose deeper loop changed its mind drops those behind it.
        for place, row in enumerate(flight[:-1]):
            if int(row["logits"].argmax()) != tokens[done + place + 1]:
                del flight[place + 1 :]
                row["next"] = False
                break
        if flight[0]["loop"] == loops:
            finals.append(flight[0]["logits"])
            del flight[0]
            done += 1
    return finals


def test_seeds_give_plain_decodings_tokens_where_the_numbers_are_the_same(model):
    settings = {"loops": 4, "temperature": 1.3, "top_k": 40, "seed": 5, "repetition_penalty": 1.2, "max_new_tokens": 60}
    plain = model.generate([5, 6, 7], **settings, **FREE)
    wave = model.generate([5, 6, 7], **settings, decode="wave", lag=3, **FREE)
    assert wave.token_ids == plain.token_ids


LOOPLMS = {"LoopLM": {}, "grouped heads": {"num_key_value_heads": 1}, "another": {"seed": 5, "num_hidden_layers": 3}}


@pytest.mark.parametrize("lag", [1, 2, 3])
@pytest.mark.parametrize("kind", LOOPLMS)
def test_a_looplms_wave_is_plain_decoding(random_bundle, kind, lag):
    """A cache for each loop: whatever the lag, hundreds of tokens are the same to the last, sampled ones too."""
    model = load(random_bundle, gate_kind="none", **LOOPLMS[kind])
    for settings in ({}, {"temperature": 0.9, "seed": 3, "repetition_penalty": 1.1}):
        for seed in range(2):
            prompt = np.random.default_rng(seed).integers(0, 700, 20).tolist()
            plain = model.generate(prompt, loops=4, max_new_tokens=130, **settings, **FREE)
            wave = model.generate(prompt, loops=4, max_new_tokens=130, decode="wave", lag=lag, **settings, **FREE)
            assert wave.token_ids == plain.token_ids
            assert wave.passes <= plain.passes
            assert wave.drafts.made == wave.drafts.kept + sum(wave.drafts.corrected.values())


AUTO = [{"exit_rule": "settled", "exit_threshold": 0.2}, {"exit_rule": "gate", "exit_threshold": 0.74}]


@pytest.mark.parametrize("rule", AUTO, ids=lambda rule: rule["exit_rule"])
@pytest.mark.parametrize(("gate", "lag"), [("none", 1), ("none", 2), ("none", 3), ("elementwise", 3)])
def test_tokens_leave_a_wave_where_they_leave_in_plain_decoding(random_bundle, gate, lag, rule):
    model = load(random_bundle, gate_kind=gate)
    said = {"loops": "auto", "max_new_tokens": 130, "temperature": 0.9, "seed": 1, **rule, **FREE}
    plain = model.generate([5, 6, 7], **said)
    wave = model.generate([5, 6, 7], decode="wave", lag=lag, **said)
    assert wave.token_ids == plain.token_ids
    assert wave.loops_per_token == plain.loops_per_token
    assert len(plain.depth_histogram) > 1
    assert wave.passes <= plain.passes


@pytest.fixture
def expected_drafts(monkeypatch) -> None:
    """Logits that lean to one token at each position, so that most drafts hold."""
    compute = Executor.compute_logits
    leaning = 20 * np.random.default_rng(5).standard_normal((CAPACITY, 703)).astype(np.float32)

    def lean(self: Executor, spans: list[Span]) -> list[np.ndarray]:
        return [logits + leaning[span.start] for span, logits in zip(spans, compute(self, spans), strict=True)]

    monkeypatch.setattr(Executor, "compute_logits", lean)


@pytest.mark.usefixtures("expected_drafts")
@pytest.mark.parametrize("gate", ["none", "elementwise"])
def test_several_tokens_that_are_final_at_once_are_counted_once(random_bundle, gate):
    """Where the last one leaves the wave empty, it goes on behind all of them."""
    model = load(random_bundle, gate_kind=gate)
    for seed in range(40):
        prompt = np.random.default_rng(seed).integers(0, 703, 9).tolist()
        said = {"loops": "auto", "exit_rule": "gate", "exit_threshold": 0.4 + seed % 4 / 10, "max_loops": 2 + seed % 3}
        plain = model.generate(prompt, max_new_tokens=20, **said, **FREE)
        wave = model.generate(prompt, max_new_tokens=20, decode="wave", lag=1 + seed % 3, **said, **FREE)
        assert wave.token_ids == plain.token_ids
        assert wave.loops_per_token == plain.loops_per_token


def test_overflow_before_the_last_loop_is_no_draft(random_bundle, monkeypatch):
    """Plain decoding never looks there; at the last loop it ends the answer."""
    model = load(random_bundle, gate_kind="none")
    plain = model.generate([5, 6, 7], loops=4, max_new_tokens=12, **FREE)
    compute, bad = Executor.compute_logits, [1, 2, 3]

    def overflow(self: Executor, spans: list[Span]) -> list[np.ndarray]:
        found = compute(self, spans)
        return [np.full(703, np.inf) if s.is_wave and s.loop in bad else f for s, f in zip(spans, found, strict=True)]

    monkeypatch.setattr(Executor, "compute_logits", overflow)
    wave = model.generate([5, 6, 7], loops=4, max_new_tokens=12, decode="wave", **FREE)
    assert (wave.token_ids, wave.drafts.made) == (plain.token_ids, 0)
    bad.append(4)
    with pytest.raises(NumericalError):
        model.generate([5, 6, 7], loops=4, max_new_tokens=12, decode="wave", **FREE)


@pytest.mark.parametrize("lag", [1, 3])
def test_tokens_of_a_short_wave_are_no_prefix_for_others(random_bundle, lag):
    """In chunks of one an answer can be the beginning of another prompt: only where plain decoding gives the same."""
    model = MeltModel.load(random_bundle(), device="cpu", capacity=CAPACITY, chunk=1)
    wave = GenerationConfig(loops=4, max_new_tokens=20, decode="wave", lag=lag, **FREE)
    later = [5, 6, 7, *model.generate([5, 6, 7], wave).token_ids, 9]
    plain = GenerationConfig(loops=4, max_new_tokens=10, **FREE)
    fresh = model.generate(later, plain)
    again = model.generate_batch([[5, 6, 7], later], [wave, plain])[1]
    assert again.cached_tokens == (3 if lag == 1 else 22)
    assert again.token_ids == fresh.token_ids


def test_melts_short_lag_leaves_when_nothing_before_is_open(model):
    """There a token takes loops while one before it does, so that it may take more than the rule asks for."""
    settings = {"loops": "auto", "exit_rule": "settled", "exit_threshold": 0.2, "max_new_tokens": 60}
    wave = model.generate([5, 6, 7], decode="wave", lag=1, **settings, **FREE)
    assert len(wave.token_ids) == len(wave.loops_per_token) == 60
    assert set(wave.loops_per_token) <= {2, 3, 4}
    assert wave.drafts.kept > 0


@pytest.mark.parametrize("gate", ["none", "elementwise"])
def test_waves_and_others_share_a_batch(random_bundle, gate):
    """Each answered as alone, whatever goes on beside it."""
    model = load(random_bundle, gate_kind=gate, slots=3)
    configs = [
        GenerationConfig(loops=4, decode=decode, lag=lag, max_new_tokens=tokens, temperature=0.8, seed=4, **FREE)
        for decode, lag, tokens in (
            ("wave", 1, 20), ("plain", None, 9), ("wave", 3, 30), ("wave", 2, 12), ("plain", None, 40), ("wave", 1, 60),
        )
    ]  # fmt: skip
    configs.append(GenerationConfig(loops="auto", exit_rule="settled", decode="wave", max_new_tokens=30, **FREE))
    prompts = [list(range(start, start + 3 + 7 * (start % 3))) for start in range(20, 27)]
    alone = [model.generate(prompt, config) for prompt, config in zip(prompts, configs, strict=True)]
    together = model.generate_batch(prompts, configs)
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert (ours.drafts, ours.passes) == (theirs.drafts, theirs.passes)


def test_a_waves_draws_have_the_models_distribution(random_bundle):
    """Two tokens by 400 seeds, beside the chances of every pair as the graphs give them: chi-squared of 8 degrees."""
    model, draws = load(random_bundle), 400
    runner = model.new_runner()
    pairs = {}
    for first, chance in likeliest(runner.prefill([5, 6, 7], 4)):
        runner.slots[0].truncate(3)
        pairs |= {(first, second): chance * more for second, more in likeliest(runner.decode([first], 4)[0])}
    settings = {"loops": 4, "decode": "wave", "temperature": 1.0, "top_k": 3, "max_new_tokens": 3}
    seen = Counter(model.generate([5, 6, 7], seed=seed, **settings, **FREE).token_ids[:2] for seed in range(draws))
    assert seen.keys() <= pairs.keys()
    assert sum((seen[pair] - draws * chance) ** 2 / (draws * chance) for pair, chance in pairs.items()) < 40


def likeliest(logits: np.ndarray) -> list[tuple[int, float]]:
    """The three likeliest tokens with their chances among themselves."""
    best = np.argsort(-logits)[:3]
    weights = np.exp(logits[best].astype(float))
    return list(zip(best.tolist(), (weights / weights.sum()).tolist(), strict=True))


@pytest.mark.parametrize("kv_cache", ["int8", "int4"])
@pytest.mark.parametrize("gate", ["elementwise", "none"])
def test_over_quantized_caches(random_bundle, kv_cache, gate):
    bundle = random_bundle(gate_kind=gate)
    model = MeltModel.load(bundle, device="cpu", capacity=CAPACITY, chunk=CHUNK, kv_cache=kv_cache)
    plain = model.generate([5, 6, 7], loops=3, max_new_tokens=60, **FREE)
    wave = model.generate([5, 6, 7], loops=3, max_new_tokens=60, decode="wave", lag=2, **FREE)
    assert wave.token_ids == plain.token_ids


@pytest.mark.parametrize("gate", ["elementwise", "none"])
def test_stop_rules_turns_and_streams_go_on_as_ever(random_bundle, gate):
    model = load(random_bundle, gate_kind=gate)
    wave = {"loops": 4, "decode": "wave", "lag": 3}
    free = model.generate("Who is Ana?", max_new_tokens=30, **wave, **FREE)
    stop = free.text[6:9]
    cut = model.generate("Who is Ana?", max_new_tokens=30, stop=(stop,), **wave, **FREE)
    assert (cut.text, cut.finish_reason) == (free.text[: free.text.index(stop)], "stop")
    sessions = model.new_session(), model.new_session()
    for prompt in ("Who is Ana?", "And Ben?", [7, 8, 9]):
        results = [
            session.generate(prompt, max_new_tokens=9, raw=isinstance(prompt, str), **more, **FREE)
            for session, more in zip(sessions, (wave, {"loops": 4}), strict=True)
        ]
        assert results[0].token_ids == results[1].token_ids
        assert results[0].cached_tokens == results[1].cached_tokens
    session = sessions[0]
    stream = session.stream([3, 4], max_new_tokens=20, **wave, **FREE)
    next(stream)
    stream.close()
    assert session.generate([5], max_new_tokens=3, **wave, **FREE).token_ids
    full = model.generate([3] * 100, **wave, **FREE)
    assert len(full.token_ids) == CAPACITY - 100 + 1
    assert full.token_ids == model.generate([3] * 100, loops=4, **FREE).token_ids


def test_melt_tiny_answers_as_in_plain_decoding_in_fewer_passes(tiny_bundle):
    model = MeltModel.load(tiny_bundle, device="cpu", capacity=200)
    facts = "Ana reports to Ben. Cleo reports to Ana. Ben works for Dan. Dan reports to Finn. "
    for question in (
        "Who is one level above Cleo?",
        "Who is two levels above Cleo?",
        "Who is three levels above Cleo?",
    ):
        plain = model.generate(facts + question, loops=4)
        wave = model.generate(facts + question, loops=4, decode="wave")
        assert wave.text == plain.text
        assert wave.passes < plain.passes


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"decode": "waves"}, "decode must be one of plain, wave, got 'waves'"),
        ({"lag": 1}, "lag must go with decode='wave', got lag=1"),
        ({"decode": "wave", "lag": 0}, "lag must be at least 1, got 0"),
        ({"decode": "wave", "lag": 4}, r"lag must be below the loops \(4\), got 4"),
        ({"decode": "wave", "loops": 1}, "decode must be 'plain' with one loop, got 'wave': a wave needs two loops"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(model, said, message):
    with pytest.raises(ValueError, match=message):
        model.generate([1, 2], **said)


def test_where_a_wave_cannot_be_the_reason_is_said(random_bundle):
    reason = "is told one loop for all tokens of a pass"
    with pytest.raises(ValueError, match=f"decode must be 'plain' here, got 'wave': .*{reason}"):
        load(random_bundle, gate_kind="mean").generate([1, 2], GenerationConfig(decode="wave"))
    model = MeltModel.load(random_bundle(), device="cpu", capacity=20, chunk=2)
    with pytest.raises(CapacityError):
        model.generate([1] * 30, decode="wave")
