"""What requests may say, without a server: fields that pass, fields that are refused, answers that come back."""

import copy
import json
from typing import get_type_hints

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from live_server import CHAT
from pydantic import ValidationError
from test_serve import TOOLS, WITH_TOOLS

from melt_runtime.reply import Part
from melt_runtime.request.result import GenerationResult, Timings
from melt_runtime.serve.answers import Writer
from melt_runtime.serve.asks import messages_of
from melt_runtime.serve.errors import fault_of_form
from melt_runtime.serve.forms import ChatRequest, CompletionRequest, SessionRequest, TokenizeRequest
from melt_runtime.serve.messages import ChatMessage, TextPart
from melt_runtime.text.messages import check_messages
from melt_runtime.text.templates import ChatTemplate

PROMPT = {"prompt": "Ana"}
TEMPLATE = ChatTemplate(WITH_TOOLS)


def refusal(form, body):
    """The fault of a body that a form refuses."""
    with pytest.raises(ValidationError) as raised:
        form.model_validate(body)
    return fault_of_form(raised.value.errors())


FULL = {
    "messages": [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}], "name": "rules"},
        {"role": "user", "content": "Who?"},
        {
            "role": "assistant",
            "content": "Well.",
            "reasoning_content": "Hm.",
            "reasoning": "Hm.",
            "refusal": "No.",
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "boss", "arguments": "{}"}}],
        },
        {"role": "tool", "content": "Ben", "tool_call_id": "1"},
    ],
    "model": "melt-tiny",
    "stream": True,
    "stream_options": {"include_usage": True, "include_obfuscation": True},
    "n": 2,
    "max_tokens": 5,
    "temperature": 1.0,
    "top_k": 3,
    "logit_bias": {"5": 1},
    "stop": ["a"],
    "seed": 7,
    "logprobs": True,
    "top_logprobs": 2,
    "tools": [
        {"type": "function", "function": {"name": "boss", "description": "Who?", "parameters": {"type": "object"}}}
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "response_format": {
        "type": "json_schema",
        "json_schema": {"name": "a", "description": "b", "schema": {"const": None}, "strict": True},
    },
    "loops": "auto",
    "exit_rule": "settled",
}


def places(values, path=()):
    """The place of every field, of objects in it as well; what a schema says is its own."""
    pairs = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in pairs:
        if isinstance(values, dict):
            yield (*path, key)
        if isinstance(value, dict | list) and key not in ("schema", "parameters", "logit_bias"):
            yield from places(value, (*path, key))


def with_field(values, path, **field):
    """A copy in which the field at a path has another value, or is absent."""
    values = copy.deepcopy(values)
    place = values
    for key in path[:-1]:
        place = place[key]
    if field:
        place[path[-1]] = field["value"]
    else:
        del place[path[-1]]
    return values


@pytest.mark.parametrize("path", list(places(FULL)), ids=str)
def test_null_is_absent(path):
    """Everywhere: the same request, or the same fault of a field that must be there."""
    results = []
    for body in (with_field(FULL, path, value=None), with_field(FULL, path)):
        try:
            results.append(ChatRequest.model_validate(body))
        except ValidationError as error:
            results.append(fault_of_form(error.errors()))
    assert results[0] == results[1]


def test_null_within_a_schema_stays():
    form = ChatRequest.model_validate({**FULL, "logit_bias": {"5": 1, "6": None}})
    assert form.logit_bias == {"5": 1}
    assert form.response_format.json_schema.schema_ == {"const": None}


