"""Answers that follow a grammar, asked for in Python and on the command line: each matches, or the request fails."""

import asyncio
import json
import re

import pytest

from melt_runtime import AsyncMeltModel, BatchError, GenerationConfig, MeltModel
from melt_runtime.cli.main import main
from melt_runtime.request.generation_files import read_generation_config

QUESTION = "Ana reports to Ben. Who is one level above Ana?"
SCHEMA = {
    "type": "object",
    "properties": {"boss": {"enum": ["Ben", "Ana"]}, "level": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["boss", "level"],
    "additionalProperties": False,
}
NAMES = 'start: NAME ("," NAME)*\nNAME: "Ben" | "Zoë"'
FORMS = {"json_schema": SCHEMA, "regex": "(Zoë|Ben) [0-9]{3}", "lark": NAMES}
MODES = (
    {},
    {"loops": 1, "temperature": 1.5, "seed": 3},
    {"loops": "auto", "exit_rule": "settled"},
    {"loops": 4, "decode": "wave", "lag": 2},
    {"temperature": 1.0, "seed": 1, "logit_bias": {7: 100}},
)


@pytest.fixture(scope="module")
def model(tiny_bundle) -> MeltModel:
    return MeltModel.load(tiny_bundle, device="cpu", capacity=200, slots=3)


def matches(kind: str, text: str) -> bool:
    if kind == "json_schema":
        said = json.loads(text)
        return {*said} == {"boss", "level"} and said["boss"] in ("Ben", "Ana") and said["level"] in range(1, 10)
    return re.fullmatch(FORMS["regex"] if kind == "regex" else "(Ben|Zoë)(,(Ben|Zoë))*", text) is not None


def bounded(kind: str) -> dict:
    """Lark's grammar has no longest text: a bias keeps it from going on."""
    return {"max_new_tokens": 120, kind: FORMS[kind] if kind != "lark" else NAMES.replace(")*", ")~0..3")}


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("kind", FORMS)
def test_an_answer_matches_however_it_is_asked_for(model, kind, mode):
    asked = {**bounded(kind), **mode}
    alone = model.generate(QUESTION, **asked)
    assert alone.finish_reason == "stop"
    assert matches(kind, alone.text)
    assert model.new_session().generate(QUESTION, **asked).text == alone.text
    assert "".join(model.stream(QUESTION, **asked)) == alone.text
    assert [one.text for one in model.generate_batch([QUESTION] * 4, **asked)] == [alone.text] * 4
    plain = model.generate(QUESTION, max_new_tokens=4).text
    mixed = model.generate_batch([QUESTION] * 2, [GenerationConfig(**asked), GenerationConfig(max_new_tokens=4)])
    assert [one.text for one in mixed] == [alone.text, plain]


def test_an_event_loop_is_not_held_by_a_compilation(model):
    async def run():
        async with AsyncMeltModel(model) as asynchronous:
            return await asyncio.gather(*(asynchronous.generate(QUESTION, **bounded(kind)) for kind in FORMS))

    assert [matches(kind, one.text) for kind, one in zip(FORMS, asyncio.run(run()), strict=True)] == [True] * 3


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"regex": "(["}, "regex cannot be compiled"),
        ({"json_schema": "["}, "json_schema must be a JSON schema: an object, or its text, got '\\['"),
        ({"json_schema": [1]}, r"json_schema must be a JSON schema: an object, or its text, got \[1\]"),
        ({"json_schema": {"x": {1}}}, "json_schema must be a JSON schema"),
        ({"json_schema": {"type": "array", "uniqueItems": True}}, "json_schema cannot be compiled.*uniqueItems"),
        ({"lark": "start"}, "lark cannot be compiled"),
        ({"lark": ""}, "lark must be a non-empty string, got ''"),
        ({"regex": "a", "lark": "start: /b/"}, "one of json_schema, regex, lark may be said, got regex and lark"),
        ({"regex": "a", "stop_ids": ()}, r"stop_ids must have the bundle's with regex.*missing: \["),
        ({"regex": "a" * 70_000}, "a grammar may have 65536 bytes, got 70000"),
    ],
    ids=str,
)
def test_what_is_no_grammar_is_refused_before_anything_is_computed(model, asked, message):
    before = model.generate(QUESTION, max_new_tokens=3)
    held = model.session.token_ids
    for ask in (model.generate, model.stream, model.new_session().generate):
        with pytest.raises(ValueError, match=message):
            ask(QUESTION, **asked)
    assert model.session.token_ids == held
    assert model.generate(QUESTION, max_new_tokens=3).token_ids == before.token_ids


def test_an_answer_that_leaves_its_grammar_fails_alone(model):
    """A caller's own processor leaves only what the grammar does not allow yet."""

    def end(ids, logits):
        logits[:] = float("-inf")
        logits[[*model.defaults.stop_ids]] = 0.0
        return logits

    impossible = GenerationConfig(regex="Z", logits_processors=[end])
    with pytest.raises(BatchError) as raised:
        model.generate_batch([QUESTION] * 2, [impossible, GenerationConfig(max_new_tokens=3)])
    assert [*raised.value.errors] == [0]
    assert raised.value.results[1].token_ids == model.generate(QUESTION, max_new_tokens=3).token_ids


def test_what_is_said_last_holds_and_a_bundle_says_none(tmp_path):
    first = GenerationConfig(json_schema=SCHEMA)
    assert json.loads(first.json_schema) == SCHEMA
    assert first.with_changes(regex="a") == GenerationConfig(regex="a")
    assert GenerationConfig(temperature=1.0).over(first).json_schema == first.json_schema
    (tmp_path / "generation_config.json").write_text('{"regex": "a"}')
    with pytest.raises(Exception, match="'regex' is unknown"):
        read_generation_config(tmp_path / "generation_config.json")


def test_the_command_line_takes_texts_and_files(tiny_bundle, tmp_path, capsys):
    command = ["generate", str(tiny_bundle), QUESTION, "--quiet", "--device", "cpu"]
    for kind in FORMS:
        asked = bounded(kind)[kind]
        text = asked if isinstance(asked, str) else json.dumps(asked)
        (tmp_path / "grammar.txt").write_text(text, encoding="utf-8")
        given = [text] if kind == "regex" else [text, f"@{tmp_path / 'grammar.txt'}"]
        for one in given:
            assert main([*command, f"--{kind.replace('_', '-')}", one]) == 0
            assert matches(kind, capsys.readouterr().out.removesuffix("\n"))
    with pytest.raises(SystemExit):
        main([*command, "--lark", f"@{tmp_path / 'nowhere'}"])
    assert "nowhere cannot be read as text" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--lark", "x", "--regex", "a"])
    assert "not allowed with argument" in capsys.readouterr().err


def test_lines_of_a_batch_have_grammars_of_their_own(tiny_bundle, tmp_path, capsys):
    lines = [{"id": kind, "prompt": QUESTION, **bounded(kind)} for kind in FORMS]
    lines += [{"id": "bad", "prompt": QUESTION, "regex": "(["}, {"id": "free", "prompt": QUESTION, "regex": None}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    out = tmp_path / "answers.jsonl"
    assert main(["batch", str(tiny_bundle), str(tmp_path / "prompts.jsonl"), "--out", str(out), "--device", "cpu"]) == 1
    answers = {line["id"]: line for line in map(json.loads, out.read_text(encoding="utf-8").splitlines())}
    assert all(matches(kind, answers[kind]["text"]) for kind in FORMS)
    assert answers["free"]["text"] == "Ben."
    assert "regex cannot be compiled" in capsys.readouterr().err + str(answers.get("bad"))
