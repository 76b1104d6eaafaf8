"""What a caller asks of each choice holds alone, in batches and in waves: penalties, bias, processors, logprobs."""

import numpy as np
import pytest
from tolerances import PARITY, assert_close

from melt_runtime import BatchError, GenerationConfig, MeltModel

PROMPTS = [[(7 * place + start) % 650 for place in range(9 + start)] for start in range(4)]
WAYS = {"plain": {}, "wave": {"decode": "wave", "lag": 3}}
"""At the longest lag a wave's numbers are plain decoding's."""


def shift(ids, logits):
    """Moves every logit by what stands in the answer, and forbids one token."""
    logits = np.roll(logits, sum(ids) % 7)
    logits[(len(ids) * 31) % len(logits)] = -np.inf
    return logits


SETTINGS = {
    "penalties": {"presence_penalty": 1.5, "frequency_penalty": 0.5},
    "bias": {"logit_bias": {5: 3.0, 600: -100.0}},
    "processors": {"logits_processors": [shift]},
    "sampled": {"temperature": 1.0, "seed": 3, "frequency_penalty": 1.0, "logits_processors": [shift]},
}


@pytest.fixture(scope="module")
def model(random_bundle):
    return MeltModel.load(random_bundle("float32"), device="cpu", capacity=64, slots=4)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_choice_is_the_same_alone_in_a_batch_and_in_a_wave(model, name):
    said = {"max_new_tokens": 10, "logprobs": 3, **SETTINGS[name]}
    alone = [model.generate(prompt, **said) for prompt in PROMPTS]
    unchanged = [model.generate(prompt, max_new_tokens=10, temperature=0.0) for prompt in PROMPTS]
    assert [one.token_ids for one in alone] != [one.token_ids for one in unchanged]
    for way in WAYS.values():
        found = model.generate_batch(PROMPTS, **said, **way)
        assert [one.token_ids for one in found] == [one.token_ids for one in alone]
        for one, other in zip(found, alone, strict=True):
            assert [token.token_id for token in one.logprobs] == list(one.token_ids)
            for mine, theirs in zip(one.logprobs, other.logprobs, strict=True):
                assert [token for token, _ in mine.top] == [token for token, _ in theirs.top]
                assert_close(
                    np.array([mine.logprob, *dict(mine.top).values()]),
                    np.array([theirs.logprob, *dict(theirs.top).values()]),
                    PARITY["float32"],
                )


def test_the_likeliest_token_is_the_greedy_one(model):
    result = model.generate(PROMPTS[0], max_new_tokens=6, logprobs=1)
    assert [token.top[0][0] for token in result.logprobs] == list(result.token_ids)
    assert all(token.logprob == token.top[0][1] < 0 for token in result.logprobs)
    assert model.generate(PROMPTS[0], max_new_tokens=2, logprobs=0).logprobs[0].top == ()
    assert model.generate(PROMPTS[0], max_new_tokens=2).logprobs is None


@pytest.mark.parametrize("way", WAYS)
def test_a_processor_that_fails_ends_its_own_request_alone(model, way):
    def fails(ids, logits):
        if len(ids) == 3:
            raise ZeroDivisionError("of the caller's own")
        return logits

    said = [{"logits_processors": [fails]} if number == 1 else {} for number in range(4)]
    configs = [GenerationConfig(max_new_tokens=8, **one) for one in said]
    with pytest.raises(BatchError) as raised:
        model.generate_batch(PROMPTS, configs, **WAYS[way])
    assert list(raised.value.errors) == [1]
    assert isinstance(raised.value.errors[1], ZeroDivisionError)
    expected = model.generate_batch([*PROMPTS[:1], *PROMPTS[2:]], max_new_tokens=8)
    assert [raised.value.results[number].token_ids for number in (0, 2, 3)] == [one.token_ids for one in expected]
    with pytest.raises(ZeroDivisionError):
        model.generate(PROMPTS[0], configs[1])
    assert len(model.generate(PROMPTS[0], max_new_tokens=4).token_ids) == 4


def test_bias_outside_the_vocabulary_is_refused(model):
    with pytest.raises(ValueError, match="logit_bias must be below the vocabulary's 703, got \\[703\\]"):
        model.generate(PROMPTS[0], logit_bias={703: 1.0})
