"""What ``melt batch`` reads and writes: every line of both files is looked at before a model is loaded."""

import errno
import io
import json
import os
import sys

import pytest

from melt_runtime import GenerationConfig
from melt_runtime.cli import batch_answers, json_lines
from melt_runtime.cli.batch_answers import Answers
from melt_runtime.cli.batch_prompts import read_prompts
from melt_runtime.cli.main import main
from melt_runtime.text.messages import check_messages

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX files")
FIELDS = ["id", "text", "finish_reason", "loops", "prompt_tokens", "new_tokens", "seconds"]
ANSWER = dict.fromkeys(FIELDS, 0) | {"id": "a", "text": "Zoë.\n"}


@pytest.fixture
def prompts(tmp_path):
    return tmp_path / "prompts.jsonl"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "answers.jsonl"


def write(path, *lines) -> None:
    """Writes lines: objects as JSON, bytes as they are."""
    texts = (line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=False).encode() for line in lines)
    path.write_bytes(b"".join(text + b"\n" for text in texts))


def batch(bundle, prompts, out, *options) -> int:
    return main(["batch", str(bundle), str(prompts), "--out", str(out), "--device", "cpu", *map(str, options)])


def test_a_mark_of_windows_and_empty_lines_are_passed_over():
    first = b'\xef\xbb\xbf{"id": 1, "prompt": "a b", "messages": null, "loops": null, "raw": null, "other": null}'
    lines = first + b'\r\n\r\n \n{"id": "1", "prompt": "\\u00eb"}'
    found = read_prompts(io.BytesIO(lines), "file", GenerationConfig(loops=3))
    assert [(line.number, line.id, line.prompt, line.config.loops) for line in found] == [
        (1, 1, "a b", 3),
        (4, "1", "ë", 3),
    ]


DEEP = json.loads('{"a": ' * 60 + "1" + "}" * 60)
FAULTS = [
    (b"nonsense", "must be a JSON object, got 'nonsense': Expecting value at character 1"),
    (b'{"id": 1, "prompt": "x"', "Expecting ',' delimiter at character 24"),
    (b'{"id": 1, "prompt": "x"} {}', "Extra data at character 26"),
    (b"[1, 2]", "must be a JSON object, got [1, 2]"),
    (b'{"id": 1, "prompt": "a\xffb"}', "must be UTF-8, got the byte 0xff after 22 bytes"),
    ('{"id": 1, "prompt": "a"}'.encode("utf-16"), "must be UTF-8, got the byte 0xff after 0 bytes"),
    (b'{"id": 1, "prompt": "\\ud800"}', "must hold whole characters, got the half character U+D800 in "),
    (b'{"id": "\\udc00", "prompt": "a"}', "must hold whole characters, got the half character U+DC00 in "),
    (b"[" * 100_000, "it nests too deep"),
    (b'{"id": 1, "prompt": "a", "stop": ' + b"[" * 100_000, "it nests too deep"),
    (b'{"id": ' + b"9" * 5000 + b', "prompt": "a"}', 'must be a JSON object, got \'{"id": 99'),
    (b'{"id": 1, "id": 2, "prompt": "a"}', "it has the name 'id' twice"),
    (b'{"id": 1, "prompt": "a", "temperature": NaN}', "NaN is no number of JSON"),
    ({"prompt": "a"}, "id is missing: give each line a string or a whole number"),
    ({"id": None, "prompt": "a"}, "id is missing"),
    ({"id": 1.0, "prompt": "a"}, "id must be a string or a whole number, got 1.0"),
    ({"id": True, "prompt": "a"}, "id must be a string or a whole number, got True"),
    ({"id": ["a"], "prompt": "a"}, "id must be a string or a whole number, got ['a']"),
    ({"id": "first", "prompt": "a"}, "id must be in the file once, got 'first', which line 1 has"),
    ({"id": 1}, "a line must have one of prompt and messages, got neither"),
    ({"id": 1, "prompt": "a", "messages": []}, "a line must have one of prompt and messages, got both"),
    ({"id": 1, "prompt": ["a"]}, "prompt must be a string, got ['a']"),
    ({"id": 1, "prompt": " \n"}, "prompt must hold at least one character, got ' \\n'"),
    ({"id": 1, "messages": []}, "messages must hold at least one message"),
    ({"id": 1, "messages": "a"}, "messages must be a list of messages, got str"),
    ({"id": 1, "messages": [{"role": "user"}]}, "messages[0].content must be text, got none"),
    (
        {"id": 1, "messages": [{"role": "user", "content": {"\x1b[2J": 1}}]},
        "messages[0].content must be text, got dict",
    ),
    ({"id": 1, "messages": [{"\x1b\n" + "x" * 9000: DEEP}]}, "messages[0].\\x1b\\nxxxx"),
    ({"id": 1, "prompt": "a", "raw": True}, "raw is for the whole file: give --raw"),
    ({"id": 1, "prompt": "a", "temprature": 1}, "unknown fields ['temprature']: see melt batch --help"),
    ({"id": 1, "prompt": "a", "loops": "4"}, "loops must be a whole number, got '4'"),
    ({"id": 1, "prompt": "a", "loops": 0, "top_p": 1.4}, "loops must be at least 1, got 0; top_p must be in (0, 1]"),
    ({"id": 1, "prompt": "a", "stop": "x"}, "stop must be a sequence of non-empty strings, got 'x'"),
    ({"id": True, "x": 1, "seed": -2}, "unknown fields ['x']: see melt batch --help; id must be"),
    ({"id": 1, "prompt": "a", "max_tokens": 3}, "max_tokens is called max_new_tokens here"),
    (
        {
            "id": 1,
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": NaN}'}}]},
            ],
        },
        "messages[1].tool_calls[0].function.arguments must be a JSON object, or its text, got",
    ),
]


