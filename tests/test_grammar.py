"""L0: grammars over tokenizers of every family, what schemas mean, and processes that end alone."""

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import MELT_TINY
from tokenizers_of_kinds import KINDS

from melt_runtime.errors import QueueError
from melt_runtime.request import grammar as module
from melt_runtime.request import json_schema
from melt_runtime.request.grammar import GrammarError, GrammarPart, Grammars
from melt_runtime.request.grammar_host import GrammarHost
from melt_runtime.request.grammar_lark import prepare_lark
from melt_runtime.request.json_schema import prepare_schema
from melt_runtime.serve.forms import Tool
from melt_runtime.serve.tools import call_grammar
from melt_runtime.text.codec import TextCodec

PATTERNS = (
    r"<tool_call>[a-z]{1,5}",
    r'<tool_call>\n\{"name": "(weather|zoo)"\}\n</tool_call>',
    r"( [a-z]{1,3}){2}",
    r"Zürich|é+|ﬁT",
    r"(<tool_call>|a)+T?",
)


def open_grammars(tokenizer) -> Grammars:
    return Grammars(TextCodec(tokenizer, None), tokenizer.get_vocab_size(), [tokenizer.token_to_id("<|end|>")])


@pytest.fixture(scope="module")
def plain():
    """Grammars over a byte-level tokenizer, and that tokenizer."""
    tokenizer = KINDS["byte-level"](False)
    grammars = open_grammars(tokenizer)
    yield grammars, tokenizer
    grammars.close()


def allowed(processor, ids, vocab_size) -> list[int]:
    return np.flatnonzero(np.isfinite(processor(ids, np.zeros(vocab_size, np.float32)))).tolist()


def refusal(processor, ids, size) -> str:
    """Why a processor does not follow so many tokens; empty where it does."""
    try:
        processor(ids, np.zeros(size, np.float32))
    except GrammarError as error:
        return str(error)
    return ""


def accepts(plain, grammar, text: str) -> bool:
    """Whether a whole text is one of the grammar's."""
    tokenizer = plain[1]
    size, ids, processor = tokenizer.get_vocab_size(), tokenizer.encode(text).ids, grammar.processor()
    if "the answer left its grammar" in refusal(processor, ids, size):
        return False
    return tokenizer.token_to_id("<|end|>") in allowed(processor, ids, size)


def draw_answer(grammar, size, end) -> list[int] | None:
    """A random answer; None where the vocabulary cannot write one. Early on every token that is offered is tried."""
    random = np.random.default_rng(0)
    processor, ids = grammar.processor(), []
    while not (problem := refusal(processor, ids, size)):
        offered = allowed(processor, ids, size)
        for token in {*offered} - {end} if len(ids) < 6 else ():
            assert "the answer left its grammar" not in refusal(processor, [*ids, token], size)
        token = end if end in offered and len(ids) > 4 else int(random.choice(offered))
        if token == end:
            return ids
        ids.append(token)
    assert "no token of this model continues" in problem
    return None


