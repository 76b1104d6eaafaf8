"""The server by the official client and by plain requests: answers, streams, limits, errors, keys."""

import contextlib
import http.client
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from serving import served

from melt_runtime import MeltModel
from melt_runtime.cli.main import main
from melt_runtime.cli.serve import _names
from melt_runtime.request.grammar import GrammarError, Grammars
from melt_runtime.serve.forms import ChatRequest, CompletionRequest, DetokenizeRequest
from melt_runtime.serve.tools import CallReader

QUESTION = "Ana reports to Ben. Ben works for Cleo. Cleo reports to Dan. Who is two levels above Ana?"
CHAT = [{"role": "user", "content": QUESTION}]
CHATS = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
LONG = {"prompt": [5, 6, 7], "max_tokens": 400, "logit_bias": {"3": -100}}
"""An answer that does not end by itself."""


@pytest.fixture(scope="module")
def model(tiny_bundle):
    return MeltModel.load(tiny_bundle, device="cpu", capacity=512, slots=4)


@pytest.fixture(scope="module")
def lone(model):
    """Answers one at a time, before the server holds the model's session."""

    def answer(prompt, **said):
        return MeltModel.generate(model, prompt, **said)

    return {loops: answer(CHAT, loops=loops, temperature=0.0) for loops in (1, 2, 4)}


@pytest.fixture(scope="module")
def address(model, lone):
    with served(model, queue=64, most_bytes=200_000) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(address, path, body=None, headers=None, method=None):
    """Status, headers and parsed body of a plain request."""
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    headers = {**JSON, **(headers or {})}
    request = urllib.request.Request(f"{address}{path}", data, headers, method=method)
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, response.headers, json.loads(response.read() or b"null")
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, json.loads(error.read() or b"null")


def wait_until(holds):
    while not holds():
        time.sleep(0.005)


def running(address):
    return ask(address, "/health")[2]["running"]


@pytest.mark.parametrize("loops", [1, 2, 4])
def test_a_chat_by_the_official_client(client, lone, loops):
    answer = client.chat.completions.create(
        model="melt-tiny", messages=CHAT, temperature=0, extra_body={"loops": loops}
    )
    (choice,) = answer.choices
    assert choice.message.content == lone[loops].text
    assert choice.finish_reason == "stop"
    assert answer.usage.completion_tokens == len(lone[loops].token_ids)
    assert answer.usage.prompt_tokens == lone[loops].prompt_tokens
    assert answer.usage.depth_histogram == {str(loops): len(lone[loops].token_ids)}
    assert answer.usage.loops_per_token == loops


def test_a_stream_is_the_same_answer(client, lone):
    stream = client.chat.completions.create(
        model="melt-tiny", messages=CHAT, stream=True, stream_options={"include_usage": True}, n=2, temperature=0
    )
    chunks = list(stream)
    texts, loops = {0: "", 1: ""}, {0: [], 1: []}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            loops[choice.index] += getattr(choice, "loops", None) or []
    assert texts == {0: lone[4].text, 1: lone[4].text}
    assert loops == {0: [4] * len(lone[4].token_ids), 1: [4] * len(lone[4].token_ids)}
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason] == [
        "stop"
    ] * 2
    assert chunks[-1].usage.completion_tokens == 2 * len(lone[4].token_ids)
    assert chunks[-1].usage.prompt_tokens == lone[4].prompt_tokens


def test_adaptive_depth_and_waves(client, lone):
    auto = client.chat.completions.create(
        model="melt-tiny", messages=CHAT, temperature=0, extra_body={"loops": "auto", "exit_threshold": 0.9}
    )
    assert auto.choices[0].message.content == lone[4].text
    assert 1 <= auto.usage.loops_per_token < 4
    wave = client.chat.completions.create(
        model="melt-tiny", messages=CHAT, temperature=0, extra_body={"decode": "wave", "lag": 3}
    )
    assert wave.choices[0].message.content == lone[4].text


