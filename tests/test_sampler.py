"""L0: the sampler's filters, one by one, and its rules."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tolerances import DRAWS, SHARPENED, assert_close

from melt_runtime.errors import NumericalError
from melt_runtime.generation_config import GenerationConfig
from melt_runtime.sampler import Sampler, filtered_probabilities, penalize

LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.3], dtype=np.float32))


def kept(**options) -> list[int]:
    return np.flatnonzero(filtered_probabilities(LOGITS, GenerationConfig(temperature=1.0, **options))).tolist()


def test_greedy_takes_the_largest_logit():
    assert Sampler(GenerationConfig()).choose(LOGITS, []) == 1


def test_no_filter_keeps_the_distribution():
    probabilities = filtered_probabilities(LOGITS, GenerationConfig(temperature=1.0))
    assert_close(probabilities, [0.1, 0.4, 0.2, 0.3], SHARPENED)


def test_temperature_sharpens_as_powers():
    probabilities = filtered_probabilities(LOGITS, GenerationConfig(temperature=0.5))
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
    assert Sampler(GenerationConfig(repetition_penalty=4.0)).choose(logits, [0]) == 2


def test_seed_repeats_and_frequencies_follow_probabilities():
    config = GenerationConfig(temperature=1.0, seed=3)
    first, second = Sampler(config), Sampler(config)
    draws = [first.choose(LOGITS, []) for _ in range(4000)]
    assert draws == [second.choose(LOGITS, []) for _ in range(4000)]
    assert np.abs(np.bincount(draws) / 4000 - [0.1, 0.4, 0.2, 0.3]).max() < DRAWS


def test_nan_logits_are_refused():
    with pytest.raises(NumericalError, match="NaN"):
        Sampler(GenerationConfig()).choose(np.array([0.0, math.nan]), [])


@given(
    logits=st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=40),
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, 50),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
)
def test_filters_always_leave_a_distribution_with_the_best_token(logits, temperature, top_k, top_p, min_p):
    config = GenerationConfig(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    array = np.array(logits, dtype=np.float32)
    probabilities = filtered_probabilities(array, config)
    assert_close(probabilities.sum(), 1, SHARPENED)
    assert probabilities[array.argmax()] == probabilities.max() > 0


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("max_new_tokens", 0, "at least 1"),
        ("loops", 0, "at least 1"),
        ("temperature", -0.1, "at least 0"),
        ("temperature", math.nan, "at least 0"),
        ("temperature", math.inf, "finite"),
        ("top_k", -1, "at least 0"),
        ("top_p", 0.0, r"in \(0, 1\]"),
        ("top_p", 1.4, r"in \(0, 1\]"),
        ("min_p", 1.1, r"in \[0, 1\]"),
        ("repetition_penalty", 0.0, "above 0"),
        ("seed", -1, "at least 0"),
        ("stop", "word", "sequence"),
        ("stop", ("",), "non-empty"),
        ("stop_ids", (-1,), "at least 0"),
    ],
)
def test_values_out_of_range_name_field_rule_and_value(field, value, rule):
    with pytest.raises(ValueError, match=f"{field} must be .*{rule}.*got"):
        GenerationConfig(**{field: value})


def test_all_faults_are_reported_at_once():
    with pytest.raises(ValueError, match=r"top_p.*min_p"):
        GenerationConfig(top_p=2, min_p=2)


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match=r"unknown generation options \['top_q'\]"):
        GenerationConfig().with_changes(top_q=1)