@pytest.mark.parametrize("is_special", [False, True], ids=["added", "special"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_grammar_offers_it_takes_and_the_text_matches(kind, is_special):
    tokenizer = KINDS[kind](is_special)
    size, end = tokenizer.get_vocab_size(), tokenizer.token_to_id("<|end|>")
    before = tokenizer.token_to_id("zoo")
    grammars = open_grammars(tokenizer)
    texts = {}
    for pattern in PATTERNS:
        ids = draw_answer(grammars.compile("regex", pattern), size, end)
        if ids is not None:
            # After a word, as an answer stands after its prompt.
            texts[pattern] = tokenizer.decode([before, *ids]).removeprefix(tokenizer.decode([before]))
    grammars.close()
    assert texts
    assert [pattern for pattern, text in texts.items() if not re.fullmatch(pattern, text)] == []


@pytest.mark.parametrize("is_special", [False, True], ids=["added", "special"])
def test_a_call_is_written_with_the_tokens_of_its_markers(is_special):
    tokenizer = KINDS["byte-level"](is_special)
    inner = {"properties": {"x": {"const": 1}}, "required": ["x"], "additionalProperties": False}
    parameters = {"$ref": "#/$defs/P", "$defs": {"P": inner}}  # references stay within the parameters
    tool = Tool.model_validate({"type": "function", "function": {"name": "f", "parameters": parameters}})
    answer = GrammarPart("answer", "regex", "[0-9]+")
    grammars = open_grammars(tokenizer)
    size, end = tokenizer.get_vocab_size(), tokenizer.token_to_id("<|end|>")
    marker = tokenizer.token_to_id("<tool_call>")
    must = grammars.compile_parts(call_grammar([tool], None, TextCodec(tokenizer, None)))
    may = grammars.compile_parts(call_grammar([tool], None, TextCodec(tokenizer, None), answer))
    ids = tokenizer.encode('<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>').ids
    assert ids[0] == marker
    first = {tokenizer.id_to_token(token) for token in allowed(must.processor(), [], size)}
    assert first == ({"<tool_call>"} if is_special else {"<tool_call>", "<"})
    for grammar in (must, may):
        assert allowed(grammar.processor(), ids, size) == [end]
    assert end in allowed(may.processor(), tokenizer.encode("12").ids, size)
    with pytest.raises(GrammarError, match="the answer left its grammar"):
        must.processor()(tokenizer.encode("12").ids, np.zeros(size, np.float32))
    named = grammars.compile("lark", 'start: <tool_call> "a"')  # llguidance's own way to name a token
    assert allowed(named.processor(), [], size) == [marker]
    grammars.close()


@pytest.mark.parametrize("has_fork", [True, False], ids=["fork", "spawn"])
def test_drafts_are_taken_back(plain, has_fork):
    """A draft that leaves the grammar, or goes on after its end, is an error of that draft alone."""
    if has_fork and not hasattr(os, "fork"):
        pytest.skip("no fork on this system")
    tokenizer = plain[1]
    own = open_grammars(tokenizer)
    own._host = GrammarHost(own._host._setup, has_fork)
    size, end = tokenizer.get_vocab_size(), tokenizer.token_to_id("<|end|>")
    processor = own.compile("regex", "[ab]{2}c|zz").processor()
    a, b, c, z = (tokenizer.token_to_id(letter) for letter in "abcz")
    expected = {(): {a, b, z}, (a,): {a, b}, (a, b): {c}, (z,): {z}, (b,): {a, b}, (a, a): {c}, (a, b, c): {end}}
    for ids in [(), (a,), (a, b), (a, b, c), (a,), (z,), (), (b,), (a, a), (a, b, c), ()]:
        assert set(allowed(processor, [*ids], size)) >= expected[ids]
        for wrong in ([*ids, c, z, z], [a, b, c, end, a]):
            with pytest.raises(GrammarError, match="the answer left its grammar|cannot be followed"):
                processor(wrong, np.zeros(size, np.float32))
    own.close()
    with pytest.raises(GrammarError, match="the grammar cannot be followed"):
        processor([a], np.zeros(size, np.float32))


@pytest.mark.parametrize("has_fork", [True, False], ids=["fork", "spawn"])
def test_large_vocabularies_reach_their_process(plain, has_fork):
    """Megabytes, more than a socket takes at once."""
    setup = plain[0]._host._setup
    words = [b"a%08d" % number for number in range(200_000)]
    host = GrammarHost(replace(setup, tokens=[*setup.tokens, *words]), has_fork and hasattr(os, "fork"))
    channel = host.open()
    channel.ask({"seconds": 10, "parts": [("main", "regex", "a0+[1-3]")]})
    _, _, mask = channel.ask({"seconds": 10, "answer": 0, "drop": 0, "add": [], "ended": []})
    bits = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little")[len(setup.tokens) :]
    assert np.flatnonzero(bits).tolist() == [0, 1, 2, 3]
    channel.close()
    host.close()


SLOW = json.dumps({"allOf": [{"type": "integer", "multipleOf": 97 + place} for place in range(4)]})
"""Takes minutes to compile."""


def test_a_grammar_that_costs_too_much_ends_alone(plain, monkeypatch):
    grammars, tokenizer = plain
    other = grammars.compile("regex", "[ab]+")
    processor = other.processor()
    size = tokenizer.get_vocab_size()
    before = allowed(processor, [], size)
    monkeypatch.setattr(module, "_QUICK_SECONDS", 0.02)
    monkeypatch.setattr(module, "_COMPILE_SECONDS", 0.05)
    with pytest.raises(GrammarError, match=r"cannot be compiled within 0.05 s and 512 MB, or crashes the compiler"):
        grammars.compile("json_schema", SLOW)
    monkeypatch.setattr(GrammarHost, "open", None)
    with pytest.raises(GrammarError, match="cannot be compiled within"):  # its error is kept
        grammars.compile("json_schema", SLOW)
    assert grammars.compile("regex", "[ab]+") is other
    assert allowed(processor, [], size) == before


def test_a_process_that_cannot_be_started_is_no_fault_of_the_grammar(plain, monkeypatch):
    """Nor kept as one."""

    def fail(*_, **__):
        raise OSError(24, "Too many open files")

    grammars = Grammars(TextCodec(plain[1], None), plain[1].get_vocab_size(), [plain[1].token_to_id("<|end|>")])
    monkeypatch.setattr(subprocess, "Popen", fail)
    with pytest.raises(QueueError, match=r"cannot be started \(\[Errno 24\] Too many open files\); retry later"):
        grammars.compile("regex", "[ab]+")
    monkeypatch.undo()
    assert accepts(plain, grammars.compile("regex", "[ab]+"), "ab")
    os.kill(grammars._host._process.pid, signal.SIGKILL)  # it is started again
    grammars._host._process.wait()
    assert accepts(plain, grammars.compile("regex", "[bc]+"), "bc")
    grammars.close()


def test_rules_are_chained_so_deep_and_no_deeper():
    def chain(rules: int, name: str) -> str:
        lines = [f"start: {name}0", *(f'{name}{place}: {name}{place + 1} | "x"' for place in range(rules))]
        return "\n".join([*lines, f'{name}{rules}: "z"'])

    for name in ("r", "T"):
        prepare_lark(chain(498, name), {})
        with pytest.raises(ValueError, match="at most 500 rules or terminals, one inside another, got 3002"):
            prepare_lark(chain(3000, name), {})
    for hostile in ('"' + '\\"' * 30_000, "/" + "\\/" * 30_000, "a" * 60_000, "[" * 60_000, "", ":"):
        prepare_lark(hostile, {})
    text = 'start: "<m> a: b" /<m>/ r // <m>\nr: start | "x" | <m>\n'
    assert prepare_lark(text, {"<m>": 7}) == text[:-4] + "<[7]>\n"


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs pidfd_open")
def test_nothing_is_left_of_a_server_that_was_killed():
    script = """if True:
        import sys, time
        from melt_runtime.request.grammar import Grammars
        from melt_runtime.text.codec import TextCodec
        from pathlib import Path
        codec = TextCodec.read(Path(sys.argv[1]))
        grammars = Grammars(codec, codec.tokenizer.get_vocab_size(), [3])
        kept = grammars.compile("regex", "[ab]+")
        print(grammars._host._process.pid, flush=True)
        time.sleep(600)
    """
    server = subprocess.Popen([sys.executable, "-c", script, str(MELT_TINY)], stdout=subprocess.PIPE)
    main = int(server.stdout.readline())
    forks = Path(f"/proc/{main}/task/{main}/children").read_text().split()
    assert len(forks) == 1
    ended = [os.pidfd_open(pid) for pid in (main, int(forks[0]))]
    server.send_signal(signal.SIGKILL)
    server.communicate()
    for descriptor in ended:
        assert select.select([descriptor], [], [], 60)[0]
        os.close(descriptor)


CAT = {"type": "object", "properties": {"kind": {"const": "cat"}}, "required": ["kind"]}
DOG = {"type": "object", "properties": {"kind": {"enum": ["dog"]}}, "required": ["kind"]}
SCHEMAS = {
    "format as annotation": ({"format": "byte", "type": "string", "maxLength": 1}, ['"a"'], ['"aa"']),
    "format enforced": ({"format": "date", "type": "string"}, ['"2020-01-02"'], ['"a"']),
    "format of a number": ({"type": "integer", "format": "int64"}, ["12"], ['"a"']),
    "nullable": ({"type": "string", "nullable": True, "enum": ["a"]}, ['"a"', "null"], ['"b"']),
    "nullable reference": (
        {
            "$ref": "#/components/schemas/A",
            "nullable": True,
            "components": {"schemas": {"A": {"format": "x", "const": 1}}},
        },
        ["1", "null"],
        ["2"],
    ),
    "exclusive as in draft 4": ({"type": "integer", "minimum": 3, "exclusiveMinimum": True}, ["4"], ["3"]),
    "tuple as in draft 7": (
        {"type": "array", "items": [{"const": 1}], "additionalItems": False, "minItems": 1},
        ["[1]"],
        ["[1, 1]", "[]"],
    ),
    "never": ({"properties": {"x": {"not": {}}}, "type": "object"}, ['{"y": 1}'], ['{"x": 1}']),
    "keys of a record": ({"type": "object", "propertyNames": {"type": "string"}}, ['{"a": 1}'], ["1"]),
    "discriminated union": (
        {"oneOf": [{"$ref": "#/$defs/C"}, {"$ref": "#/$defs/D"}], "$defs": {"C": CAT, "D": DOG}},
        ['{"kind": "cat"}', '{"kind": "dog"}'],
        ['{"kind": "cow"}'],
    ),
    "reference into a union": (
        {
            "type": "object",
            "properties": {"a": {"oneOf": [CAT, {"type": "null"}]}, "b": {"$ref": "#/properties/a/oneOf/0"}},
        },
        ['{"b": {"kind": "cat"}}'],
        ['{"b": null}'],
    ),
    "a long chain of references": (
        {
            "$ref": "#/$defs/0",
            "$defs": {"1200": {"const": 1}} | {str(n): {"$ref": f"#/$defs/{n + 1}"} for n in range(1200)},
        },
        ["1"],
        ["2"],
    ),
    "types exclude each other": ({"oneOf": [{"type": "integer"}, {"type": "null"}]}, ["1", "null"], ['"a"']),
    "both anyOf and oneOf": (
        {"anyOf": [{"enum": [1, 2]}], "oneOf": [{"const": 1}, {"const": "a"}]},
        ["1"],
        ["2", '"a"'],
    ),
    "a property that a pattern also matches": (
        {
            "type": "object",
            "properties": {"ab": {"type": "string"}},
            "patternProperties": {"^a": {"maxLength": 1}},
            "required": ["ab"],
        },
        ['{"ab": "x"}', '{"ab": "x", "abc": "y"}'],
        ['{"ab": "xx"}', '{"ab": "x", "ac": "yy"}'],
    ),
    "large numbers": ({"enum": [9007199254740991, 1e22, 0.1]}, ["9007199254740991", "0.1"], ["9007199254740990"]),
    "counts that say nothing": (
        {
            "type": "object",
            "properties": {"a": {}},
            "minProperties": 0,
            "maxProperties": 1,
            "additionalProperties": False,
        },
        ["{}", '{"a": 1}'],
        ['{"b": 1}'],
    ),
    "true": (True, ["[]", "1"], ["x"]),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_mean_what_they_say_strict_or_not(plain, name):
    schema, right, wrong = SCHEMAS[name]
    for strict in (False, True):
        grammar = plain[0].compile_parts([GrammarPart("main", "json_schema", json.dumps(schema), strict)])
        assert [text for text in right + wrong if accepts(plain, grammar, text)] == right


UNENFORCED = {
    "items.uniqueItems": ({"items": {"type": "array", "uniqueItems": True}, "type": "array"}, "[[1, 1]]"),
    "propertyNames": ({"type": "object", "propertyNames": {"pattern": "^a"}}, '{"b": 1}'),
    "dependentRequired, if, then": (
        {"type": "object", "dependentRequired": {"a": ["b"]}, "if": {"required": ["a"]}, "then": {"required": ["b"]}},
        '{"a": 1}',
    ),
    "not": ({"type": "integer", "not": {"const": 1}}, "1"),
    "oneOf": ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "1"),
    "pattern": ({"type": "string", "pattern": r"^(?!a)\w+$"}, '"a"'),
    "patternProperties.^(?=a)": (
        {"type": "object", "patternProperties": {"^(?=a)": {"type": "null"}}, "additionalProperties": False},
        '{"b": 1}',
    ),
    "maximum": ({"type": "integer", "maximum": 2**63 - 1}, "1"),
    "multipleOf": ({"type": "integer", "multipleOf": 10**12}, "1"),
    "minProperties": ({"type": "object", "properties": {"a": {}}, "minProperties": 1}, "{}"),
    "#/x.unevaluatedProperties": ({"$ref": "#/x", "x": {"type": "object", "unevaluatedProperties": False}}, '{"a": 1}'),
}


@pytest.mark.parametrize("name", UNENFORCED)
def test_what_cannot_be_enforced_is_left_out_or_refused_by_name(plain, name):
    schema, text = UNENFORCED[name]
    assert accepts(plain, plain[0].compile("json_schema", json.dumps(schema)), text)
    part = GrammarPart("main", "json_schema", json.dumps(schema), True, "response_format")
    with pytest.raises(GrammarError) as failure:
        plain[0].compile_parts([part])
    assert str(failure.value) == (
        f"response_format cannot be compiled: with strict it must leave out what cannot be enforced: {name}"
    )


def test_patterns_that_overlap_are_left_out_where_not_strict(plain):
    schema = {"type": "object", "patternProperties": {"^a": {"type": "null"}, "b$": {"const": 1}}}
    assert accepts(plain, plain[0].compile("json_schema", json.dumps(schema)), '{"ab": 2}')
    with pytest.raises(GrammarError, match="are not disjoint"):
        plain[0].compile_parts([GrammarPart("main", "json_schema", json.dumps(schema), True)])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            '{"enum": [12345678901234567890]}',
            "enum must not hold numbers of more than 15 digits, got 12345678901234567890",
        ),
        ('{"properties": {"x": {"const": {"y": 0.12345678901234567890}}}}', "properties.x.const must not hold numbers"),
        ('{"enum": [1e999]}', "enum must not hold numbers"),
        ('{"items": 3}', "items must be a schema"),
        ("[" * 100_000, "nested too deeply"),
        ('{"items":' * 200 + "{}" + "}" * 200, "nested at most 100 deep"),
        ("3", "a schema must be an object, true or false"),
        ('{"default": 1e999}', "JSON"),
    ],
)
def test_what_is_no_schema_says_why(source, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        prepare_schema(source)


ODD = (None, True, 0, -1, 1.5, 1e400, "", "x", [], ["x"], [[]], [None], {}, {"x": []}, {"type": 3}, [{}], [{"enum": 1}])


@pytest.mark.parametrize("more", [{}, {"nullable": True}, {"type": "object", "properties": {"a": {}}}], ids=str)
@pytest.mark.parametrize(
    "keyword",
    sorted({*json_schema._CONSTRAINTS, "$ref", "nullable", "uniqueItems", "propertyNames", "not", "dependencies"}),
)
def test_a_keyword_of_another_type_is_a_fault_of_the_schema(keyword, more):
    for odd in ODD:
        for schema in ({**more, keyword: odd}, {"properties": {"a": {**more, keyword: odd}}}):
            for strict in (True, False):
                with contextlib.suppress(ValueError):  # any other error is ours
                    json.loads(prepare_schema(json.dumps(schema), strict))


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ({"type": "object", "required": None, "properties": None}, {"type": "object"}),
        ({"minimum": None, "format": [], "$ref": None, "items": None}, {}),
        ({"const": None, "default": None, "enum": [None]}, {"const": None, "default": None, "enum": [None]}),
        ({"properties": {"a": {"type": None}}}, {"properties": {"a": {}}}),
        ({"type": True, "nullable": True}, {"type": True}),
    ],
)
def test_keywords_that_are_null_are_absent(given, made):
    assert json.loads(prepare_schema(json.dumps(given), strict=True)) == made


def test_hostile_schemas_cost_time_in_proportion_to_their_size():
    prepare_schema(json.dumps({"pattern": "[" * 60_000}))
    level = {"type": "object"}
    for _ in range(3):
        level = {"type": "object", "required": [*"abcdefgh"], "properties": dict.fromkeys("abcdefgh", level)}
    prepare_schema(json.dumps({"oneOf": [level] * 20}), strict=False)
