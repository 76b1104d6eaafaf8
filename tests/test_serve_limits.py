"""What a server refuses, and what it withstands: bad bodies, clients that go away, keys, limits, its end."""

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
from concurrent.futures import ThreadPoolExecutor, as_completed

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live_server import (
    CHAT,
    CHATS,
    JSON,
    KEY,
    LONG,
    QUESTION,
    address,
    ask,
    client,
    lone,
    model,
    read_metrics,
    running,
    served,
    wait_until,
)
from pydantic import ValidationError
from safetensors import SafetensorError

from melt_runtime import MeltModel
from melt_runtime.cli.main import main
from melt_runtime.cli.serve import _names
from melt_runtime.request.grammar import GrammarError, Grammars
from melt_runtime.serve.answers import Writer
from melt_runtime.serve.counting import count_parts
from melt_runtime.serve.forms import ChatRequest, CompletionRequest, DetokenizeRequest, SessionRequest

__all__ = ["address", "client", "lone", "model"]


TEXTS = "/v1/completions"


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "code", "message"),
    [
        (CHATS, {"messages": CHAT, "top_a": 1}, 400, "top_a", "invalid_value", "top_a is not supported"),
        (CHATS, {}, 400, "messages", "invalid_value", "messages is missing"),
        (CHATS, {"messages": CHAT, "temperature": "hot"}, 400, "temperature", "invalid_value", "'hot'"),
        (CHATS, {"messages": CHAT, "temperature": -1}, 400, "temperature", "invalid_value", "temperature must be"),
        (CHATS, {"messages": CHAT, "loops": 0}, 400, "loops", "invalid_value", "loops must be at least 1"),
        (CHATS, {"messages": CHAT, "loops": 1, "lag": 1}, 400, "lag", "invalid_value", "lag must"),
        (CHATS, {"messages": CHAT, "max_tokens": 0}, 400, "max_tokens", "invalid_value", "max_tokens must be at"),
        (
            *(CHATS, {"messages": CHAT, "max_completion_tokens": 0}, 400, "max_completion_tokens"),
            *("invalid_value", "max_completion_tokens must be at least 1"),
        ),
        (CHATS, {"messages": CHAT, "seed": -2}, 400, "seed", "invalid_value", "seed must be at least 0"),
        (CHATS, {"messages": CHAT, "seed": 2**64 - 1, "n": 2}, 400, "seed", "invalid_value", "seed must be at most"),
        (CHATS, {"messages": CHAT, "logit_bias": {"9999": 1}}, 400, "logit_bias", "invalid_value", "below the"),
        (CHATS, {"messages": CHAT, "top_logprobs": 2}, 400, "top_logprobs", "invalid_value", "top_logprobs"),
        (CHATS, {"messages": CHAT, "model": "gpt"}, 404, "model", "model_not_found", "'melt-tiny'"),
        (
            *(CHATS, {"messages": [{"role": "user", "content": "Ana. " * 600}]}, 400, "messages"),
            *("context_length_exceeded", "capacity"),
        ),
        (
            *(CHATS, {"messages": CHAT, "max_tokens": 5000}, 400, "messages"),
            *("context_length_exceeded", "or lower max_tokens"),
        ),
        (
            *(CHATS, {"messages": CHAT, "max_completion_tokens": 5000, "stream": True}, 400, "messages"),
            *("context_length_exceeded", "or lower max_completion_tokens"),
        ),
        (TEXTS, {"prompt": [5], "max_tokens": 5000}, 400, "prompt", "context_length_exceeded", "lower max_tokens"),
        (CHATS, {"messages": [{"role": "tool", "content": "x"}]}, 400, "messages", "invalid_value", "tool"),
        (CHATS, {"messages": [{"role": "user"}]}, 400, "messages[0].content", "invalid_value", "must be text"),
        (TEXTS, {"prompt": [99999]}, 400, "prompt", "invalid_value", "token ids must be in"),
        (TEXTS, {"prompt": []}, 400, "prompt", "invalid_value", "prompt must hold at least one"),
        (TEXTS, {"prompt": ""}, 400, "prompt", "invalid_value", "the prompt is empty"),
        (TEXTS, {"prompt": "\ud800"}, 400, "prompt", "invalid_value", "half"),
        (
            *(TEXTS, {"prompt": "a", "grammar": {"type": "regex", "value": "(["}}, 400, "grammar"),
            *("invalid_value", "the regex cannot be compiled"),
        ),
        (
            *(TEXTS, {"prompt": "a", "grammar": {"type": "lark", "value": "x" * 70_000}}, 400, "grammar"),
            *("invalid_value", "a grammar may have 65536 bytes"),
        ),
        (
            *(
                CHATS,
                {"messages": CHAT, "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 3}}}},
            ),
            *(
                400,
                "response_format.json_schema.schema",
                "invalid_value",
                "json_schema.schema cannot be compiled: type",
            ),
        ),
        (TEXTS, {"prompt": [[5]] * 100, "n": 2}, 400, "n", "invalid_value", "prompts times n must be at most"),
        (
            *(TEXTS, {"prompt": ["a"] * 8, "n": 16, "max_tokens": 490, "logprobs": 20}, 400, "logprobs"),
            *("invalid_value", "logprobs of all tokens of a request must be at most 131072, got 1317120"),
        ),
        (
            *(TEXTS, {"prompt": [[5] * 300] * 8, "n": 16, "max_tokens": 100, "loops": 100}, 400, "max_tokens"),
            *("invalid_value", "tokens times loops of all prompts and answers of a request must be at most 524288"),
        ),
        (TEXTS, b"{", 400, None, "json_invalid", "the body must be JSON"),
        (TEXTS, b"[" * 50_000, 400, None, None, ""),
        (TEXTS, b'{"prompt": "' + b"a" * 300_000 + b'"}', 413, None, "body_too_large", "200000 bytes"),
        ("/v1/nothing", {}, 404, None, "unknown_url", "there is no POST /v1/nothing"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens", "invalid_value", "tokens must be in"),
        ("/tokenize", {"text": ""}, 400, "text", "invalid_value", "the prompt is empty"),
        ("/tokenize", {"messages": [{"role": "x", "content": "a"}]}, 400, "messages", "invalid_value", "roles"),
    ],
)
def test_errors_have_openai_s_form_and_name_what_is_wrong(address, path, body, status, param, code, message):
    got, _, answer = ask(address, path, body)
    error = answer["error"]
    assert (got, error["param"]) == (status, param), error
    assert "max_new_tokens" not in error["message"]
    assert code is None or error["code"] == code
    assert message in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


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


def test_an_object_of_many_unknown_fields_is_refused_at_its_first_ones():
    with pytest.raises(ValidationError) as raised:
        CompletionRequest.model_validate({"prompt": [5], **{f"field{place}": 1 for place in range(9000)}})
    assert raised.value.error_count() <= 8
    with pytest.raises(ValidationError) as raised:
        CompletionRequest.model_validate({"prompt": [5], "logit_bias": {str(place): "a" for place in range(9000)}})
    assert raised.value.error_count() == 1


@pytest.mark.parametrize(
    "body",
    [
        b'{"messages": [{"role": "user", "content": [' + b",".join([b"{}"] * 65_536) + b"]}]}",
        b'{"messages": [{"role": "user", "content": ' + b"[" * 65_536,
        b'{"prompt": [5], ' + b",".join(b'"%d":1' % place for place in range(65_536)) + b"}",
        json.dumps({"prompt": [[5]] * 65_536}).encode("utf-16"),
    ],
)
def test_a_body_of_many_parts_is_not_parsed(model_of_one, monkeypatch, body):
    """The event loop would read it while everybody waits."""
    monkeypatch.setattr("starlette.requests.Request.json", None)
    with served(model_of_one) as address:
        status, _, answer = ask(address, TEXTS, body)
    assert (status, answer["error"]["code"]) == (413, "body_too_large")
    assert "at most 65536 lists, objects and members of objects, got 655" in answer["error"]["message"]


@pytest.mark.parametrize("text", ['{"a": [1]}', '\\"{"', "\\\\{", '"', "\\", "\\n:é"])
def test_what_stands_in_texts_is_no_part_of_a_body(text):
    body = json.dumps({"a": text * 20_000, "b": [text, {}]}).encode()
    assert count_parts(body) == 5
    assert count_parts(json.dumps({text: {text: [1, 2]}}, ensure_ascii=False).encode()) == 5


def test_arguments_of_many_values_are_not_read(monkeypatch):
    """Together, as they are read together; in an argument that is a text they count little."""
    monkeypatch.setattr("melt_runtime.text.call_arguments.DECODER", None)
    arguments = json.dumps({"a": [1] * 30_000})
    for message in (
        {"tool_calls": [{"function": {"name": "f", "arguments": arguments}}]},
        {"function_call": {"name": "f", "arguments": arguments}},
    ):
        for form in (ChatRequest, SessionRequest):
            with pytest.raises(
                ValidationError, match="arguments of calls must have at most 65536 JSON values, got 90006"
            ):
                form.model_validate({"name": "x", "messages": [{"role": "assistant", **message}] * 3})
    monkeypatch.undo()
    call = {"function": {"name": "f", "arguments": json.dumps({"text": "f({}, [1, 2])" * 20_000})}}
    assert ChatRequest.model_validate({"messages": [{"role": "assistant", "tool_calls": [call]}]})


def test_a_request_of_many_answers_is_one_in_the_queue(model_of_one):
    with served(model_of_one, queue=1) as address:
        status, _, answer = ask(address, "/v1/completions", {"prompt": "a", "n": 3, "max_tokens": 1})
        assert (status, len(answer["choices"])) == (200, 3)


def test_no_request_goes_deeper_than_the_server_allows(model_of_one):
    cases = [
        ({}, {"2"}),  # the model's own depth is 4
        ({"loops": 1}, {"1"}),
        ({"loops": "auto", "exit_rule": "settled"}, {"1", "2"}),
        ({"loops": 3}, "loops must be at most 2 on this server, got 3"),
        ({"loops": 1024}, "loops must be at most 2 on this server"),
        ({"loops": "auto", "max_loops": 3}, "loops must be at most 2 on this server"),
        ({"loops": "auto", "min_loops": 3}, "min_loops must be at most max_loops (2)"),
    ]
    with served(model_of_one, max_loops=2) as address:
        for depth, expected in cases:
            status, _, answer = ask(address, "/v1/completions", {"prompt": "Who?", "max_tokens": 4, **depth})
            if isinstance(expected, str):
                assert (status, expected in answer["error"]["message"]) == (400, True), answer
            else:
                assert set(answer["usage"]["depth_histogram"]) <= expected, answer


def test_large_answers_are_built_beside_the_event_loop(address, monkeypatch):
    threads = []

    def whole(*arguments, of_writer=Writer.whole):
        threads.append(threading.current_thread().name)
        return of_writer(*arguments)

    monkeypatch.setattr(Writer, "whole", whole)
    assert ask(address, "/v1/completions", {"prompt": "Who?", "max_tokens": 4, "logprobs": 20})[0] == 200
    assert threads[0].startswith("asyncio_")  # of the loop's pool


@pytest.mark.parametrize("more", [{}, {"decode": "wave", "lag": 1}, {"n": 2}])
def test_a_grammar_that_costs_too_much_ends_its_own_answer(address, monkeypatch, more):
    monkeypatch.setattr("melt_runtime.request.grammar._MOST_SECONDS", 0.0)
    monkeypatch.setattr("melt_runtime.request.grammar._SECONDS_A_TOKEN", 0.0)
    body = {"prompt": [5, 6], "max_tokens": 40, "grammar": {"type": "regex", "value": "[a-c]{3}[0-9]+x"}} | more
    status, _, answer = ask(address, "/v1/completions", body)
    assert status == 400
    assert "the grammar costs more than it may" in answer["error"]["message"]
    monkeypatch.undo()
    assert ask(address, "/v1/completions", body)[0] == 200


def test_requests_without_a_grammar_wait_for_no_compilation(address, monkeypatch):
    """Eight compilations that do not end, more than an event loop has threads; those that are too many get a 429."""
    monkeypatch.setattr("melt_runtime.serve.compiling._MAX_WAITING", 8)
    go_on = threading.Event()
    compile_parts = Grammars.compile_parts

    def wait(self, parts):
        go_on.wait()
        return compile_parts(self, parts)

    monkeypatch.setattr(Grammars, "compile_parts", wait)
    body = {"prompt": [5, 6], "max_tokens": 3, "grammar": {"type": "regex", "value": "[a-c]{3}[0-9]+x"}}
    with ThreadPoolExecutor(9) as pool:
        answers = [pool.submit(ask, address, "/v1/completions", body) for _ in range(9)]
        refused = next(as_completed(answers)).result()  # the others wait
        assert (refused[0], refused[2]["error"]["code"]) == (429, "queue_full")
        assert ask(address, "/v1/completions", {"prompt": [5, 6], "max_tokens": 1})[0] == 200
        go_on.set()
        assert sorted(answer.result()[0] for answer in answers) == [200] * 8 + [429]


def test_a_grammar_whose_client_went_away_is_not_compiled(model_of_one, monkeypatch):
    """One waits for a thread while another is compiled."""
    monkeypatch.setattr("melt_runtime.serve.compiling._THREADS", 1)
    begun, go_on = threading.Event(), threading.Event()
    compiled = []

    def compile_parts(self, parts):
        compiled.append(parts[0].source)
        begun.set()
        go_on.wait()
        raise GrammarError("no grammar")

    monkeypatch.setattr(Grammars, "compile_parts", compile_parts)
    with served(model_of_one) as address, ThreadPoolExecutor(1) as pool:
        body = {"prompt": [5, 6], "max_tokens": 3, "grammar": {"type": "regex", "value": "first"}}
        first = pool.submit(ask, address, TEXTS, body)
        begun.wait()
        gone = http.client.HTTPConnection(address.removeprefix("http://"))
        gone.request("POST", TEXTS, json.dumps({**body, "grammar": {"type": "regex", "value": "gone"}}), JSON)
        gone.close()
        left = 'melt_responses_total{path="/v1/completions",status="503"}'
        wait_until(lambda: left in read_metrics(address))
        go_on.set()
        assert first.result()[0] == 400
        assert ask(address, TEXTS, {**body, "grammar": {"type": "regex", "value": "last"}})[0] == 400
    assert compiled == ["first", "last"]


def test_large_bodies_leave_memory_to_small_ones(model_of_one, monkeypatch):
    monkeypatch.setattr("melt_runtime.serve.guard._HELD_BODIES", 1)
    large = {"prompt": "a" * 150_000}
    with served(model_of_one, most_bytes=200_000) as address:
        assert ask(address, TEXTS, large)[0] == 400  # too many characters
        slow = http.client.HTTPConnection(address.removeprefix("http://"))
        slow.putrequest("POST", TEXTS)
        slow.putheader("Content-Type", "application/json")
        slow.putheader("Content-Length", "190000")
        slow.endheaders(b" " * 180_000)
        wait_until(lambda: ask(address, TEXTS, large)[0] == 429)
        assert ask(address, TEXTS, {"prompt": [5, 6], "max_tokens": 1})[0] == 200
        slow.close()
        wait_until(lambda: ask(address, TEXTS, large)[0] == 400)


def test_a_text_that_cannot_fit_is_not_tokenized(address, monkeypatch):
    monkeypatch.setattr("melt_runtime.text.codec.TextCodec.encode", None)
    for path, body in (
        (CHATS, {"messages": [{"role": "user", "content": "a " * 70_000}]}),
        ("/tokenize", {"text": "a" * 99_000}),
    ):
        status, _, answer = ask(address, path, body)
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")


def test_operations_on_one_session_are_whole(tiny_bundle, tmp_path, monkeypatch):
    """Of many clients over one name; then a full disk, and what is no session."""
    chat = [{"role": "user", "content": f"{QUESTION}{QUESTION}"}]
    saved = {"name": "ana", "messages": chat}
    operations = (
        ("POST", "/v1/sessions", saved),
        ("POST", "/v1/sessions/ana/restore", None),
        ("DELETE", "/v1/sessions/ana", None),
    )
    found = set()
    with served(MeltModel.load(tiny_bundle, device="cpu", capacity=512, slots=2), sessions=tmp_path) as address:
        ask(address, CHATS, {"messages": chat, "max_tokens": 2})

        def work(place):
            for number in range(15):
                method, path, body = operations[(place + number) % 3]
                status, _, answer = ask(address, path, body, method=method)
                found.add((status, (answer.get("error") or {}).get("code")))

        threads = [threading.Thread(target=work, args=(place,)) for place in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found <= {(200, None), (404, "session_not_found"), (409, "session_unusable")}
        assert {status for status, _ in found} >= {200, 404}

        def full(*_):
            raise SafetensorError("I/O error: No space left on device (os error 28)")

        with monkeypatch.context() as patch:
            patch.setattr("melt_runtime.execute.tensors.save_file", full)
            status, _, answer = ask(address, "/v1/sessions", saved)
            assert (status, answer["error"]["code"]) == (507, "storage_error")
            assert answer["error"]["message"].endswith("No space left on device")
            patch.setattr("pathlib.Path.unlink", lambda *_, **__: os.stat("/proc/self/mem/x"))
            (tmp_path / "here.melt-session").write_text("")
            assert ask(address, "/v1/sessions/here", method="DELETE")[0] == 507
        (tmp_path / "folder.melt-session").mkdir()
        os.mkfifo(tmp_path / "pipe.melt-session")
        for name in ("folder", "pipe"):
            status, _, answer = ask(address, "/v1/sessions", {**saved, "name": name})
            assert (status, answer["error"]["code"]) == (409, "session_unusable")
            assert str(tmp_path) not in answer["error"]["message"]
            assert ask(address, f"/v1/sessions/{name}/restore", method="POST")[0] == 404
        tmp_path.rename(tmp_path.with_name("moved"))
        assert ask(address, "/v1/sessions", saved)[0] == 507
        assert ask(address, "/v1/sessions")[2]["data"] == []
        assert ask(address, "/v1/sessions/ana", method="DELETE")[0] == 404


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


def test_a_key_is_needed_where_there_is_one(model_of_one):
    with served(model_of_one, key=KEY.encode()) as address:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}):
            status, answered, answer = ask(address, "/v1/models", headers=headers)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
            assert answered["WWW-Authenticate"] == "Bearer"
            assert KEY not in json.dumps(answer)
        assert ask(address, "/metrics")[0] == 401
        assert ask(address, "/health")[0] == ask(address, "/openapi.json")[0] == 200
        assert ask(address, "/v1/models", headers={"Authorization": f"Bearer {KEY}"})[0] == 200
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0)
        with client, pytest.raises(openai.AuthenticationError):
            client.models.list()