@pytest.mark.parametrize(
    "body",
    [
        {"user": "me", "metadata": {"a": 1}, "store": True, "service_tier": "flex", "safety_identifier": "x"},
        {"prompt_cache_key": "k", "prompt_cache_retention": "24h", "verbosity": "low", "store": False},
        {"best_of": 1, "echo": False, "suffix": "", "functions": [], "function_call": "auto", "modalities": ["text"]},
        {"n": 1, "stream": False, "stop": "", "logit_bias": {}, "stream_options": {}, "grammar": "", "model": ""},
        {"seed": -1, "top_k": -1, "stop": [], "frequency_penalty": None, "audio": None, "prediction": None},
        {"web_search_options": None, "reasoning_effort": "none", "moderation": None, "anything": None},
        {"ignore_eos": False, "min_tokens": 0, "length_penalty": 1.0, "skip_special_tokens": True, "guided_json": None},
        {"use_beam_search": False, "include_stop_str_in_output": False, "request_id": "a", "priority": 3},
        {"spaces_between_special_tokens": True, "add_special_tokens": False, "bad_words": [], "echo": None},
        {"cache_prompt": False, "id_slot": -1, "n_predict": -1, "typical_p": 1, "mirostat": 0, "repeat_penalty": 1.0},
        {"samplers": [], "return_tokens": False, "timings_per_token": False, "dry_multiplier": 0.0},
        # llama.cpp's clients send every setting; those of samplers that are off ask for nothing
        {"repeat_last_n": 64, "repeat_penalty": 1.0, "presence_penalty": 0, "xtc_threshold": 0.1, "n_keep": 5},
        {"dry_base": 1.75, "dry_allowed_length": 2, "dry_penalty_last_n": -1, "dry_sequence_breakers": ["\n", ":"]},
        {"dynatemp_exponent": 1.0, "mirostat_tau": 5.0, "mirostat_eta": 0.1, "top_n_sigma": -1, "adaptive_target": -1},
        {"n_discard": 0, "n_indent": 0, "n_cache_reuse": 0, "t_max_predict_ms": 0, "reasoning_format": "none"},
        # vLLM, SGLang, Ollama, Open WebUI, text-generation-webui
        {"include_reasoning": True, "separate_reasoning": True, "stream_reasoning": True, "rid": "a", "keep_alive": -1},
        {"session_id": "a", "chat_id": "b", "thinking": {"type": "disabled"}, "enable_thinking": False},
        {"encoder_repetition_penalty": 1, "no_repeat_ngram_size": 0, "penalty_alpha": 0, "guidance_scale": 1},
        {"repetition_penalty_range": 1024, "repetition_penalty": 1.0, "smoothing_curve": 1, "num_beams": 1},
        {"stop": ["", None]},
        {"stream": True, "stream_options": {"include_obfuscation": True, "continuous_usage_stats": False}},
    ],
)
@pytest.mark.parametrize(("form", "given"), [(ChatRequest, {"messages": CHAT}), (CompletionRequest, PROMPT)])
def test_what_asks_for_nothing_passes(form, given, body):
    off = {"presence_penalty": 0, "repetition_penalty": 1, "stop": []}
    asked, plain = (form.model_validate({**given, **more}) for more in (body, {}))
    for name in form.model_fields:
        if name not in ("stream", "stream_options", "best_of"):
            value = getattr(asked, name)
            assert value == getattr(plain, name) or (name in body and value == off[name])


def test_a_list_of_stops_loses_what_is_empty():
    assert ChatRequest.model_validate({"messages": CHAT, "stop": ["", "a", None]}).stop == ["a"]


@pytest.mark.parametrize(
    ("form", "body"),
    [
        (ChatRequest, {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "top_logprobs": 0}),
        (ChatRequest, {"response_format": {}, "logprobs": False, "max_completion_tokens": None}),
        (ChatRequest, {"functions": [], "function_call": "none", "tool_choice": None}),
        (ChatRequest, {"tool_choice": "none", "chat_template_kwargs": {}, "documents": []}),
        (ChatRequest, {"add_generation_prompt": True, "continue_final_message": False}),
        (ChatRequest, {"max_tokens": 5, "max_completion_tokens": 5}),
        (CompletionRequest, {"top_logprobs": 0, "tool_choice": "none", "response_format": {"type": "text"}}),
        (CompletionRequest, {"tool_choice": "auto", "tools": [], "parallel_tool_calls": True, "messages": []}),
        (CompletionRequest, {"logprobs": False}),
        (CompletionRequest, {"n": 2, "best_of": 2}),
    ],
)
def test_what_asks_for_nothing_of_one_endpoint_passes(form, body):
    form.model_validate({"messages": CHAT, **body} if form is ChatRequest else {**PROMPT, **body})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("web_search_options", {"a": 1}), ("audio", {"voice": "a"}), ("prediction", {"type": "content"})),
        *(("modalities", ["text", "audio"]), ("modalities", []), ("best_of", 3), ("echo", True), ("suffix", "x")),
        *(("ignore_eos", True), ("min_tokens", 1), ("min_tokens", False), ("skip_special_tokens", False)),
        *(("guided_json", {"type": "object"}), ("use_beam_search", True), ("length_penalty", 2), ("mirostat", 2)),
        *(("reasoning_effort", "high"), ("cache_salt", "x"), ("n_predict", 5), ("samplers", ["top_k"])),
        *(("dry_multiplier", 0.8), ("xtc_probability", 0.5), ("thinking", {"type": "enabled"}), ("n_indent", 4)),
        *(("reasoning_format", "deepseek"), ("t_max_predict_ms", 500), ("adaptive_target", 0.5)),
        *(("functions", [{"name": "a"}]), ("moderation", {"model": "m"}), ("top_a", 1), ("a b", 1), ("x" * 200, 1)),
    ],
)
@pytest.mark.parametrize(("form", "given"), [(ChatRequest, {"messages": CHAT}), (CompletionRequest, PROMPT)])
def test_what_cannot_be_done_is_refused_by_name(form, given, name, value):
    fault = refusal(form, {**given, name: value})
    assert fault.param[:70] == name[:70] or fault.param.startswith(name[:30])
    assert fault.param in fault.message
    assert len(fault.message) < 200