def test_logprobs_of_a_chat(client):
    answer = client.chat.completions.create(
        model="melt-tiny", messages=CHAT, temperature=0, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for token in content:
        assert token.token == token.top_logprobs[0].token
        assert token.logprob == token.top_logprobs[0].logprob
        assert bytes(token.bytes).decode() == token.token
        assert [one.logprob for one in token.top_logprobs] == sorted(
            (o.logprob for o in token.top_logprobs), reverse=True
        )
    assert "".join(token.token for token in content[:-1]) == answer.choices[0].message.content


def test_plain_completions(client):
    answer = client.completions.create(
        model="melt-tiny", prompt=[[5, 6, 7], [8, 9]], n=2, max_tokens=4, temperature=1, seed=7, logprobs=2
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.prompt_tokens == 5
    for choice in answer.choices:
        logprobs = choice.logprobs
        assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset)
        assert all(len(top) <= 2 for top in logprobs.top_logprobs)
        assert logprobs.text_offset[0] == 0
    again = client.completions.create(
        model="melt-tiny", prompt=[8, 9], max_tokens=4, temperature=1, seed=8, extra_body={"loops": 4}
    )
    assert again.choices[0].text == answer.choices[3].text  # the second answer of n has the next seed


def test_stop_strings_and_lengths(client):
    said = {"model": "melt-tiny", "prompt": [5, 6, 7], "max_tokens": 12, "logit_bias": {"3": -100}}
    whole = client.completions.create(**said)
    assert whole.choices[0].finish_reason == "length"
    text = whole.choices[0].text
    stop = text[len(text) // 2 :][:3]
    cut = client.completions.create(
        model="melt-tiny", prompt=[5, 6, 7], max_tokens=12, logit_bias={"3": -100}, stop=stop
    )
    assert cut.choices[0].text == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Ana", "Ben"]}, "levels": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "levels"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("more", [{}, {"decode": "wave", "lag": 1}, {"temperature": 1.0, "seed": 5}])
def test_a_json_schema_holds(client, more):
    """Whatever the model would rather say."""
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    answer = client.chat.completions.create(
        model="melt-tiny", messages=CHAT, response_format=form, max_tokens=60, extra_body=more
    )
    values = json.loads(answer.choices[0].message.content)
    assert values["name"] in ("Ana", "Ben")
    assert 0 <= values["levels"] <= 99
    assert answer.choices[0].finish_reason == "stop"


def test_grammars_by_regular_expression_and_lark(address):
    for kind, value, holds in (
        ("regex", "[a-c]{3}[0-9]+x", lambda text: text[:3].strip("abc") == "" and text.endswith("x")),
        ("lark", 'start: "yes" | "no"', lambda text: text in ("yes", "no")),
    ):
        body = {"prompt": [5, 6], "max_tokens": 40, "grammar": {"type": kind, "value": value}, "n": 2, "temperature": 1}
        status, _, answer = ask(address, "/v1/completions", body)
        assert status == 200
        for choice in answer["choices"]:
            assert choice["finish_reason"] == "length" or holds(choice["text"])


def test_the_other_endpoints(address, model):
    status, _, models = ask(address, "/v1/models")
    assert (status, models["data"][0]["id"]) == (200, "melt-tiny")
    assert models["data"][0]["melt"]["state_bytes"] == model.state_bytes
    _, _, chat = ask(address, "/tokenize", {"messages": CHAT})
    _, _, text = ask(address, "/tokenize", {"text": "Ana reports to Ben."})
    assert chat["count"] == len(chat["tokens"]) > text["count"] > 0
    _, _, back = ask(address, "/detokenize", {"tokens": text["tokens"]})
    assert back == {"text": "Ana reports to Ben."}
    assert ask(address, "/health")[2]["status"] == "ok"


def test_the_metrics_add_up(address):
    def read():
        with urllib.request.urlopen(f"{address}/metrics") as response:
            lines = [line for line in response.read().decode().splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    before = read()
    answers = [ask(address, CHATS, {"messages": CHAT, "loops": loops})[2] for loops in (1, 4)]
    ask(address, CHATS, {"messages": []})
    after = read()

    def grew(name):
        return after[name] - before.get(name, 0)

    usages = [answer["usage"] for answer in answers]
    assert grew("melt_prompt_tokens_total") == sum(usage["prompt_tokens"] for usage in usages)
    assert grew("melt_completion_tokens_total") == sum(usage["completion_tokens"] for usage in usages)
    assert grew("melt_loops_total") == sum(
        int(loops) * count for usage in usages for loops, count in usage["depth_histogram"].items()
    )
    assert grew('melt_answers_total{end="stop"}') == grew("melt_first_token_seconds_count") == 2
    assert grew('melt_responses_total{path="/v1/chat/completions",status="200"}') == 2
    assert grew('melt_responses_total{path="/v1/chat/completions",status="400"}') == 1
    assert after["melt_requests_running"] == after["melt_requests_waiting"] == 0
    assert after["melt_passes_total"] > before["melt_passes_total"]


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "code", "message"),
    [
        (
            "/v1/chat/completions",
            {"messages": CHAT, "top_a": 1},
            400,
            "top_a",
            "invalid_value",
            "top_a is not supported",
        ),
        (CHATS, {}, 400, "messages", "invalid_value", "messages is missing"),
        (
            "/v1/chat/completions",
            {"messages": CHAT, "temperature": "hot"},
            400,
            "temperature",
            "invalid_value",
            "'hot'",
        ),
        (
            "/v1/chat/completions",
            {"messages": CHAT, "temperature": -1},
            400,
            None,
            "invalid_value",
            "temperature must be",
        ),
        (
            "/v1/chat/completions",
            {"messages": CHAT, "loops": 0},
            400,
            None,
            "invalid_value",
            "loops must be at least 1",
        ),
        (CHATS, {"messages": CHAT, "top_logprobs": 2}, 400, None, "invalid_value", "top_logprobs"),
        (CHATS, {"messages": CHAT, "model": "gpt"}, 404, "model", "model_not_found", "'melt-tiny'"),
        (
            *(CHATS, {"messages": [{"role": "user", "content": "Ana. " * 600}]}, 400, "messages"),
            *("context_length_exceeded", "capacity"),
        ),
        (
            *(CHATS, {"messages": CHAT, "max_tokens": 5000}, 400, "messages"),
            *("context_length_exceeded", "capacity"),
        ),
        (CHATS, {"messages": [{"role": "tool", "content": "x"}]}, 400, None, "invalid_value", "tool"),
        ("/v1/completions", {"prompt": [99999]}, 400, None, "invalid_value", "token ids must be in"),
        ("/v1/completions", {"prompt": []}, 400, None, "invalid_value", "prompt must hold at least one"),
        ("/v1/completions", {"prompt": "\ud800"}, 400, None, "invalid_value", "half"),
        (
            *("/v1/completions", {"prompt": "a", "grammar": {"type": "regex", "value": "(["}}, 400, None),
            *("invalid_value", "the regex cannot be compiled"),
        ),
        (
            *("/v1/completions", {"prompt": "a", "grammar": {"type": "lark", "value": "x" * 70_000}}, 400, None),
            *("invalid_value", "a grammar may have 65536 bytes"),
        ),
        (
            "/v1/completions",
            {"prompt": [[5]] * 100, "n": 2},
            400,
            None,
            "invalid_value",
            "prompts times n must be at most",
        ),
        ("/v1/completions", b"{", 400, None, "json_invalid", "the body must be JSON"),
        ("/v1/completions", b"[" * 50_000, 400, None, None, ""),
        ("/v1/completions", b'{"prompt": "' + b"a" * 300_000 + b'"}', 413, None, "body_too_large", "200000 bytes"),
        ("/v1/nothing", {}, 404, None, "unknown_url", "there is no POST /v1/nothing"),
        ("/detokenize", {"tokens": [-1]}, 400, None, "invalid_value", "tokens must be in"),
    ],
)
def test_errors_have_openai_s_form_and_name_what_is_wrong(address, path, body, status, param, code, message):
    got, _, answer = ask(address, path, body)
    error = answer["error"]
    assert (got, error["param"]) == (status, param), error
    assert code is None or error["code"] == code
    assert message in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_the_official_client_knows_the_errors(client):
    with pytest.raises(openai.BadRequestError, match="capacity") as raised:
        client.chat.completions.create(model="melt-tiny", messages=CHAT, max_tokens=5000)
    assert raised.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=CHAT)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**40) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
