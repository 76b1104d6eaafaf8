"""Conversations told apart, and the replica that each prefers: without a cluster."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
from pydantic import ValidationError

from melt_ray.arguments import ServeArgs
from melt_ray.keys import PREFIX_CHARACTERS, conversation_key
from melt_ray.router import rank

SYSTEM = {"role": "system", "content": "Answer with a name."}
FIRST = {"role": "user", "content": "Ana reports to Ben. Who is one level above Ana?"}
MORE = [{"role": "assistant", "content": "Ben."}, {"role": "user", "content": "And above Ben?"}]


def key(body, path="/v1/chat/completions", headers=()):
    return conversation_key(path, headers, json.dumps(body).encode())


def test_turns_of_a_conversation_have_one_key():
    first = key({"messages": [SYSTEM, FIRST]})
    assert first
    assert key({"messages": [SYSTEM, FIRST, *MORE], "loops": 2, "stream": True}) == first
    assert key({"name": "kept", "messages": [SYSTEM, FIRST, *MORE]}, "/v1/sessions") == first
    assert key({"messages": [SYSTEM, FIRST]}, "/v1/sessions/kept/restore") == first
    parts = [{"type": "text", "text": FIRST["content"][:9]}, {"type": "text", "text": FIRST["content"][9:]}]
    assert key({"messages": [SYSTEM, {"role": "user", "content": parts}]}) == first
    assert key({"messages": [FIRST]}) != first
    assert key({"messages": [SYSTEM, MORE[1]]}) != first


def test_a_client_may_name_its_conversation():
    named = [(b"x-session-id", b"mine")]
    assert key({"messages": [FIRST]}, headers=named) == key({"prompt": "other"}, "/v1/completions", named)
    assert key({}, "/v1/sessions/mine/restore") == key({"messages": [FIRST]}, headers=named)


def test_prompts_that_begin_alike_have_one_key():
    text = "x" * PREFIX_CHARACTERS
    same = {key({"prompt": prompt}, "/v1/completions") for prompt in (text, text + "y", [text, "z"])}
    assert len(same) == 1
    tokens = list(range(50))
    assert key({"prompt": tokens}, "/v1/completions") == key({"prompt": [[*tokens, 1], [2]]}, "/v1/completions")
    assert key({"prompt": [1]}, "/v1/completions") != key({"prompt": ["1"]}, "/v1/completions")


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"1", b'{"messages": []}', b'{"messages": 3}', b'{"prompt": ""}', b'{"prompt": []}', b"\xff"],
)
def test_what_has_no_conversation_has_no_key(body):
    assert conversation_key("/v1/chat/completions", (), body) == ""
    assert conversation_key("/health", (), b'{"messages": [{"role": "user", "content": "x"}]}') == ""


def test_odd_messages_have_a_key_and_no_error():
    for messages in ([3], [{"role": 3, "content": [1, {"text": 5}]}], [{}], [{"role": "user", "content": "\ud800"}]):
        assert key({"messages": messages})


def test_a_conversation_prefers_the_same_replica_until_that_goes():
    names = [f"replica{number}" for number in range(5)]
    keys = [f"key{number}" for number in range(500)]

    def preferred(names):
        return {one: names[rank(one, names, [0] * len(names), 4)[0][0]] for one in keys}

    before, after = preferred(names), preferred(names[::-1][:-1])  # another order, and one fewer
    moved = [one for one in keys if before[one] != after[one]]
    assert all(before[one] == names[0] for one in moved)
    assert all(before[one] != names[0] or one in moved for one in keys)
    assert min(Counter(before.values()).values()) > 50


def test_a_replica_that_is_far_busier_is_passed_over():
    names = ["a", "b", "c"]
    (place,), others = rank("key", names, [0, 0, 0], 4)
    loads = [4 if number == place else 0 for number in range(3)]
    assert rank("key", names, loads, 4) == [[place], others]
    loads[place] = 5
    assert rank("key", names, loads, 4) == [others, [place]]
    assert rank("key", names, [5, 5, 5], 4) == [[place], others]
    assert rank("key", ["a"], [100], 4) == [[0], []]
    assert rank("key", [], [], 4) == []


def test_without_a_key_two_are_tried_first():
    seen = Counter()
    for _ in range(200):
        two, others = rank("", ["a", "b", "c"], [0, 0, 0], 4)
        assert sorted([*two, *others]) == [0, 1, 2]
        assert len(two) == 2
        seen.update(two)
    assert set(seen) == {0, 1, 2}


def test_arguments_are_refused_by_name():
    for values, message in (
        ({"bundle": "b"}, "api_key_file must be given, or no_key: true"),
        ({"bundle": "b", "no_key": True, "api_key_file": "k"}, "one of the two"),
        ({"bundle": "b", "no_key": True, "min_replicas": 3}, "max_replicas must be at least min_replicas"),
        ({"bundle": "b", "no_key": True, "slot": 3}, "slot"),
        ({"bundle": "b", "no_key": True, "fingerprint": "abc"}, "fingerprint"),
    ):
        with pytest.raises(ValidationError, match=message):
            ServeArgs(**values)


def test_serving_needs_no_ray_data():
    code = "import sys, melt_ray.serve; print('ray.data' in sys.modules)"
    run = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(run, capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() == "False"