def test_values_that_ask_for_nothing_and_histories_as_openai_writes_them():
    history = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "refusal": "no", "tool_calls": None},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "never"}]},
        {"role": "assistant", "content": None},
    ]
    line = {"id": 1, "messages": history, "seed": -1, "top_k": -1, "stop": "", "temperature": None}
    (prompt,) = read_prompts(io.BytesIO(json.dumps(line).encode()), "prompts", GenerationConfig(top_p=0.5))
    assert prompt.config == GenerationConfig(top_p=0.5)
    contents = [message["content"] for message in check_messages(prompt.prompt, takes_parts=False)]
    assert contents == ["a", "no", "never", ""]


@pytest.mark.parametrize(("line", "fault"), FAULTS, ids=[fault[:40] for _, fault in FAULTS])
def test_a_line_that_cannot_be_used_is_named_before_anything_is_loaded(line, fault, prompts, out, capsys):
    write(prompts, {"id": "first", "prompt": "a"}, b"", line, {"id": "last", "prompt": "a"})
    before = prompts.read_bytes()
    assert batch("no bundle", prompts, out) == 1
    captured = capsys.readouterr()
    head, *lines = captured.err.splitlines()
    assert head == f"error: {prompts} has lines that cannot be used"
    assert len(lines) == 1
    assert lines[0].startswith("  line 3: ")
    assert fault in lines[0]
    assert len(lines[0]) < 700
    assert captured.out == ""
    assert not out.exists()
    assert prompts.read_bytes() == before


def test_of_many_bad_lines_the_first_are_named(prompts, out, capsys):
    write(prompts, *[b"x"] * 30, {"id": 1, "prompt": "a"})
    assert batch("no bundle", prompts, out) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines[1:-1]] == [f"  line {number}" for number in range(1, 9)]
    assert lines[-1] == "  and 22 more"


def test_a_line_without_end_does_not_fill_the_memory(prompts, out, capsys, monkeypatch):
    monkeypatch.setattr(json_lines, "_MOST_BYTES", 1000)
    write(prompts, {"id": 1, "prompt": "a"}, {"id": 2, "prompt": "a" * 2000})
    assert batch("no bundle", prompts, out) == 1
    assert "has a line that is too long: line 2 must be at most 1000 bytes" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_no_prompts(content, prompts, out, capsys):
    prompts.write_bytes(content)
    assert batch("no bundle", prompts, out) == 1
    assert capsys.readouterr().err == f"error: {prompts} is empty: it must hold a prompt, a JSON object, on each line\n"
    assert not out.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": "prompts.jsonl"}, "--out must be another file than the prompts', got {folder}/prompts.jsonl"),
        ({"out": "link"}, "--out must be another file than the prompts', got {folder}/link"),
        ({"out": "folder"}, "{folder}/folder is a folder: name a file"),
        ({"out": "none/answers.jsonl"}, "the folder of {folder}/none/answers.jsonl does not exist: make it first"),
        ({"out": "pipe"}, "{folder}/pipe must be a file, where the next run can find what is answered"),
        ({"prompts": "folder"}, "{folder}/folder is a folder: name a file"),
        ({"prompts": "none"}, f"[Errno {errno.ENOENT}] {os.strerror(errno.ENOENT)}: '{{folder}}/none'"),
        ({"options": ["--slots", 0]}, "slots must be at least 1, got 0"),
        ({"options": ["--slots", 4097]}, "slots must be at most 4096, got 4097"),
        ({"options": ["--top-p", 2]}, "top_p must be in (0, 1], got 2"),
    ],
)
@posix
def test_files_and_options_that_cannot_be_are_refused_before_anything_is_loaded(changes, message, tmp_path, capsys):
    write(tmp_path / "prompts.jsonl", {"id": 1, "prompt": "a"})
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "prompts.jsonl")
    os.mkfifo(tmp_path / "pipe")
    names = sorted(path.name for path in tmp_path.iterdir())
    files = [tmp_path / changes.get(name, f"{name}.jsonl") for name in ("prompts", "out")]
    out = files[1] if "out" in changes else tmp_path / "answers.jsonl"
    assert batch("no bundle", files[0], out, *changes.get("options", [])) == 1
    assert capsys.readouterr().err.startswith(f"error: {message.format(folder=tmp_path)}")
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_out_is_required(prompts, capsys):
    with pytest.raises(SystemExit) as exited:
        main(["batch", "bundle", str(prompts)])
    assert exited.value.code == 2
    assert "--out" in capsys.readouterr().err


