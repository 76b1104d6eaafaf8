"""L0: the sampler's filters, one by one and against their plain definitions, and its draws."""

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tolerances import DRAWS, SHARPENED, TORCH, assert_close

from melt_runtime.errors import NumericalError
from melt_runtime.request.generation_config import GenerationConfig
from melt_runtime.request.logprobs import TokenLogprob
from melt_runtime.request.sampler import Sampler, candidates, penalize
from melt_runtime.request.settings import GenerationSettings, settle

LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.3], dtype=np.float32))


def settings(**said) -> GenerationSettings:
    return settle(GenerationConfig(**said), GenerationConfig(), trained_loops=4, room=100)


def kept(**said) -> list[int]:
    return candidates(LOGITS, settings(temperature=1.0, **said))[0].tolist()


def test_greedy_takes_the_largest_logit():
    assert Sampler(settings()).choose(LOGITS, [], 0) == 1


def test_no_filter_keeps_the_distribution():
    tokens, probabilities = candidates(LOGITS, settings(temperature=1.0))
    assert tokens.tolist() == [0, 1, 2, 3]
    assert_close(probabilities, [0.1, 0.4, 0.2, 0.3], SHARPENED)


def test_temperature_sharpens_as_powers():
    _, probabilities = candidates(LOGITS, settings(temperature=0.5))
    expected = np.array([0.1, 0.4, 0.2, 0.3]) ** 2
    assert_close(probabilities, expected / expected.sum(), SHARPENED)


def test_filters_keep_what_they_say():
    assert kept(top_k=2) == [1, 3]
    assert kept(top_k=100) == [0, 1, 2, 3]
    assert kept(top_p=0.4) == [1]
    assert kept(top_p=0.41) == [1, 3]
    assert kept(min_p=0.49) == [1, 2, 3]
    assert kept(top_k=3, top_p=0.9, min_p=0.7) == [1, 3]


def test_repetition_penalty_lowers_seen_tokens_of_either_sign():
    logits = np.array([2.0, -2.0, 1.0], dtype=np.float32)
    np.testing.assert_array_equal(penalize(logits, [0, 1, 1], 2.0), [1.0, -4.0, 1.0])
    np.testing.assert_array_equal(logits, [2.0, -2.0, 1.0])
    assert Sampler(settings(repetition_penalty=4.0)).choose(logits, [0], 0) == 2


def test_a_penalty_never_makes_infinity():
    logits = np.array([3e38, -3e38, 1.0], dtype=np.float32)
    for penalty, expected in ((0.01, 0), (100.0, 0)):
        for temperature in (0.0, 1.0):
            sampler = Sampler(settings(repetition_penalty=penalty, temperature=temperature, seed=0))
            assert sampler.choose(logits, [0, 1], 0) == expected
    assert np.isfinite(penalize(logits, [0, 1], 0.01)).all()


def test_seed_repeats_and_frequencies_follow_probabilities():
    config = settings(temperature=1.0, seed=3)
    first, second = Sampler(config), Sampler(config)
    draws = [first.choose(LOGITS, [], place) for place in range(4000)]
    assert draws == [second.choose(LOGITS, [], place) for place in range(4000)]
    assert np.abs(np.bincount(draws) / 4000 - [0.1, 0.4, 0.2, 0.3]).max() < DRAWS