@pytest.mark.parametrize(
    ("form", "body", "param"),
    [
        (ChatRequest, {"messages": [{"role": "user", "content": "a"}, {"role": "user", "x": 1}]}, "messages[1].x"),
        (ChatRequest, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (ChatRequest, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0]"),
        (
            ChatRequest,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
        ),
        (ChatRequest, {"messages": [{"role": "assistant", "audio": {"id": "a"}}]}, "messages[0]"),
        (ChatRequest, {"messages": None}, "messages"),
        (ChatRequest, {"messages": []}, "messages"),
        (ChatRequest, {"messages": CHAT, "tool_choice": {"type": "function"}}, "tool_choice.function"),
        (ChatRequest, {"messages": CHAT, "tool_choice": "required"}, "tool_choice"),
        (ChatRequest, {"messages": CHAT, "top_logprobs": 2}, "top_logprobs"),
        (ChatRequest, {"messages": CHAT, "max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        (ChatRequest, {"messages": CHAT, "stream_options": {"include_usage": True}}, "stream_options"),
        (ChatRequest, {"messages": CHAT, "response_format": {"type": "json_schema"}}, "response_format"),
        (ChatRequest, {"messages": CHAT, "stop": [3]}, "stop[0]"),
        (ChatRequest, {"messages": CHAT, "temperature": "hot"}, "temperature"),
        (ChatRequest, {"messages": CHAT, "presence_penalty": 1, "repeat_last_n": 64}, "repeat_last_n"),
        (CompletionRequest, {"prompt": "a", "response_format": {"type": "json_object"}}, "response_format"),
        (CompletionRequest, {"prompt": "a", "tool_choice": "required"}, "tool_choice"),
        (CompletionRequest, {"prompt": [0.5]}, "prompt[0]"),
        (CompletionRequest, {"prompt": "a", "logprobs": True}, "logprobs"),
        (TokenizeRequest, {"text": None, "messages": None}, "text"),
        (SessionRequest, {"name": "a"}, "messages"),
    ],
)
def test_faults_name_the_requests_own_field(form, body, param):
    assert refusal(form, body).param == param


CALL = {"name": "boss", "arguments": {"person": "Zürich"}}
CALLED = {"type": "function", "function": CALL}
AS_TEXT = {"name": "boss", "arguments": '{"person": "Zürich"}'}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        # the openai package's model_dump of an answer
        (
            {"content": "Ana.", "refusal": None, "annotations": None, "audio": None, "function_call": None,
             "tool_calls": None, "parsed": None},
            {"content": "Ana."},
        ),
        # vLLM
        (
            {"content": "Ana.", "refusal": None, "annotations": None, "audio": None, "function_call": None,
             "tool_calls": [], "reasoning": None, "reasoning_content": None},
            {"content": "Ana."},
        ),
        ({"content": "Ana.", "reasoning": "Hm.", "tool_calls": []}, {"content": "Ana.", "reasoning_content": "Hm."}),
        ({"content": None, "reasoning_content": "Hm."}, {"content": "", "reasoning_content": "Hm."}),
        ({"content": None, "tool_calls": [{"id": "x", **CALLED, "function": AS_TEXT}]},
         {"content": None, "tool_calls": [{"id": "x", **CALLED}]}),
        # llama.cpp
        ({"content": None, "tool_calls": [{"type": "function", "function": AS_TEXT, "id": ""}]},
         {"content": None, "tool_calls": [{"id": "", **CALLED}]}),
        # OpenAI
        ({"content": "Ana.", "annotations": [{"type": "url_citation"}], "refusal": None}, {"content": "Ana."}),
        ({"content": None, "refusal": "I cannot."}, {"content": "I cannot."}),
        ({"content": [{"type": "refusal", "refusal": "I cannot."}]},
         {"content": [{"type": "text", "text": "I cannot."}]}),
        ({"content": None, "audio": {"id": "a", "data": "AA", "expires_at": 1, "transcript": "Hi"}}, {"content": "Hi"}),
        ({"content": None, "function_call": AS_TEXT}, {"content": None, "tool_calls": [CALLED]}),
        ({"content": None}, {"content": ""}),
        ({"content": ""}, {"content": ""}),
        ({}, {"content": ""}),
        # collected from a stream; LiteLLM; OpenRouter; .parse of the openai package; arguments as an object
        ({"tool_calls": [{"index": 0, "id": "x", "type": "function", "function": AS_TEXT}]},
         {"content": None, "tool_calls": [{"id": "x", **CALLED}]}),
        ({"content": "a", "provider_specific_fields": {"x": 1}, "thinking_blocks": [], "id": "x"}, {"content": "a"}),
        ({"content": "a", "reasoning": "b", "reasoning_details": [{"text": "b"}]},
         {"content": "a", "reasoning_content": "b"}),
        ({"content": "a", "thinking": "b"}, {"content": "a", "reasoning_content": "b"}),
        ({"content": "{}", "parsed": {}, "tool_calls": [{**CALLED, "function": {**AS_TEXT, "parsed_arguments": {}}}]},
         {"content": "{}", "tool_calls": [CALLED]}),
        ({"tool_calls": [CALLED]}, {"content": None, "tool_calls": [CALLED]}),
        ({"content": "a", "cache_control": {"type": "ephemeral"}}, {"content": "a"}),
        # Perplexity, Anthropic, Copilot, clients that keep their own notes
        ({"content": "a", "citations": ["x"], "metadata": {"x": 1}, "timestamp": 3, "index": 0}, {"content": "a"}),
        ({"content": "a", "signature": "x", "encrypted_content": "y", "reasoning_opaque": "z", "status": "completed",
          "finish_reason": "stop", "providerOptions": {"x": {}}}, {"content": "a"}),
        ({"content": [{"type": "text", "text": "a", "prompt_cache_breakpoint": {"mode": "explicit"}, "id": "x",
                       "index": 0, "providerOptions": {"x": {}}, "citations": [{}]}]},
         {"content": [{"type": "text", "text": "a"}]}),
    ],
)  # fmt: skip
def test_every_field_of_an_answer_comes_back(message, expected):
    form = ChatRequest.model_validate({"messages": [*CHAT, {"role": "assistant", **message}, *CHAT]})
    (_, made, _) = messages_of(form.messages)
    assert made == {"role": "assistant", **expected}


def test_every_field_of_the_openai_package_is_known():
    """Of messages and of parts that are text: whatever its types define may come."""
    types = openai.types.chat
    for typed in (types.ChatCompletionContentPartTextParam, types.ChatCompletionContentPartRefusalParam):
        assert {*get_type_hints(typed)} <= {*TextPart.model_fields} | TextPart.changes_nothing
    roles = ("Assistant", "Developer", "Function", "System", "Tool", "User")
    messages = [getattr(types, f"ChatCompletion{role}MessageParam") for role in roles]
    for names in [*map(get_type_hints, messages), types.ChatCompletionMessage.model_fields]:
        assert {*names} <= {*ChatMessage.model_fields} | ChatMessage.changes_nothing


def test_results_of_the_older_form_of_tools_come_back():
    form = ChatRequest.model_validate({"messages": [{"role": "function", "name": "boss", "content": "Ben"}]})
    assert messages_of(form.messages) == [{"role": "tool", "name": "boss", "content": "Ben"}]


def history(**function):
    called = {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "a", **function}}]}
    return {"messages": [*CHAT, called]}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        *(("", {}), (" \n", {}), (None, {}), ("null", {}), ("{}", {}), ({}, {}), ({"x": [1]}, {"x": [1]})),
        ('{"x": 1e999, "y": -2.5e400}', {"x": 10**999, "y": -25 * 10**399}),
        ('{"x": 123456789012345678901234567890}', {"x": 123456789012345678901234567890}),
        ('{"x": 1e5000, "y": 1e99999999999999999999}', {"x": "1e5000", "y": "1e99999999999999999999"}),
        ('{"x": ' + "9" * 5000 + "}", {"x": "9" * 5000}),
        (r'{"x\ud800": "\udc00 \ud83d\ude00"}', {"x\ufffd": "\ufffd \U0001f600"}),
    ],
)
def test_arguments_of_earlier_calls_reach_the_template_as_objects(arguments, expected):
    for body in [history(arguments=arguments), *([history()] if arguments is None else [])]:
        (_, message) = messages_of(ChatRequest.model_validate(body).messages)
        assert message["tool_calls"][0]["function"]["arguments"] == expected