def test_other_names_and_kinds_of_bodies_are_refused(model_of_one):
    """A page whose name leads here, and a form that a page of anybody's may send."""
    with served(model_of_one, hosts=("localhost", "mine.example")) as address:
        for host in (
            "localhost",
            "LOCALHOST.:80",
            "mine.example:1",
            "127.0.0.1:9",
            "10.1.2.3",
            "[::1]:8080",
            "[fe80::1]",
        ):
            assert ask(address, "/health", headers={"Host": host})[0] == 200, host
        for host in ("example.org:80", "mine.example.evil.org", "", "127.0.0.1.evil.org", "0x7f.1", "[::1].evil.org"):
            status, _, answer = ask(address, "/health", headers={"Host": host})
            assert (status, answer["error"]["code"]) == (403, "unknown_host"), host
            assert "mine" not in answer["error"]["message"]
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
        (["--most-loops", "1025"], {}, "--most-loops must be at most 1024"),
        (["--no-key", "--host", "0.0.0.0", "--allow-host", "*"], {}, "--allow-host must be a name"),
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


def test_a_server_without_a_key_answers_to_its_own_names_only():
    machine = socket.gethostname().lower()
    assert _names("127.0.0.1") == ("localhost",)
    assert set(_names("0.0.0.0", ["Melt.Example."])) >= {"localhost", "melt.example", machine}
    assert "box.example" in _names("box.example")
    with pytest.raises(ValueError, match="--allow-host must be a name without port, got 'x:80'"):
        _names("0.0.0.0", ["x:80"])
