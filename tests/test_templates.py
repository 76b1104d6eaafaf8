"""L0: chat templates against transformers; templates that are programs of strangers; special tokens; messages."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from chat_templates import CONVERSATIONS, FAMILIES, TAKE_PARTS
from conftest import HANG, MELT_TINY
from hostile_templates import HOSTILE
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from melt_export.templates import chat_template
from melt_models import MeltConfig
from melt_runtime.errors import BundleError, TokenError
from melt_runtime.text.codec import TextCodec, read_template
from melt_runtime.text.messages import check_messages
from melt_runtime.text.templates import MAX_TEMPLATE_BYTES, ChatTemplate

TOKENIZER = Tokenizer.from_file(str(MELT_TINY / "tokenizer.json"))
HELLO = [{"role": "user", "content": "hi"}]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def write_settings(folder: Path, **settings) -> Path:
    folder.mkdir(exist_ok=True)
    shutil.copyfile(MELT_TINY / "tokenizer.json", folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def taken_over(folder: Path, config: MeltConfig | None = None) -> tuple[str, tuple[str, ...]]:
    faults: list[str] = []
    made = chat_template(folder, config or MeltConfig(), TOKENIZER, faults)
    assert faults == []
    return made


def faults_of(folder: Path) -> list[str]:
    faults: list[str] = []
    chat_template(folder, MeltConfig(), TOKENIZER, faults)
    return faults


def render(source: str, messages=HELLO) -> str:
    return ChatTemplate(source).render(messages)


def theirs(folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(folder)


# Renderings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_renderings_are_those_of_transformers(family, tmp_path):
    """From a checkpoint's folder; what transformers refuses is refused. Parts are joined where it prints lists."""
    write_settings(tmp_path, **TOKENS, chat_template=FAMILIES[family])
    codec = TextCodec(TOKENIZER, taken_over(tmp_path)[0])
    tokenizer = theirs(tmp_path)
    rendered = 0
    for name, messages in CONVERSATIONS.items():
        read = messages if family in TAKE_PARTS else joined(messages)
        for ending, flags in ENDINGS.items():
            if ending != "prompt" and (name == "long" or family == "filters"):  # which shows transformers' own mark
                continue
            try:
                expected = tokenizer.apply_chat_template(read, tokenize=False, **flags)
                if ending == "continue" and messages[-1]["role"] != "assistant":
                    raise ValueError("only an assistant's message is continued")
                if ending == "continue" and not messages[-1].get("content"):
                    raise ValueError("nothing to continue")
            except Exception:
                with pytest.raises(TokenError, match="the chat template refuses these messages: |be continued"):
                    codec.render(messages, ending=ending)
            else:
                assert codec.render(messages, ending=ending) == expected, (name, ending)
                rendered += 1
    assert rendered >= 6


def test_an_answer_of_which_a_part_is_left_out_is_not_continued():
    """Also where that part stands elsewhere in the chat."""
    source = "{% for m in messages %}{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}\n"
    said = "<think>hm</think>b"
    chat = [{"role": "user", "content": said}, {"role": "assistant", "content": said}]
    with pytest.raises(TokenError, match="cannot be continued: the chat template leaves a part of its text out"):
        ChatTemplate(source + "{% endfor %}").render(chat, ending="continue")
    chat[1] = {"role": "assistant", "content": "b "}
    assert ChatTemplate(source + "{% endfor %}").render(chat, ending="continue") == f"{said}\nb "


ENDINGS = {
    "prompt": {"add_generation_prompt": True},
    "none": {},
    "continue": {"continue_final_message": True},
}


def joined(messages: list[dict]) -> list[dict]:
    """The messages with text for parts, as vLLM and llama.cpp join them."""

    def text(content):
        return "\n".join(part["text"] for part in content) if isinstance(content, list) else content

    return [{**message, "content": text(message["content"])} for message in messages]