FIELDS = (
    "n",
    "stream",
    "temperature",
    "stop",
    "seed",
    "logit_bias",
    "loops",
    "response_format",
    "grammar",
    "logprobs",
    "top_logprobs",
    "decode",
    "lag",
    "max_completion_tokens",
    "stream_options",
    "model",
    "top_p",
    "exit_rule",
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=6), json_values, max_size=4),
    st.just(CHAT) | st.lists(st.fixed_dictionaries({"role": st.text(max_size=6), "content": json_values}), max_size=3),
)
def test_no_body_is_answered_otherwise_than_with_2xx_or_4xx(address, body, messages):
    connection = http.client.HTTPConnection(address.removeprefix("http://"))
    with contextlib.closing(connection):
        content = json.dumps({"max_tokens": 3, "messages": messages, **body})
        connection.request("POST", "/v1/chat/completions", content, JSON)
        response = connection.getresponse()
        text = response.read()
    assert 200 <= response.status < 300 or 400 <= response.status < 500, text


def read_metrics(address):
    with urllib.request.urlopen(f"{address}/metrics") as response:
        lines = [line for line in response.read().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_a_client_that_vanishes_frees_its_slot(address):
    for stream in (True, False):
        before = read_metrics(address).get('melt_answers_total{end="CancelledError"}', 0)
        connection = http.client.HTTPConnection(address.removeprefix("http://"))
        connection.request("POST", "/v1/completions", json.dumps({**LONG, "loops": 256, "stream": stream}), JSON)
        wait_until(lambda: running(address) == 1)
        connection.close()
        wait_until(lambda: running(address) == 0)
        wait_until(lambda: 'melt_answers_total{end="CancelledError"}' in read_metrics(address))
        assert read_metrics(address)['melt_answers_total{end="CancelledError"}'] == before + 1


def test_conversations_in_files(tiny_bundle, tmp_path):
    """Saved by one server, restored by another; the size is the same for every depth."""
    facts = "Ana reports to Ben. Ben works for Cleo. " * 12
    chat = [{"role": "user", "content": f"{facts}Who is one level above Ana?"}]
    sizes = {}
    for loops in (1, 4):
        with served(MeltModel.load(tiny_bundle, device="cpu", capacity=512, slots=2), sessions=tmp_path) as address:
            status, _, _ = ask(address, "/v1/sessions", {"name": "ana", "messages": chat})
            assert status == 409
            text = ask(address, CHATS, {"messages": chat, "loops": loops})[2]["choices"][0]["message"]["content"]
            said = [*chat, {"role": "assistant", "content": text}]
            status, _, saved = ask(address, "/v1/sessions", {"name": "ana", "messages": said})
            assert (status, saved["id"]) == (200, "ana")
            sizes[loops] = saved["bytes"] - len(text)
        with served(MeltModel.load(tiny_bundle, device="cpu", capacity=512, slots=2), sessions=tmp_path) as address:
            _, _, restored = ask(address, "/v1/sessions/ana/restore", method="POST")
            assert restored["cached_tokens"] == saved["cached_tokens"]
            more = {"messages": [*said, {"role": "user", "content": "Who is two levels above Ana?"}], "loops": loops}
            usage = ask(address, CHATS, more)[2]["usage"]
            assert usage["prompt_tokens_details"]["cached_tokens"] >= 64
            assert [one["id"] for one in ask(address, "/v1/sessions")[2]["data"]] == ["ana"]
            (file,) = tmp_path.iterdir()
            file.write_bytes(file.read_bytes()[:-9] + b"123456789")
            status, _, answer = ask(address, "/v1/sessions/ana/restore", method="POST")
            assert (status, answer["error"]["code"]) == (409, "session_unusable")
            assert str(tmp_path) not in answer["error"]["message"]
            assert ask(address, CHATS, more)[0] == 200
            assert ask(address, "/v1/sessions/ana", method="DELETE")[2]["deleted"] is True
            assert ask(address, "/v1/sessions/ana", method="DELETE")[0] == 404
            for name in ("..%2fother", "a/b", ".x", "x" * 65, "a%00"):
                assert ask(address, f"/v1/sessions/{name}/restore", method="POST")[0] in (400, 404)
            status, _, answer = ask(address, "/v1/sessions", {"name": "../x", "messages": said})
            assert (status, answer["error"]["param"]) == (400, "name")
    assert abs(sizes[1] - sizes[4]) < 16
    assert not list(tmp_path.iterdir())


def test_sessions_need_a_folder(address):
    status, _, answer = ask(address, "/v1/sessions")
    assert (status, answer["error"]["code"]) == (404, "no_sessions")


def test_64_clients_at_once_get_the_answers_of_lone_ones(tiny_bundle):
    """In float32; of any depth, sampled too, some with a grammar, some that go away."""
    model = MeltModel.load(tiny_bundle, device="cpu", capacity=512, slots=8)
    people = ["Ana", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo"]

    def question(number):
        names = people[number % 8 :] + people[: number % 8]
        facts = " ".join(f"{x} reports to {y}." for x, y in itertools.pairwise(names))
        return f"{facts} Who is {('one level', 'two levels', 'three levels')[number % 3]} above {names[0]}?"

    def settings(number):
        return {"loops": 1 + number % 4, "temperature": float(number % 2), "seed": number}

    expected = [model.generate(question(number), **settings(number)).text for number in range(64)]
    found, faults = {}, []

    def run(address, number):
        body = {"messages": [{"role": "user", "content": question(number)}], **settings(number)}
        try:
            for _ in range(2):
                if number % 8 == 7:
                    connection = http.client.HTTPConnection(address.removeprefix("http://"))
                    connection.request("POST", "/v1/completions", json.dumps({**LONG, "stream": True}), JSON)
                    connection.close()
                found.setdefault(number, set()).add(ask(address, CHATS, body)[2]["choices"][0]["message"]["content"])
        except Exception as error:
            faults.append(error)

    with served(model, queue=256) as address:
        threads = [threading.Thread(target=run, args=(address, number)) for number in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait_until(lambda: running(address) == 0)
        assert ask(address, "/health")[2]["waiting"] == 0
    assert not faults
    assert found == {number: {text} for number, text in enumerate(expected)}


def test_a_wrong_body_of_many_parts_is_refused_at_its_first_faults():
    """Each of three forms of a prompt once, not each of a hundred thousand elements."""
    with pytest.raises(ValidationError) as raised:
        CompletionRequest.model_validate({"prompt": [0.5] * 100_000})
    assert raised.value.error_count() <= 8
    for form, values in ((ChatRequest, {"messages": [{}] * 9000}), (DetokenizeRequest, {"tokens": ["a"] * 9000})):
        with pytest.raises(ValidationError) as raised:
            form.model_validate(values)
        assert raised.value.error_count() <= 4


def test_more_answers_than_can_be_are_no_matter_of_time(model_of_one):
    with served(model_of_one, queue=1) as address:
        status, _, answer = ask(address, "/v1/completions", {"prompt": "a", "n": 3, "max_tokens": 1})
        assert status == 400
        assert "this server takes 2 answers at once" in answer["error"]["message"]
        assert ask(address, "/v1/completions", {"prompt": "a", "n": 2, "max_tokens": 1})[0] == 200


def test_a_grammar_that_costs_too_much_ends_its_own_answer(address, monkeypatch):
    monkeypatch.setattr("melt_runtime.request.grammar._MOST_SECONDS", 0.0)
    monkeypatch.setattr("melt_runtime.request.grammar._SECONDS_A_TOKEN", 0.0)
    body = {"prompt": [5, 6], "max_tokens": 40, "grammar": {"type": "regex", "value": "[a-c]{3}[0-9]+x"}}
    status, _, answer = ask(address, "/v1/completions", body)
    assert status == 400
    assert "the grammar costs more than it may" in answer["error"]["message"]
    monkeypatch.undo()
    assert ask(address, "/v1/completions", body)[0] == 200


def test_a_text_that_cannot_fit_is_not_tokenized(address, monkeypatch):
    monkeypatch.setattr("melt_runtime.text.codec.TextCodec.encode", None)
    for path, body in (
        (CHATS, {"messages": [{"role": "user", "content": "a " * 70_000}]}),
        ("/tokenize", {"text": "a" * 99_000}),
    ):
        status, _, answer = ask(address, path, body)
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")


def test_too_many_are_told_to_come_back(model_of_one):
    with served(model_of_one, queue=1) as address:

        def long():
            with contextlib.suppress(OSError):
                ask(address, "/v1/completions", LONG)

        threads = [threading.Thread(target=long) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait_until(lambda: (health := ask(address, "/health")[2])["running"] + health["waiting"] == 2)
        status, headers, answer = ask(address, "/v1/completions", LONG)
        assert (status, headers["Retry-After"]) == (429, "1")
        assert answer["error"]["code"] == "queue_full"
        for thread in threads:
            thread.join()


@pytest.fixture(scope="module")
def model_of_one(tiny_bundle):
    return MeltModel.load(tiny_bundle, device="cpu", capacity=512)


def test_an_answer_that_takes_too_long_is_ended(model_of_one):
    with served(model_of_one, answer_seconds=0.05) as address:
        status, _, answer = ask(address, "/v1/completions", LONG)
        assert (status, answer["error"]["code"]) == (504, "timeout")
        wait_until(lambda: running(address) == 0)


def test_a_body_that_does_not_come_is_not_waited_for(model_of_one):
    with served(model_of_one, body_seconds=0.1) as address:
        host, port = address.removeprefix("http://").split(":")
        head = b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        with socket.create_connection((host, int(port))) as slow:
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + head)
            assert b" 408 " in slow.recv(4096)


KEY = "a-key-of-enough-length"


def test_a_key_is_needed_where_there_is_one(model_of_one):
    with served(model_of_one, key=KEY.encode()) as address:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}):
            status, answered, answer = ask(address, "/v1/models", headers=headers)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
            assert answered["WWW-Authenticate"] == "Bearer"
            assert KEY not in json.dumps(answer)
        assert ask(address, "/metrics")[0] == 401
        assert ask(address, "/health")[0] == 200
        assert ask(address, "/v1/models", headers={"Authorization": f"Bearer {KEY}"})[0] == 200
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0)
        with client, pytest.raises(openai.AuthenticationError):
            client.models.list()


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "Who somebody reports to.",
            "parameters": {
                "type": "object",
                "properties": {"person": {"enum": ["Ana", "Ben"]}, "levels": {"type": "integer", "maximum": 9}},
                "required": ["person"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("boss", "team")
]
WITH_TOOLS = """\
{%- for tool in tools or [] %}<|user|>{{ tool | tojson }}{% endfor -%}
{%- for message in messages -%}
{%- if message.tool_calls -%}<|assistant|>{% for call in message.tool_calls %}<tool_call>
{{ call.function | tojson }}
</tool_call>{% endfor %}<|end|>
{%- elif message.role == 'assistant' -%}<|assistant|>{{ message.content }}<|end|>
{%- else -%}<|user|>{{ message.content }}{%- endif -%}
{%- endfor -%}<|assistant|>"""


@pytest.fixture(scope="module")
def with_tools(tiny_bundle):
    """The official client of a server of melt-tiny under a chat template that knows tools."""
    model = MeltModel.load(tiny_bundle, device="cpu", capacity=2048, slots=2)
    model.codec.__init__(model.codec.tokenizer, WITH_TOOLS)
    with (
        served(model) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "team"}}])