def test_a_bundle_that_cannot_be_loaded_leaves_no_file(prompts, out, capsys):
    write(prompts, {"id": 1, "prompt": "a"})
    assert batch("no bundle", prompts, out) == 1
    assert "manifest.json does not exist" in capsys.readouterr().err
    assert not out.exists()
    out.touch()  # somebody else's
    assert batch("no bundle", prompts, out) == 1
    assert out.exists()


def test_a_last_line_that_was_cut_anywhere_goes_and_nothing_else(out):
    write(out, ANSWER)
    line = out.read_bytes()
    last = line.replace(b'"a"', b'"b"')
    for cut in range(len(last) - 1):
        out.write_bytes(line + last[:cut])
        with Answers(out, ["a", "b"]) as answers:
            assert answers.ids == {"a"}
        assert out.read_bytes() == line, cut
        out.write_bytes(last[:cut])
        with Answers(out, ["a", "b"]) as answers:
            assert answers.ids == set()
        assert out.read_bytes() == b""


def test_a_last_line_that_lacks_its_end_alone_stays(out):
    write(out, ANSWER)
    line = out.read_bytes()
    out.write_bytes(line[:-1])
    with Answers(out, ["a"]) as answers:
        assert answers.ids == {"a"}
    assert out.read_bytes() == line


CHANGED = json.dumps({**ANSWER, "text": 5}).encode()
DAMAGE = [
    (b"", "must be a JSON object"),
    (b"nonsense", "must be a JSON object"),
    (b'{"id": "b", "te', "must be a JSON object"),
    (b"\x00" * 50, "must be a JSON object"),
    (b'{"id": "\xff"}', "must be UTF-8"),
    (b'{"id": "b", "prompt": "a"}', "an answer must have id, text, finish_reason, "),
    (CHANGED, "text must be a string, got 5"),
    (json.dumps({**ANSWER, "id": None}).encode(), "id is missing"),
    (json.dumps({**ANSWER, "id": 7}).encode(), "id must be one of the prompts', got 7"),
    (json.dumps(ANSWER).encode(), "id must be in the file once, got 'a' again"),
]


@pytest.mark.parametrize(("line", "fault"), DAMAGE)
def test_other_damage_of_the_answers_changes_nothing(line, fault, prompts, out, capsys):
    write(prompts, *({"id": name, "prompt": "x"} for name in "abc"))
    write(out, ANSWER, line, {**ANSWER, "id": "c"})
    out.write_bytes(out.read_bytes() + b'{"id": "b", ')
    before = out.read_bytes()
    assert batch("no bundle", prompts, out) == 1
    head, first, *more = capsys.readouterr().err.splitlines()
    assert head.startswith(f"error: {out} has lines that are no answers to these prompts")
    assert first.startswith("  line 2: ")
    assert fault in first
    assert more == []
    assert out.read_bytes() == before
    with pytest.raises(ValueError, match="no answers to these prompts"):  # and not: another run writes it
        Answers(out, ["a"])


@pytest.mark.parametrize(
    "content", [b"my notes", b'{"id": 1, "prompt": "x"}', b'{"it": "', b'{"id": 1, "prompt": "x', b"\n"]
)
def test_a_file_of_another_kind_is_left_alone(content, prompts, out, capsys):
    write(prompts, {"id": 1, "prompt": "a"})
    out.write_bytes(content)
    assert batch("no bundle", prompts, out) == 1
    assert "line 1: " in capsys.readouterr().err
    assert out.read_bytes() == content


def test_a_file_that_went_while_its_lock_was_got_is_made_again(out, monkeypatch):
    """Between opening and locking another run ends, and removes what it gave nothing."""
    real, removed = batch_answers.lock, []

    def remove_once(descriptor, wait):
        if not removed:
            removed.append(out.unlink())
        return real(descriptor, wait)

    monkeypatch.setattr(batch_answers, "lock", remove_once)
    with Answers(out, ["a"]) as answers:
        assert os.path.samestat(os.fstat(answers._file.fileno()), out.stat())