@pytest.mark.parametrize("family", ["llama-3.1", "qwen-3", "macros", "filters"])
def test_long_chats_pass(family):
    said = "wört <b> \n" * 1000
    chat = [{"role": "user" if number % 2 == 0 else "assistant", "content": said} for number in range(200)]
    assert len(TextCodec(TOKENIZER, FAMILIES[family]).render(chat)) > 8 * len(said)


def test_long_lists_of_calls_pass():
    call = {"type": "function", "function": {"name": "f", "arguments": {f"a{n}": "v" * 200 for n in range(40)}}}
    chat = [*HELLO, *({"role": "assistant", "content": None, "tool_calls": [call]} for _ in range(200))]
    assert render(FAMILIES["qwen-2.5"], check_messages(chat, False)).count("<tool_call>") == 200


def test_every_rendering_has_a_budget_of_its_own():
    template = ChatTemplate("{% for i in range(60000) %}{% endfor %}{{ messages[0].content }}")
    assert [template.render(HELLO) for _ in range(30)] == ["hi"] * 30


# Programs of strangers ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outcomes() -> dict[str, object]:
    """What came of each hostile template, in a process that may crash, hang or grow."""
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "hostile_templates.py"], capture_output=True, text=True, timeout=HANG
    )
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_in_one_error(outcomes, name):
    assert str(outcomes[name]).startswith(
        (
            "TokenError: the chat template refuses these messages: ",
            "BundleError: the chat template cannot be compiled: ",
        )
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads address space from /proc")
def test_hostile_templates_need_little_memory(outcomes):
    assert outcomes["memory"] < 100e6


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("{{ 1 + 'a' }}", "TypeError: unsupported operand"),
        ("{{ 1 // 0 }}", "ZeroDivisionError: "),
        ("{{ [].index(3) }}", "ValueError: "),
        ("{{ range(10**9) }}", "OverflowError: "),
        ("{{ '{a}'.format() }}", "KeyError: 'a'"),
        ("{{ '{}'.format() }}", "IndexError: "),
        ("{{ messages[0].nothing.more }}", "has no attribute 'nothing'"),
        ("{{ cycler() }}", "RuntimeError: at least one item"),
        ("{{ {1: 2}|tojson(sort_keys=true, indent='a', separators=3) }}", "TypeError: "),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError: "),
        ("{{ raise_exception('no such role') }}", "no such role$"),
        ("{{ raise_exception('x' * 10000) }}", r"x{500}\.\.\.$"),
        ("{{ raise_exception('\\ud800') }}", r"\\ud800"),
        ("{% set ns = namespace(_x=1) %}", "underscore"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "underscore"),
        ("{{ messages.append(1) }}", "is unsafe"),
        ("{{ self.__init__.__globals__ }}", "is unsafe"),
    ],
)
def test_every_failure_of_a_template_is_one_error(source, kind):
    with pytest.raises(TokenError, match=f"the chat template refuses these messages: .*{kind}"):
        render(source)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("\n{% if %}", "line 2: Expected an expression"),
        ("{% include 'other' %}", "include: there are no other templates"),
        ("{% extends 'other' %}", "extends: there are no other templates"),
        ("{% import 'other' as o %}", "import: there are no other templates"),
        ("{% from 'other' import o %}", "fromimport: there are no other templates"),
        ("{{ 'a'|urlize }}", "No filter named 'urlize'"),
        ("{{ " + "(" * 3000 + ")" * 3000 + " }}", "RecursionError"),
        ("{% for a in b %}" * 25 + "{% endfor %}" * 25, "too many statically nested blocks"),
        ("{{ " + "1" * 5000 + " }}", "ValueError: Exceeds the limit"),
        ("{{ a }}" * 20_000, "it has more than 30000 tokens"),
    ],
    ids=lambda value: value[:20],
)
def test_what_is_no_template_is_refused_when_it_is_read(source, reason):
    with pytest.raises(BundleError, match=reason):
        ChatTemplate(source)