def test_a_tool_is_called(with_tools, choice):
    """By a grammar, whatever the model would rather say; the result goes back into the chat."""
    said = {"model": "melt-tiny", "tools": TOOLS, "tool_choice": choice, "temperature": 0, "max_tokens": 200}
    answer = with_tools.chat.completions.create(messages=CHAT, **said)
    message = answer.choices[0].message
    (call,) = message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    assert message.content is None
    assert call.function.name in (("boss", "team") if choice == "required" else ("team",))
    assert json.loads(call.function.arguments)["person"] in ("Ana", "Ben")
    stream = with_tools.chat.completions.create(messages=CHAT, stream=True, **said)
    deltas = [chunk.choices[0].delta for chunk in stream]
    (streamed,) = [call for delta in deltas for call in delta.tool_calls or ()]
    assert "".join(delta.content or "" for delta in deltas) == ""
    assert (streamed.function.name, streamed.function.arguments) == (call.function.name, call.function.arguments)
    messages = [
        *CHAT,
        message.model_dump(exclude_none=True, include={"role", "content", "tool_calls"}),
        {"role": "tool", "tool_call_id": call.id, "content": "Ana reports to Ben. Who is one level above Ana?"},
    ]
    after = with_tools.chat.completions.create(messages=messages, **{**said, "tool_choice": "auto"})
    assert after.choices[0].finish_reason in ("stop", "length")
    assert after.usage.prompt_tokens > answer.usage.prompt_tokens


