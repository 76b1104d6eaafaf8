"""L0: what may be said of an answer, what holds in the end, and the file that says it."""

import json
import math

import numpy as np
import pytest

from melt_runtime import BundleError, GenerationConfig
from melt_runtime.arguments import shown
from melt_runtime.request.generation_files import read_generation_config, write_generation_config
from melt_runtime.request.settings import describe_defaults, settle


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("max_new_tokens", 0, "at least 1"),
        ("max_new_tokens", 2.5, "a whole number"),
        ("max_new_tokens", True, "a whole number"),
        ("max_new_tokens", 2**31, "at most 2147483647"),
        ("max_new_tokens", 10**5000, "at most 2147483647"),
        ("loops", 0, "at least 1"),
        ("loops", 1.5, "a whole number"),
        ("loops", 2**31, "at most 1024"),
        ("temperature", -0.1, r"0 \(greedy\) or in \[1e-6, 1e6\]"),
        ("temperature", 1e-9, "0 .*or in"),
        ("temperature", math.nan, "0 .*or in"),
        ("temperature", math.inf, "0 .*or in"),
        ("temperature", 10**400, "0 .*or in"),
        ("temperature", "0.5", "a number"),
        ("temperature", True, "a number"),
        ("top_k", -1, "at least 0"),
        ("top_k", 5.0, "a whole number"),
        ("top_p", 0.0, r"in \(0, 1\]"),
        ("top_p", 1.4, r"in \(0, 1\]"),
        ("min_p", 1.1, r"in \[0, 1\]"),
        ("repetition_penalty", 0.0, r"in \[0.01, 100\]"),
        ("repetition_penalty", 1e-38, r"in \[0.01, 100\]"),
        ("seed", -1, "at least 0"),
        ("seed", 2**64, "at most 18446744073709551615"),
        ("stop", "word", "a sequence of non-empty strings"),
        ("stop", ("",), "non-empty"),
        ("stop", (b"x",), "non-empty strings"),
        ("stop", 5, "a sequence"),
        ("stop", ("x", "y" * 1025), "at most 1024 characters"),
        ("stop_ids", "ab", "a sequence of token ids"),
        ("stop_ids", b"ab", "a sequence of token ids"),
        ("stop_ids", np.array(3), "a sequence of token ids"),
    ],
    ids=lambda value: shown(value)[:20],
)
def test_values_out_of_range_name_field_rule_and_value(field, value, rule):
    with pytest.raises(ValueError, match=f"^{field} must be .*{rule}.*got"):
        GenerationConfig(**{field: value})


@pytest.mark.parametrize(("token", "rule"), [(-1, "at least 0"), (True, "a whole number"), (1.0, "a whole number")])
def test_a_stop_token_is_named_by_its_place(token, rule):
    with pytest.raises(ValueError, match=rf"stop_ids\[1\] must be {rule}, got"):
        GenerationConfig(stop_ids=(3, token))


def test_all_faults_are_reported_at_once():
    with pytest.raises(ValueError, match=r"top_p.*min_p"):
        GenerationConfig(top_p=2, min_p=2)


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match=r"unknown generation options \['top_q'\]"):
        GenerationConfig().with_changes(top_q=1)


def test_what_can_be_iterated_once_is_kept():
    config = GenerationConfig(stop=(word for word in ["a", "b"]), stop_ids=iter([np.int64(3), 4]))
    assert (config.stop, config.stop_ids) == (("a", "b"), (3, 4))
    endless = iter(int, 1)
    with pytest.raises(ValueError, match="stop_ids must hold at most 65536 elements"):
        GenerationConfig(stop_ids=endless)


def test_numbers_of_numpy_become_pythons():
    config = GenerationConfig(loops=np.int32(2), temperature=np.float32(0.5), top_k=np.int64(3))
    assert [type(value) for value in (config.loops, config.temperature, config.top_k)] == [int, float, int]


def test_the_caller_stands_over_the_bundle_and_the_bundle_over_the_project():
    bundle = GenerationConfig(temperature=0.7, top_k=50, stop_ids=(3, 7), max_new_tokens=90)
    said = GenerationConfig(top_k=0, seed=1)
    settings = settle(said, bundle, trained_loops=4, room=60)
    assert (settings.temperature, settings.top_k, settings.top_p, settings.seed) == (0.7, 0, 1.0, 1)
    assert (settings.stop_ids, settings.stop, settings.loops) == ((3, 7), (), 4)
    assert settings.max_new_tokens == 60  # a bundle's number never exceeds what fits
    assert settle(said, bundle, 4, room=200).max_new_tokens == 90
    assert settle(GenerationConfig(max_new_tokens=500), bundle, 4, room=60).max_new_tokens == 500
    assert settle(GenerationConfig(stop_ids=()), bundle, 4, room=60).stop_ids == ()
    assert said.with_changes(top_k=None, seed=2) == GenerationConfig(top_k=0, seed=2)


def test_defaults_are_described_with_whose_word_they_are():
    described = describe_defaults(GenerationConfig(stop_ids=(3,), top_p=0.9), trained_loops=4)
    assert described["stop_ids"] == "(3,) (the bundle's)"
    assert described["top_p"] == "0.9 (the bundle's)"
    assert described["loops"] == "4, as trained"
    assert described["max_new_tokens"] == "what is left of the capacity"
    assert described["temperature"] == "0.0"


def test_a_file_says_what_was_said(tmp_path):
    config = GenerationConfig(stop_ids=(3,), temperature=0.5, stop=("x",))
    write_generation_config(tmp_path / "g.json", config)
    assert json.loads((tmp_path / "g.json").read_text()) == {"temperature": 0.5, "stop": ["x"], "stop_ids": [3]}
    assert read_generation_config(tmp_path / "g.json", vocab_size=4) == config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", r"must hold a JSON object, got \[\]"),
        (b"{", "cannot be read as JSON"),
        (b'{"stop": ["\xff"]}', "cannot be read as JSON.*utf-8"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b'{"top_k": ' + b"9" * 5000 + b"}", "cannot be read as JSON"),
        (b'{"top_q": 1}', "'top_q' is unknown"),
        (b'{"loops": "4", "top_p": 2, "x": 1}', r"'x' is unknown; loops must be a whole number.*; top_p must be in"),
        (b'{"stop_ids": 3}', "stop_ids must be a sequence of token ids, got 3"),
        (b'{"stop_ids": [1.0]}', r"stop_ids\[0\] must be a whole number, got 1.0"),
        (b'{"stop_ids": [4]}', r"stop_ids must be below the vocabulary's 4, got \(4,\)"),
        (
            b'{"logit_bias": {"3": 1, "4": -2.5, "900": 1}}',
            r"logit_bias must be below the vocabulary's 4, got \(4, 900\)",
        ),
        (b'{"stop": "word"}', "stop must be a sequence of non-empty strings"),
        (b'{"temperature": NaN}', "temperature must be 0"),
        (b'{"temperature": true}', "temperature must be a number"),
    ],
    ids=lambda value: str(value[:20]),
)
def test_a_bad_file_lists_its_faults(tmp_path, content, message):
    path = tmp_path / "generation_config.json"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=f"^generation_config.json.*{message}"):
        read_generation_config(path, vocab_size=4)
