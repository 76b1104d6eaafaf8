"""``melt chat``: its commands, what Ctrl-C leaves, what it refuses; over given lines, a pipe, a terminal."""

import io
import json
import subprocess
import sys
from dataclasses import replace

import pytest

from melt_runtime import MeltModel
from melt_runtime.cli.chat import Chat
from melt_runtime.cli.main import main
from melt_runtime.text.codec import TextCodec

FACTS = (
    "Ana reports to Ben. Cleo reports to Ana. Ben works for Dan. Eva reports to Cleo. Dan reports to Finn. "
    "Gina works for Hugo. Hugo reports to Ana. Iris reports to Gina."
)
"""As many as melt-tiny learned from: of fewer it is less sure, and a past that is read in other chunks may turn it."""
QUESTION = f"{FACTS} Who is two levels above Ana?"
MORE = "Who is one level above Ana?"
WITH_SYSTEM = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def tiny(tiny_bundle):
    return MeltModel.load(tiny_bundle, device="cpu", capacity=256)


@pytest.fixture
def chat(tiny):
    return Chat(tiny.new_session(), {"max_new_tokens": 8})


def say(chat, *lines) -> None:
    """Runs a chat over lines; an exception among them is raised where it stands."""
    rest = iter(lines)

    def read_line() -> str:
        line = next(rest, EOFError)
        if isinstance(line, type):
            raise line
        return line

    chat.run(read_line)


def roles(chat) -> list[str]:
    return [message["role"] for message in chat.session.messages]


def test_turns_continue_the_conversation(chat, tiny, capsys):
    say(chat, QUESTION, "", "   ", MORE)
    expected = tiny.new_session()
    answers = [expected.generate(text, max_new_tokens=8).text for text in (QUESTION, MORE)]
    assert capsys.readouterr().out == "".join(f"{answer}\n" for answer in answers)
    assert chat.session.messages == expected.messages
    assert chat.session.token_ids == expected.token_ids


def test_loops_hold_from_there_on(chat, tiny, capsys):
    say(chat, "/loops", "/loops 1", QUESTION, "/clear", "/loops 4", QUESTION)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["loops as many as the model was trained with", "loops 1"]
    assert lines[2] == tiny.generate(QUESTION, loops=1, max_new_tokens=8).text
    assert lines[3:5] == ["forgotten", "loops 4"]
    assert lines[5] == tiny.generate(QUESTION, loops=4, max_new_tokens=8).text != lines[2]


@pytest.mark.parametrize("name", ["/clear", "/reset"])
def test_a_cleared_conversation_is_empty(name, chat, capsys):
    say(chat, QUESTION, name)
    assert chat.session.messages == []
    assert chat.session.token_ids == ()
    say(chat, "/retry")
    assert "nothing was asked yet" in capsys.readouterr().err


def test_instructions_begin_the_conversation_whenever_they_are_given(tiny, capsys):
    session = tiny.new_session()
    session._desk = replace(session._desk, codec=TextCodec(tiny.codec.tokenizer, WITH_SYSTEM))
    chat = Chat(session, {"max_new_tokens": 2}, system="Be brief.")
    say(chat, FACTS)
    assert session.messages[0] == {"role": "system", "content": "Be brief."}
    say(chat, MORE)
    assert roles(chat) == ["system", "user", "assistant", "user", "assistant"]
    assert tiny.codec.tokenizer.decode(session.token_ids).count("Be brief.") == 1
    say(chat, "/system Be long.", MORE)
    assert session.messages[0]["content"] == "Be long."
    assert roles(chat).count("user") == 3
    say(chat, "/system", "/retry")
    assert "system" not in roles(chat)
    assert [m["content"] for m in session.messages if m["role"] == "user"] == [FACTS, MORE, MORE]


def test_instructions_that_the_template_refuses_are_an_error_and_can_be_removed(tiny, capsys):
    chat = Chat(tiny.new_session(), {"max_new_tokens": 8}, system="Be brief.")
    say(chat, QUESTION, "/system", QUESTION)
    captured = capsys.readouterr()
    assert captured.err.startswith("error: the chat template refuses these messages: melt-tiny knows the roles")
    assert captured.out.splitlines()[0] == "no instructions"
    assert roles(chat) == ["user", "assistant"]


def test_retry_answers_the_last_message_again(chat, capsys):
    say(chat, QUESTION, MORE)
    before = list(chat.session.messages)
    say(chat, "/loops 1", "/retry")
    assert chat.session.messages[:3] == before[:3]
    assert roles(chat) == ["user", "assistant"] * 2
    say(chat, "/loops 4", "/retry")
    assert chat.session.messages == before


class StoppingOutput(io.StringIO):
    """Presses Ctrl-C when the given piece of an answer is to be shown."""

    def __init__(self, piece: int):
        super().__init__()
        self.left = piece

    def write(self, text: str) -> int:
        if text.strip():
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return super().write(text)