def test_what_tools_need(with_tools, address):
    with pytest.raises(openai.BadRequestError, match="tool_choice must name one of the tools, got 'other'"):
        with_tools.chat.completions.create(
            model="melt-tiny",
            messages=CHAT,
            tools=TOOLS,
            tool_choice={"type": "function", "function": {"name": "other"}},
        )
    status, _, answer = ask(address, CHATS, {"messages": CHAT, "tools": TOOLS})
    assert status == 400
    assert "this bundle's chat template knows none in the form of <tool_call>" in answer["error"]["message"]
    assert ask(address, CHATS, {"messages": CHAT, "tool_choice": "required"})[0] == 400
    assert ask(address, CHATS, {"messages": CHAT, "tools": TOOLS, "tool_choice": "none"})[0] == 200


ODD = '{"name": "a", "arguments": {"x": "</tool_call>"}}'
ONE, TWO = '{"name": "a", "arguments": {"x": 1}}', '{"name": "b", "arguments": {}}'


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        ("No call.", "No call.", []),
        (f"Well. <tool_call>\n{ONE}\n</tool_call>", "Well. ", [("a", '{"x": 1}')]),
        (f"<tool_call>{ONE}</tool_call>\n<tool_call>{TWO}</tool_call>", "", [("a", '{"x": 1}'), ("b", "{}")]),
        (f"<tool_call>{ONE}", "", [("a", '{"x": 1}')]),
        (f"A <tool_call>{ONE}</tool_call> and more", "A  and more", [("a", '{"x": 1}')]),
        (
            '<tool_call>{"name": "a", "arguments": {"x": "</tool_call>"}}</tool_call>',
            "",
            [("a", '{"x": "</tool_call>"}')],
        ),
        ('<tool_call>{"name": "a", "arguments": {"x": NaN}}', '<tool_call>{"name": "a", "arguments": {"x": NaN}}', []),
        ("<tool_call>{broken}</tool_call>", "<tool_call>{broken}</tool_call>", []),
        ('<tool_call>{"name": 3, "arguments": {}}', '<tool_call>{"name": 3, "arguments": {}}', []),
        ("a < b, <tool", "a < b, <tool", []),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 100])