@pytest.mark.parametrize("logits", [[0.0, math.nan], [0.0, math.inf], [-math.inf, -math.inf]], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_say_nothing_are_refused(logits, temperature):
    with pytest.raises(NumericalError, match="the model gave logits of (nan|-?inf): export it again"):
        Sampler(settings(temperature=temperature)).choose(np.array(logits, dtype=np.float32), [], 0)


def test_minus_infinity_bars_a_token():
    sampler = Sampler(settings(temperature=1.0, seed=0))
    logits = np.array([-math.inf, 0.0, -math.inf, 0.0], dtype=np.float32)
    assert {sampler.choose(logits, [], place) for place in range(50)} == {1, 3}


def plain(logits: np.ndarray, config: GenerationSettings) -> tuple[np.ndarray, np.ndarray]:
    """The definition: rank all tokens, equal ones by id; keep k; keep those before whom less than p stands; min-p."""
    scores = (logits.astype(np.float64) - logits.max()) / config.temperature
    order = np.argsort(-scores, kind="stable")
    chosen = np.sort(order[: config.top_k or len(order)])
    total = np.exp(scores[chosen]).sum()
    ranked = order[: len(chosen)]
    probabilities = np.exp(scores[ranked]) / total
    if config.top_p < 1:
        ranked = ranked[np.cumsum(probabilities) - probabilities < config.top_p]
    tokens = np.sort(ranked)
    probabilities = np.exp(scores[tokens]) / total
    tokens = tokens[probabilities >= config.min_p * probabilities.max()]
    probabilities = np.exp(scores[tokens])
    return tokens, probabilities / probabilities.sum()


@given(
    logits=st.lists(st.one_of(st.floats(-50, 50, width=32), st.sampled_from([0.0, 1.0, 2.0])), min_size=1, max_size=60),
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, 70),
    top_p=st.one_of(st.floats(0.01, 1), st.sampled_from([0.25, 0.5, 0.75, 1.0])),
    min_p=st.one_of(st.just(0.0), st.floats(0, 1)),
)
def test_filters_keep_what_the_plain_definition_keeps(logits, temperature, top_k, top_p, min_p):
    config = settings(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    array = np.array(logits, dtype=np.float32)
    tokens, probabilities = candidates(array, config)
    expected, wanted = plain(array, config)
    assert tokens.tolist() == expected.tolist()
    assert_close(probabilities, wanted, SHARPENED)
    assert array.argmax() in tokens


@pytest.mark.parametrize(
    "said",
    [{}, {"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.02}, {"top_k": 200, "top_p": 0.7}],
    ids=str,
)
def test_draws_follow_the_exact_probabilities(said):
    """Chi-square over 20,000 draws from a large vocabulary, rare tokens put together; seeded, so it never varies."""
    logits = np.random.default_rng(5).normal(0, 2.5, 5000).astype(np.float32)
    config, draws = settings(temperature=0.8, seed=11, **said), 20_000
    tokens, probabilities = plain(logits, config)
    sampler = Sampler(config)
    found = np.bincount([sampler.choose(logits, [], place) for place in range(draws)], minlength=5000)
    assert found[np.setdiff1d(np.arange(5000), tokens)].sum() == 0
    expected = draws * probabilities
    common = expected >= 20
    pairs = [(found[tokens][common], expected[common])]
    if not common.all():
        pairs.append((np.array([found[tokens][~common].sum()]), np.array([expected[~common].sum()])))
    statistic = sum(float(((seen - wanted) ** 2 / wanted).sum()) for seen, wanted in pairs)
    degrees = int(common.sum()) + (not common.all()) - 1
    assert abs(statistic - degrees) < 4 * math.sqrt(2 * degrees)  # its mean and standard deviation


def test_presence_and_frequency_look_at_the_answer_alone():
    logits = np.array([5.0, 4.8, 4.0], dtype=np.float32)
    sampler = Sampler(settings(presence_penalty=0.5), prompt_tokens=2)
    assert sampler.choose(logits, [0, 0], 0) == 0  # the prompt
    assert sampler.choose(logits, [0, 0, 0], 1) == 1
    often = Sampler(settings(frequency_penalty=0.1))
    assert often.choose(logits, [0], 1) == 0
    assert often.choose(logits, [0, 0, 0], 3) == 1
    wanted = Sampler(settings(presence_penalty=-1.5))
    assert wanted.choose(logits, [2], 1) == 2


def test_bias_moves_single_tokens():
    logits = np.array([5.0, 4.8, 4.0], dtype=np.float32)
    assert Sampler(settings(logit_bias={0: -1.0, 2: 2.0})).choose(logits, [], 0) == 2
    assert logits[2] == 4
    said = GenerationConfig(logit_bias={7: 1, np.int64(3): -100.0})
    assert list(said.logit_bias.items()) == [(3, -100.0), (7, 1.0)]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"presence_penalty": 2.5}, "presence_penalty must be in [-2, 2], got 2.5"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty must be in [-2, 2], got nan"),
        ({"logit_bias": [1, 2]}, "logit_bias must be a mapping from token ids to numbers in [-100, 100], got [1, 2]"),
        ({"logit_bias": {"a": 1}}, "logit_bias's token id must be a whole number, got 'a'"),
        ({"logit_bias": {1: 101}}, "logit_bias[1] must be in [-100, 100], got 101"),
        ({"logits_processors": [3]}, "logits_processors must be a sequence of callables, got 3 in it"),
        ({"logprobs": 65}, "logprobs must be at most 64, got 65"),
    ],
)
def test_what_no_choice_can_be_made_by_is_refused(said, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        GenerationConfig(**said)


def test_processors_run_in_their_order_on_copies():
    seen = []

    def forbid(ids, logits):
        seen.append(list(ids))
        logits[int(logits.argmax())] = -np.inf
        return logits

    sampler = Sampler(settings(logits_processors=(forbid, forbid)), prompt_tokens=1)
    assert sampler.choose(LOGITS, [9, 8], 1) == int(np.argsort(-LOGITS)[2])
    assert seen == [[8], [8]]
    assert np.isfinite(LOGITS).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "must give float logits [4], got None"),
        (np.zeros(3, dtype=np.float32), "must give float logits [4]"),
        (np.zeros(4, dtype=np.int64), "must give float logits [4]"),
        (np.full(4, -np.inf), "must leave a token that may be chosen, the largest logit is -inf"),
        (np.array([0, np.nan, 0, 0]), "must leave a token that may be chosen, the largest logit is nan"),
    ],
)
def test_what_a_processor_may_not_give(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Sampler(settings(logits_processors=(lambda ids, logits: given,))).choose(LOGITS[:4], [], 0)


@given(hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-50, 50, width=32)), st.integers(0, 10), st.data())
def test_logprobs_are_those_of_the_softmax(logits, count, data):
    token = data.draw(st.integers(0, len(logits) - 1))
    found = TokenLogprob.of(logits, token, count)
    exact = logits.astype(np.float64) - np.logaddexp.reduce(logits.astype(np.float64))
    assert_close(np.array([found.logprob]), exact[[token]], TORCH)
    ranked = sorted(range(len(logits)), key=lambda place: (-logits[place], place))[:count]
    assert [token for token, _ in found.top] == ranked
    assert_close(np.array([0.0, *(value for _, value in found.top)]), np.array([0.0, *exact[ranked]]), TORCH)