def test_files_of_templates_are_refused_by_name(tmp_path):
    path = tmp_path / "chat_template.jinja"
    with pytest.raises(BundleError, match="chat_template.jinja cannot be read"):
        read_template(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(BundleError, match="chat_template.jinja cannot be read: 'utf-8' codec"):
        read_template(path)
    path.write_text(" " * (MAX_TEMPLATE_BYTES + 1))
    with pytest.raises(BundleError, match="must be at most 1000000 bytes, got 1000001"):
        read_template(path)


# Special tokens -------------------------------------------------------------------------------------------------------

ALL = "".join(f"[{{{{ {name} }}}}{{{{ {name} is defined }}}}]" for name in ("bos_token", "eos_token", "unk_token"))
ALL += "".join(f"[{{{{ {name} }}}}]" for name in ("cls_token", "sep_token", "mask_token", "pad_token", "image_token"))
NOTED = {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": False, "rstrip": False}


@pytest.mark.parametrize(
    ("settings", "older"),
    [
        ({}, None),
        (TOKENS, None),
        ({"bos_token": None, "eos_token": "<|end|>", "add_bos_token": True}, None),
        ({"bos_token": NOTED, "eos_token": "🙂", "pad_token": "é"}, None),
        ({"eos_token": "\"'\\{{ x }}\n%}{# \x07", "unk_token": "</s>\u2028"}, None),
        ({"cls_token": "", "sep_token": "[SEP]", "mask_token": "[MASK]"}, None),
        ({"image_token": "<image>", "eos_token": "</s>"}, None),
        ({"extra_special_tokens": {"image_token": "<image>"}}, None),
        ({"bos_token": "<a>"}, {"bos_token": {"content": "<b>", "lstrip": False}, "eos_token": "<c>"}),
        ({"bos_token": "<a>", "added_tokens_decoder": {}}, {"bos_token": "<b>"}),
    ],
)
def test_special_tokens_are_those_of_transformers(settings, older, tmp_path):
    """Also where the configuration's ids say something else: a list of ends, a begin that the tokenizer has not."""
    write_settings(tmp_path, **settings, chat_template=ALL)
    if older is not None:
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(older))
    config = MeltConfig(bos_token_id=1, eos_token_id=[3, 2], pad_token_id=0)
    expected = theirs(tmp_path).apply_chat_template(HELLO, tokenize=False)
    assert TextCodec(TOKENIZER, taken_over(tmp_path, config)[0]).render(HELLO) == expected


def test_the_template_holds_the_tokens_that_it_names(tmp_path):
    write_settings(tmp_path, **TOKENS, pad_token="🙂")
    (tmp_path / "chat_template.jinja").write_text("  x {{ messages[0].content }}{{ pad_token }}{{ eos_token }}")
    text, notes = taken_over(tmp_path)
    assert text.startswith('{% set eos_token = "</s>" %}{% set pad_token = "🙂" %}{{ "  " }}x {{ messages')
    assert render(text) == "  x hi🙂</s>"
    assert notes == tuple(
        f"the chat template's {name} is {token!r}, which is no token of the tokenizer: it is read letter by letter"
        for name, token in (("eos_token", "</s>"), ("pad_token", "🙂"))
    )
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert taken_over(tmp_path) == ("{{ messages[0].content }}", ())
    assert taken_over(tmp_path / "nowhere") == ("", ())


@pytest.mark.parametrize("space", ["", " ", "\n", "\n\n", " \n  ", "\t", "\r\n \r\n", "\u00a0\n", " \u2028 "])
@pytest.mark.parametrize(
    "rest", ["x", "{% if 1 %}", "{%- if 1 %}", "{%+ if 1 %}", "{{ 1 }}", "{{- 1 }}", "{# #}", "{#- #}"]
)
def test_whitespace_before_the_first_tag_stays(space, rest, tmp_path):
    template = f"{space}{rest}\n{{{{ eos_token }}}}" + "{% endif %}" * ("if" in rest)
    write_settings(tmp_path, **TOKENS, chat_template=template)
    expected = theirs(tmp_path).apply_chat_template(HELLO, tokenize=False)
    assert render(taken_over(tmp_path)[0]) == expected


def test_a_model_made_from_ouro_gets_the_right_tokens(tmp_path):
    """Its folder has Ouro's tokenizer, which names <|endoftext|> for begin and end; a Llama's is believed."""
    says = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>")
    write_settings(tmp_path, **says, chat_template="{{ bos_token }}{{ eos_token }}{{ pad_token }}")
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    right = "".join(TOKENIZER.id_to_token(token) for token in (1, 2, 0))
    assert render(taken_over(tmp_path, MeltConfig(**ids))[0]) == right
    for other in (MeltConfig(**ids, norm_placement="pre"), MeltConfig(**ids | {"eos_token_id": 3})):
        assert render(taken_over(tmp_path, other)[0]) == "<|endoftext|>" * 3
    write_settings(tmp_path, eos_token="</s>", chat_template="{{ eos_token }}")
    assert render(taken_over(tmp_path, MeltConfig(**ids))[0]) == "</s>"


def test_of_several_templates_the_default_is_taken(tmp_path):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ eos_token }}"}]
    write_settings(tmp_path, eos_token="<|end|>", chat_template=named)
    text, notes = taken_over(tmp_path)
    assert render(text) == theirs(tmp_path).apply_chat_template(HELLO, tokenize=False) == "<|end|>"
    assert notes == ("of several chat templates the one named 'default' is taken, not tool_use",)
    more = tmp_path / "additional_chat_templates"
    more.mkdir()
    (more / "rag.jinja").write_text("rag")
    assert faults_of(tmp_path) == ["the chat templates are named rag: name the one to take 'default'"]
    with pytest.raises(ValueError, match="no default"):
        theirs(tmp_path).apply_chat_template(HELLO, tokenize=False)
    (tmp_path / "chat_template.jinja").write_text("file")
    assert render(taken_over(tmp_path)[0]) == theirs(tmp_path).apply_chat_template(HELLO, tokenize=False) == "file"