def test_calls_are_read_out_of_text(text, said, calls, size):
    reader = CallReader()
    shown = "".join(reader.push(text[start : start + size]) for start in range(0, len(text), size))
    rest, found = reader.finish()
    assert shown + rest == said
    assert [(call.name, call.arguments) for call in found] == calls


def test_other_names_and_kinds_of_bodies_are_refused(model_of_one):
    """A page whose name leads here, and a form that a page of anybody's may send."""
    with served(model_of_one, hosts=("localhost", "127.0.0.1")) as address:
        assert ask(address, "/health")[0] == 200
        status, _, answer = ask(address, "/health", headers={"Host": "example.org:80"})
        assert (status, answer["error"]["code"]) == (403, "unknown_host")
        for kind in ("text/plain", "application/x-www-form-urlencoded"):
            status, _, answer = ask(address, "/v1/completions", LONG, {"Content-Type": kind})
            assert (status, answer["error"]["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize("levels", [50, 300, 3000])
def test_a_deep_schema_ends_nothing(address, levels):
    nested = '{"type": "object", "properties": {"a": ' * levels + "{}" + "}}" * levels
    body = json.dumps({"messages": CHAT, "max_tokens": 5, "response_format": {"type": "json_schema"}})
    body = body[:-2] + ', "json_schema": {"schema": ' + nested + "}}}"
    assert ask(address, CHATS, body.encode())[0] in (200, 400)
    assert ask(address, "/health")[0] == 200


def test_other_pages_may_not_ask_unless_they_are_listed(model_of_one):
    asked = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    with served(model_of_one) as address:
        _, headers, _ = ask(address, "/v1/models", headers={"Origin": "https://example.org"})
        assert headers["Access-Control-Allow-Origin"] is None
    with served(model_of_one, key=KEY.encode(), origins=("https://example.org",)) as address:
        connection = http.client.HTTPConnection(address.removeprefix("http://"))
        with contextlib.closing(connection):
            connection.request("OPTIONS", "/v1/chat/completions", headers=asked)
            response = connection.getresponse()
            response.read()
        assert response.status == 200
        assert response.headers["Access-Control-Allow-Origin"] == "https://example.org"
        status, headers, _ = ask(address, "/v1/models", headers={"Origin": "https://example.org"})
        assert (status, headers["Access-Control-Allow-Origin"]) == (401, "https://example.org")
        _, headers, _ = ask(address, "/health", headers={"Origin": "https://elsewhere.org"})
        assert headers["Access-Control-Allow-Origin"] is None


@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        (["--host", "0.0.0.0"], {}, "--host 0.0.0.0 is open to other machines: give --api-key-file FILE"),
        (["--host", "example.org"], {}, "is open to other machines"),
        ([], {"MELT_API_KEY": "short"}, "the API key in MELT_API_KEY must be one word of at least 16"),
        (["--no-key"], {"MELT_API_KEY": KEY}, "--no-key must be left out where a key is given"),
        (["--port", "70000"], {}, "--port must be at most 65535"),
        (["--slots", "0"], {}, "--slots must be at least 1"),
        (["--timeout", "0"], {}, "--timeout must be above 0"),
        (["--api-key-file", "/nowhere"], {}, "No such file"),
        (["--capacity", "100000"], {}, "capacity must be at most 4096"),
    ],
)
def test_the_command_refuses_what_is_unsafe_or_wrong(tiny_bundle, monkeypatch, capsys, options, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["serve", str(tiny_bundle), *options]) == 1
    assert message in capsys.readouterr().err


