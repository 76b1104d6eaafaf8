"""Wave decoding: tokens start from drafts while those before them still take their loops."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_choices

from melt_runtime import CapacityError, GenerationConfig, MeltModel
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


def simulate(loops: int, lag: int, settles: list[int], most: int = 8) -> tuple[Wave, int, list[int]]:
    """A sequence whose token at each place predicts the next one rightly from a given loop on; passes and tokens."""
    wave, passes, out = Wave(0, loops, lag, most), 0, [100]
    wave.start(0, 100)

    def predict(place: int, path: list[int]) -> int:
        span = wave.spans[place]
        right = span.ids[0] == 100 + span.start and all(token == 100 + n for n, token in enumerate(path, out[-1] - 99))
        return 101 + span.start if right and span.loop >= settles[span.start] else -span.loop

    while len(out) < len(settles):
        passes += 1
        assert [span.start for span in wave.spans] == list(range(len(out) - 1, len(out) - 1 + len(wave.spans)))
        assert all(older.loop >= newer.loop + lag for older, newer in zip(wave.spans, wave.spans[1:], strict=False))
        for span in wave.spans:
            span.loop += 1
        token = wave.advance(predict, len(settles) - len(out) - 1)
        if token is not None:
            out.append(token)
            if not wave.spans and len(out) < len(settles):
                wave.start(len(out) - 1, token)
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


@pytest.mark.parametrize("kv_cache", ["int8", "int4"])
def test_over_quantized_caches(random_bundle, kv_cache):
    model = MeltModel.load(random_bundle(), device="cpu", capacity=CAPACITY, chunk=CHUNK, kv_cache=kv_cache)
    plain = model.generate([5, 6, 7], loops=3, max_new_tokens=60, **FREE)
    wave = model.generate([5, 6, 7], loops=3, max_new_tokens=60, decode="wave", lag=2, **FREE)
    assert wave.token_ids == plain.token_ids


def test_stop_rules_turns_and_streams_go_on_as_ever(model):
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
        ({"decode": "wave", "loops": "auto"}, "decode must be 'plain' with loops='auto', got 'wave'"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(model, said, message):
    with pytest.raises(ValueError, match=message):
        model.generate([1, 2], **said)


def test_where_a_wave_cannot_be_the_reason_is_said(random_bundle):
    for changes, reason in (
        ({"gate_kind": "none"}, "this model has a KV cache for each loop"),
        ({"gate_kind": "mean"}, "is told one loop for all tokens of a pass"),
        ({"slots": 2}, "it serves one sequence at a time: load with slots=1"),
    ):
        with pytest.raises(ValueError, match=f"decode must be 'plain' here, got 'wave': .*{reason}"):
            load(random_bundle, **changes).generate([1, 2], decode="wave")
    model = MeltModel.load(random_bundle(), device="cpu", capacity=20, chunk=2)
    with pytest.raises(ValueError, match="needs a state of chunks of at least 4 tokens"):
        model.generate([1, 2], GenerationConfig(decode="wave"))
    with pytest.raises(CapacityError):
        model.generate([1] * 30, decode="wave")