def test_ctrl_c_stops_an_answer_and_keeps_the_conversation(chat, tiny, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", StoppingOutput(1))
        say(chat, QUESTION)
    assert "stopped; the conversation goes on" in capsys.readouterr().err
    assert roles(chat) == ["user", "assistant"]
    whole = tiny.generate(QUESTION, max_new_tokens=8).text
    assert whole.startswith(chat.session.messages[1]["content"])
    assert chat.session.messages[1]["content"] != whole
    say(chat, MORE)
    assert roles(chat) == ["user", "assistant"] * 2
    say(chat, "/clear", QUESTION)
    assert chat.session.messages[1]["content"] == whole


def test_a_message_that_was_stopped_before_its_answer_can_be_retried(chat, tiny, monkeypatch, capsys):
    say(chat, QUESTION)
    first = list(chat.session.messages)

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(chat.session._engine.executor, "run", stop)
        say(chat, MORE)
    assert chat.session.messages == first
    say(chat, "/retry")
    assert [m["content"] for m in chat.session.messages if m["role"] == "user"] == [QUESTION, MORE]


def test_ctrl_c_twice_leaves_and_once_does_not(chat, capsys):
    say(chat, KeyboardInterrupt, QUESTION, KeyboardInterrupt, KeyboardInterrupt, MORE)
    assert roles(chat) == ["user", "assistant"]
    assert capsys.readouterr().err.count("Ctrl-C again leaves") == 2


def test_ctrl_c_after_a_stopped_answer_leaves(chat, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", StoppingOutput(1))
        say(chat, QUESTION, KeyboardInterrupt, MORE)
    assert roles(chat) == ["user", "assistant"]
    assert "again leaves" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/nope", "/nope is no command: /loops, "),
        ("/", "/ is no command"),
        ("/quit now", "/quit takes nothing after it, got 'now'"),
        ("/retry shorter", "/retry takes nothing after it, got 'shorter'"),
        ("/clear all", "/clear takes nothing after it, got 'all'"),
        ("/help  loops ", "/help takes nothing after it, got 'loops'"),
        ("/loops two", "loops must be auto or a whole number from 1 to 1024, got 'two'"),
        ("/loops " + "9" * 5000, "loops must be auto or a whole number from 1 to 1024, got '999"),
        ("/loops 0", "loops must be at least 1, got 0"),
        ("/loops ²", "loops must be auto or a whole number"),
        ("/loops 9999999999", "loops must be at most 1024"),
        ("/save", "give a file: /save chat.json"),
        ("/save ~nobody-here/chat.json", "cannot be written: Could not determine home directory"),
        ("/save a\0b", r"the file must be a path without null characters and half characters, got 'a\x00b'"),
        pytest.param(
            "/save /proc/x",
            "/proc/x cannot be written: the folder /proc cannot be written: No such file or directory",
            marks=pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's"),
        ),
        (f"/save {'x' * 100_000}", "cannot be written: File name too long"),
        (f"/{'x' * 100_000}", "is no command: /loops, "),
        ("/save /dev/null/chat.json", "/dev/null/chat.json cannot be written: Not a directory"),
        ("half \ud800 a pair", "a message must be UTF-8 text, got half a character after 5 characters"),
        ("no text \udcff", "a message must be UTF-8 text, got the byte 0xff after 8 bytes"),
        ("/system no text \udcff", "must be UTF-8 text, got the byte 0xff"),
        ("Ana " * 300, "(/clear forgets the conversation)"),
    ],
    ids=lambda text: text[:40],
)
def test_a_refused_line_is_one_error_and_changes_nothing(line, message, chat, capsys):
    say(chat, QUESTION)
    before = list(chat.session.messages)
    settings, system = dict(chat.settings), chat.system
    capsys.readouterr()
    say(chat, line)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1
    assert len(captured.err) < 500
    assert (chat.session.messages, chat.settings, chat.system) == (before, settings, system)
    say(chat, MORE)
    assert roles(chat) == ["user", "assistant"] * 2


def test_a_message_may_begin_with_a_slash_after_a_space(chat):
    say(chat, f" /{QUESTION}")
    assert chat.session.messages[0]["content"] == f"/{QUESTION}"


def test_text_beyond_ascii_and_over_several_lines_is_one_message(chat, capsys):
    say(chat, "Zoë 漢字 😀\nreports to Ben.\n")
    assert chat.session.messages[0]["content"] == "Zoë 漢字 😀\nreports to Ben."


def test_save_writes_the_conversation_and_replaces_nothing(chat, tmp_path, capsys):
    path = tmp_path / "chat 1.json"
    say(chat, QUESTION, f"/save {path}")
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert saved["messages"] == chat.session.messages
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    say(chat, f"/save {link}")
    assert f"{link} exists: choose another name" in capsys.readouterr().err
    link.unlink()
    say(chat, MORE, f"/save {path}")
    assert f"{path} exists: choose another name" in capsys.readouterr().err
    assert json.loads(path.read_text(encoding="utf-8")) == saved
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_help_names_every_command(chat, capsys):
    say(chat, "/help")
    out = capsys.readouterr().out
    for name in (*chat._commands, "/quit"):
        assert name in out