def start_server(bundle, port, *options):
    """A server in a process of its own; its address, and what it said before it listened."""
    command = [sys.executable, "-m", "melt_runtime", "serve", str(bundle), "--device", "cpu", "--capacity", "512"]
    environment = {**os.environ, "MELT_API_KEY": KEY}
    server = subprocess.Popen([*command, "--port", port, *options], stderr=subprocess.PIPE, text=True, env=environment)
    lines = []
    for line in server.stderr:
        lines.append(line)
        if line.startswith("listening on "):
            break
    return server, lines[-1].split()[-1], "".join(lines)


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_ends_when_it_is_told_to(tiny_bundle, ending):
    """Answers under way end first; another server takes the same port, also after one that was killed."""
    shown = {"Authorization": f"Bearer {KEY}"}
    server, address, said = start_server(tiny_bundle, "0")
    assert "of state for 8 x 512 tokens" in said
    answers = []

    def ask_long():
        with contextlib.suppress(OSError, http.client.HTTPException):
            answers.append(ask(address, "/v1/completions", LONG, shown))

    thread = threading.Thread(target=ask_long)
    thread.start()
    wait_until(lambda: running(address) == 1)
    server.send_signal(ending)
    thread.join()
    server.wait()
    rest = server.stderr.read()
    server.stderr.close()
    assert KEY not in said + rest
    assert "Traceback" not in rest, rest
    if ending == signal.SIGTERM:
        ((status, _, answer),) = answers
        assert (status, answer["usage"]["completion_tokens"]) == (200, 400)
    again, same, _ = start_server(tiny_bundle, address.rsplit(":", 1)[1])
    assert same == address
    assert ask(address, "/v1/models", headers=shown)[0] == 200
    again.terminate()
    again.wait()
    again.stderr.close()