@pytest.mark.parametrize(
    ("files", "faults"),
    [
        ({"tokenizer_config.json": "[1]"}, ["tokenizer_config.json must hold a JSON object, got [1]"]),
        ({"tokenizer_config.json": "{"}, ["tokenizer_config.json is not JSON"]),
        ({"tokenizer_config.json": "[" * 20_000}, ["tokenizer_config.json is not JSON"]),
        ({"tokenizer_config.json": r'{"pad_token": "\ud83d"}'}, ["tokenizer_config.json is not JSON"]),
        ({"tokenizer_config.json": b"\xff"}, ["tokenizer_config.json is not JSON"]),
        ({"tokenizer_config.json": '{"chat_template": 5}'}, ["chat_template must be text, or a list"]),
        ({"tokenizer_config.json": '{"chat_template": [5]}'}, ["chat_template must be text, or a list"]),
        ({"tokenizer_config.json": '{"chat_template": [{"name": "default"}]}'}, ["chat_template must be text"]),
        ({"tokenizer_config.json": '{"chat_template": {"default": 5}}'}, ["chat_template must be text"]),
        (
            {"tokenizer_config.json": '{"chat_template": [{"name": [], "template": ""}]}'},
            ["chat_template must be text"],
        ),
        ({"tokenizer_config.json": '{"chat_template": "{% if %}"}'}, ["cannot be compiled: line 1"]),
        ({"chat_template.jinja": b"\xff"}, ["chat_template.jinja cannot be read"]),
        (
            {
                "tokenizer_config.json": '{"bos_token": 5, "eos_token": {"text": 1}}',
                "special_tokens_map.json": "3",
                "chat_template.jinja": " " * 1_000_001,
            },
            ["special_tokens_map.json must", "must be at most", "bos_token must", "eos_token must"],
        ),
    ],
)
def test_faults_of_files_come_all_at_once(files, faults, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    found = faults_of(tmp_path)
    assert len(found) == len(faults)
    for fault, expected in zip(found, faults, strict=True):
        assert expected in fault


# Messages -------------------------------------------------------------------------------------------------------------

_CYCLE: list = []
_CYCLE.append(_CYCLE)


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        (5, r"\[1\] must be a message with role and content, got int"),
        ("hi", r"\[1\] must be a message with role and content, got str"),
        ({"content": "x"}, r"\[1\].role must be text such as 'user', got none"),
        ({"role": 5, "content": "x"}, r"\[1\].role must be text such as 'user', got int"),
        ({"role": "user"}, r"\[1\].content must be text, got none"),
        ({"role": "user", "content": 5}, r"\[1\].content must be text, got int"),
        ({"role": "user", "content": b"x"}, r"\[1\].content must be a plain value as JSON has them, got bytes"),
        ({"role": "user", "content": ["x"]}, r"\[1\].content\[0\] must be {'type': 'text', 'text': ...}, got str"),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]},
            r"\[1\].content\[1\] must be {'type': 'text', 'text': ...}, got type 'image_url': the model reads",
        ),
        ({"role": "user", "content": [{"type": "text", "text": 5}]}, r"\[1\].content\[0\] must be"),
        (
            {"role": "user", "content": "a\ud83d"},
            r"\[1\].content must be text, got the half character U\+D83D at place 1",
        ),
        ({"role": "user", "content": "a", "name": ["\udc00"]}, r"\[1\].name\[0\] must be text, got the half character"),
        ({"role": "user", "content": "a", "\ud800": 1}, r"a key of messages\[1\] must be text, got the half"),
        ({"role": "user", "content": "a", 3: 1}, r"\[1\] must have names as keys, got 3"),
        ({"role": "user", "content": "a", "x": {"y": object()}}, r"\[1\].x.y must be a plain value .*got object"),
        ({"role": "user", "content": "a", "x": [float("nan")]}, r"\[1\].x\[0\] must be a plain value .*got nan"),
        ({"role": "user", "content": "a", "x": _CYCLE}, "is nested deeper than 50"),
    ],
)
def test_odd_messages_are_named(message, fault):
    with pytest.raises(TokenError, match=fault):
        check_messages([*HELLO, message], takes_parts=True)