@pytest.mark.parametrize(
    "arguments",
    [
        *("NaN", '{"x": NaN}', '{"x": -Infinity}', "[1]", "3", "{", "Ana", '{"x": 1} 2', "[" * 50_000),
        *(3, float("nan"), [], True, {"x": float("nan")}, {"x": [float("inf")]}, '{"x":' * 41 + "1" + "}" * 41),
    ],
)
def test_arguments_that_are_no_object_are_refused(arguments):
    fault = refusal(ChatRequest, history(arguments=arguments))
    assert fault.param == "messages[1].tool_calls[0].function.arguments"
    assert "must be a JSON object, or its text" in fault.message


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
numbers = st.sampled_from(["1e999", "-1.50", "1E2", "0.10", "12345678901234567890123", "1e5000"])
arguments = (
    st.tuples(st.dictionaries(st.text(max_size=5), json_values, max_size=3), st.booleans()).map(
        lambda pair: json.dumps(pair[0], ensure_ascii=pair[1])
    )
    | numbers.map(lambda text: f'{{ "x":{text}, "x" : [{text}] }}')
    | st.sampled_from(["{}", r'{"x": "\ud800"}', '{"x": NaN}', "[]", '{"a":' * 60 + "1" + "}" * 60])
)
names = st.sampled_from(["boss", "Zürich", "", r"\ud83d", r"\ud83d\ude00"])
pieces = (
    st.builds('<tool_call>\n{{"name": "{}", "arguments": {}}}\n</tool_call>'.format, names, arguments)
    | st.sampled_from(["", " ", "\n", "Ana.", "<tool_call>", "</tool_call>", '{"name": "boss"', "a < b, <tool"])
    | st.text(max_size=5)
)