def test_who_still_waits_when_a_server_ends_is_told_so(tiny_bundle):
    """An answer, a stream and one that waits for a slot, all of them longer than the time that is left."""
    shown = {"Authorization": f"Bearer {KEY}"}
    server, address, _ = start_server(tiny_bundle, "0", "--drain", "0.2", "--slots", "2")
    deep = {**LONG, "loops": 1024}
    answers = []

    def stream():
        connection = http.client.HTTPConnection(address.removeprefix("http://"))
        with contextlib.closing(connection):
            connection.request("POST", "/v1/completions", json.dumps({**deep, "stream": True}), {**JSON, **shown})
            answers.append((200, None, connection.getresponse().read()))

    def whole():
        answers.append(ask(address, "/v1/completions", deep, shown))

    threads = [threading.Thread(target=target) for target in (stream, whole, whole)]
    for thread in threads:
        thread.start()
    wait_until(lambda: (health := ask(address, "/health")[2])["running"] + health["waiting"] == 3)
    server.terminate()
    for thread in threads:
        thread.join()
    server.wait()
    assert "Traceback" not in server.stderr.read()
    server.stderr.close()
    for status, _, answer in answers:
        if status == 200:
            assert json.loads(answer.strip().split(b"\n\n")[-1][6:])["error"]["code"] == "cancelled"
        else:
            assert (status, answer["error"]["code"]) == (503, "cancelled")


@pytest.mark.parametrize(("host", "name"), [("127.0.0.1", "localhost"), ("127.0.0.2", "127.0.0.2"), ("::1", "[::1]")])
def test_a_server_answers_to_its_own_address(host, name):
    assert name in _names(host)


def test_grammars_name_what_they_lack(model, monkeypatch):
    with pytest.raises(GrammarError, match="a token that ends an answer"):
        Grammars(model.codec, 703, ())
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(GrammarError, match=r"pip install 'melt-onnx\[serve\]'"):
        Grammars(model.codec, 703, (3,))