@pytest.mark.parametrize("messages", [None, "hi", {"role": "user"}, 5, b"x", iter(HELLO)])
def test_messages_must_be_a_list(messages):
    with pytest.raises(TokenError, match="messages must be a list of messages, got"):
        check_messages(messages, takes_parts=True)


def test_messages_are_copied_as_plain_values():
    class Loud(str):
        def shout(self) -> str:
            return self.upper()

    given = [{"role": Loud("user"), "content": "x", "name": None, "extra": (1, 2.5, True, None)}]
    made = check_messages(given, takes_parts=False)
    assert made == [{"role": "user", "content": "x", "extra": [1, 2.5, True, None]}]
    assert type(made[0]["role"]) is str
    assert given[0]["name"] is None


@pytest.mark.parametrize(
    ("arguments", "read"),
    [('{"a": "Zürich"}', {"a": "Zürich"}), ("", {}), (None, {}), ({"a": 1.5}, {"a": 1.5}), ("{}", {})],
)
def test_arguments_of_calls_reach_a_template_as_objects(arguments, read):
    call = {"id": "x", "type": "function", "function": {"name": "f", "arguments": arguments}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    (made,) = check_messages([message], takes_parts=False)
    assert made["tool_calls"] == [{**call, "function": {"name": "f", "arguments": read}}]
    assert check_messages([made], takes_parts=False) == [made]
    del call["function"]["arguments"]
    (made,) = check_messages([message], takes_parts=False)
    assert made["tool_calls"][0]["function"]["arguments"] == {}
    flat = {**message, "tool_calls": [{"name": "f", "arguments": "x"}]}  # of a template's own form
    assert check_messages([flat], takes_parts=False)[0]["tool_calls"] == flat["tool_calls"]