@given(
    st.lists(pieces, max_size=4).map("".join), st.booleans(), st.sampled_from([1, 7, 1000]), st.sampled_from([1, None])
)
def test_every_answer_can_be_sent_again(text, with_tools, size, max_calls):
    """Whole or collected from a stream: written as JSON, read by the forms, rendered by a template."""
    result = GenerationResult(text, (5,), "stop", 1, (1,), 3, 0, Timings(1, 1, 1, 1), 1, 1, None, None)
    whole = Writer(None, "m", True, False, with_tools, max_calls).whole([result], 1)["choices"][0]
    stream = Writer(None, "m", True, False, with_tools, max_calls)
    parts = [text[start : start + size] for start in range(0, len(text), size)]
    chunks = [stream.first(0), *(stream.part(0, Part(part, (5,), (1,), ())) for part in parts), *stream.last(0, result)]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    collected = {
        "role": "assistant",
        "content": "".join(delta.get("content") or "" for delta in deltas),
        "tool_calls": [call for delta in deltas for call in delta.get("tool_calls", ())],
    }
    functions = [call["function"] for call in collected["tool_calls"]]
    assert functions == [call["function"] for call in whole["message"].get("tool_calls", ())]
    assert collected["content"].strip() == (whole["message"]["content"] or "").strip()
    assert whole["finish_reason"] == chunks[-1]["choices"][0]["finish_reason"]
    assert len(functions) <= (max_calls or 100)
    for function in functions:
        assert function["arguments"] in text
    for message in (whole["message"], collected):
        body = json.dumps({"messages": [*CHAT, message, *CHAT]}, allow_nan=False, ensure_ascii=False).encode()
        form = ChatRequest.model_validate(json.loads(body))
        rendered = TEMPLATE.render(check_messages(messages_of(form.messages), False), TOOLS)
        assert "Infinity" not in rendered.replace(text, "")