def test_lines_of_a_pipe_are_messages(tiny_bundle, tiny, tmp_path, capsys, monkeypatch):
    """Whatever they begin with: none is a command, and none writes a file."""
    lines = [QUESTION, MORE, "/etc/hosts", "/save stolen.json", "/quit"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n\n".join(lines) + "\n"))
    assert main(["chat", str(tiny_bundle), "--max-new-tokens", "8", "--threads", "1", "--device", "cpu"]) == 0
    session = tiny.new_session()
    expected = [session.generate(line, max_new_tokens=8).text for line in lines]
    assert capsys.readouterr().out.splitlines() == expected
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_whose_messages_were_not_all_answered_ends_with_an_error(tiny_bundle, tiny, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{'Ana. ' * 200}\n{QUESTION}\n"))
    assert main(["chat", str(tiny_bundle), "--max-new-tokens", "8", "--capacity", "128", "--device", "cpu"]) == 1
    captured = capsys.readouterr()
    assert captured.out == tiny.generate(QUESTION, max_new_tokens=8).text + "\n"
    assert "error: 1 of 2 messages were not answered: see above" in captured.err
    assert "/clear" not in captured.err


def test_a_pipe_may_hold_what_is_no_text_and_end_without_a_reader(tiny_bundle):
    command = [sys.executable, "-m", "melt_runtime", "chat", str(tiny_bundle), "--device", "cpu"]
    done = subprocess.run(command, input=b"\xff\n" + QUESTION.encode() + b"\n", capture_output=True)
    assert done.returncode == 1
    assert b"error: a message must be UTF-8 text, got the byte 0xff after 0 bytes" in done.stderr
    assert done.stdout.decode().strip()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        _, errors = process.communicate(QUESTION.encode() + b"\n" + QUESTION.encode() + b"\n")
    assert process.returncode == 141
    assert b"Traceback" not in errors
    assert b"roken pipe" not in errors


needs_terminals = pytest.mark.skipif(sys.platform == "win32", reason="terminals of this kind are POSIX's")


@needs_terminals
def test_on_a_terminal_arrow_keys_bring_back_lines_and_the_first_tokens_time_is_shown(tiny_bundle, tiny):
    from terminal import PROMPT, Terminal

    question = "Ana reports to Ben. Who is one level above Ana?"  # as long as a line of the terminal at most
    answer = tiny.generate(question, max_new_tokens=8).text.encode()
    with Terminal("chat", tiny_bundle, "--device", "cpu", "--max-new-tokens", "8") as terminal:
        terminal.line(question)
        shown = terminal.wait_for(b"finish: stop]")
        assert answer in shown
        assert b"[prompt " in shown
        terminal.wait_for(PROMPT)
        terminal.send(b"\x1b[A\r")  # arrow up
        assert question.encode() in terminal.wait_for(b"finish: ")
        terminal.line("/clear")
        terminal.wait_for(b"forgotten")
        terminal.wait_for(PROMPT)
        terminal.send(b"\x1b[A\x1b[A\r")
        assert answer in terminal.wait_for(b"finish: stop]")
        terminal.wait_for(PROMPT)
        terminal.send(b"\x04")  # Ctrl-D
        assert terminal.end() == 0


@needs_terminals
def test_on_a_terminal_ctrl_c_stops_an_answer_and_twice_leaves(random_bundle, tmp_path):
    """Over so many loops that a token takes a while, and a model that goes on to the end of its capacity."""
    from terminal import PROMPT, Terminal

    saved = tmp_path / "chat.json"
    options = ("--loops", "1024", "--temperature", "1", "--seed", "1", "--device", "cpu")
    with Terminal("chat", random_bundle(), *options) as terminal:
        terminal.line("Zoë reports to Ben.")
        terminal.wait_for(b"often quickly\r\n")  # the warning of depth
        terminal.wait_for_answer()
        terminal.send(b"\x03")
        terminal.wait_for(b"stopped; the conversation goes on")
        terminal.line(f"/save {saved}")
        terminal.wait_for(b"wrote ")
        terminal.line("/loops 1")
        terminal.wait_for(PROMPT)
        terminal.send(b"\x1b[200~" + b"Ana reports to Ben.\n" * 1000 + b"\x1b[201~\r")  # a long paste is one message
        terminal.wait_for(b"the capacity is 256")
        terminal.wait_for(PROMPT)
        terminal.send(b"ab\xffcd\r")
        terminal.wait_for(b"a message must be UTF-8 text, got the byte 0xff after 2 bytes")
        terminal.wait_for(PROMPT)
        terminal.send(b"\x03")
        terminal.wait_for(b"Ctrl-C again leaves")
        terminal.wait_for(PROMPT)
        terminal.send(b"\x03")
        assert terminal.end() == 0
    messages = json.loads(saved.read_text(encoding="utf-8"))["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert messages[0]["content"] == "Zoë reports to Ben."
    assert messages[1]["content"]
