"""A conversation at a terminal: what is typed, the commands that begin with a slash, answers as they come.

It knows a ``Session`` and lines of text; where lines come from is the caller's. Nothing here decides about models.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from melt_files import replace_text
from melt_runtime.arguments import path_of, shown, shown_name
from melt_runtime.bundle.contract import MAX_LOOPS
from melt_runtime.cli.streams import require_utf8
from melt_runtime.errors import CapacityError, MeltError, RunError
from melt_runtime.progress import PROMPT_DELAY, Line
from melt_runtime.request.generation_config import GenerationConfig
from melt_runtime.request.result import GenerationResult
from melt_runtime.session import Session
from melt_runtime.text.codec import Message

HELP = """\
  /loops N        depth from here on, a number or auto; /loops alone says what it is
  /system TEXT    instructions that begin the conversation; /system alone removes them
  /retry          answer the last message again
  /clear          forget the conversation (so does /reset)
  /save FILE      write the conversation as JSON
  /help           this list
  /quit           leave (so do Ctrl-D, and Ctrl-C twice)
Ctrl-C stops an answer; what it said so far stays in the conversation. A message that begins with / needs a space first.
"""

_ALONE = ("/retry", "/clear", "/reset", "/help", "/quit")
"""Commands that nothing may follow: it would be passed over without a word."""
_MOST_DIGITS = 20

ReadLine = Callable[[], str]
"""Gives the next line, without its end; ``EOFError`` at the end, ``KeyboardInterrupt`` for Ctrl-C."""


def open_lines() -> tuple[ReadLine, bool]:
    """Lines of a person at a terminal: arrow keys, history, Ctrl-R. Elsewhere lines of standard input as they are.

    Returns:
        What gives them, and whether a person types them.

    Raises:
        OSError: standard input is closed.
    """
    if sys.stdin is None:
        raise OSError("standard input is closed")
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return input, False
    from prompt_toolkit import PromptSession

    lines: PromptSession[str] = PromptSession("> ")
    return lines.prompt, True


def describe_costs(result: GenerationResult) -> str:
    """What an answer took: the time to its first token, its speed, its depth, why it ended."""
    timings = result.timings
    speed = f" at {timings.decode_rate:.0f}/s" if timings.decode_tokens else ""
    return (
        f"prompt {timings.prefill_tokens} tokens in {format_seconds(timings.prefill_seconds)}, "
        f"answer {len(result.token_ids)}"
        f"{speed}, loops {_describe_loops(result)}, finish: {result.finish_reason}"
    )


def _describe_loops(result: GenerationResult) -> str:
    """The depth, and where not all tokens took it, how deep they went."""
    taken = result.loops_per_token
    mean = "" if set(taken) == {result.loops} else f" at most, {sum(taken) / len(taken):.2f} on average"
    waves = "" if result.drafts is None else f", {result.passes} passes"
    return f"{result.loops}{mean}{waves}"


def format_seconds(seconds: float) -> str:
    """For people: ``1.24 s``, ``3.4 ms``."""
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1e3 * seconds:.1f} ms"


class Chat:
    """One conversation and its settings.

    Attributes:
        session: holds the messages.
        settings: single fields of ``GenerationConfig`` for every answer.
        system: instructions that the conversation begins with; empty for none.
    """

    def __init__(self, session: Session, settings: dict[str, Any], system: str = ""):
        self.session = session
        self.settings = settings
        self.system = system
        self._asked: list[Message] = []  # up to the last message that was sent, whatever became of it
        self._commands: dict[str, Callable[[str], None]] = {
            "/loops": self._loops,
            "/system": self._system,
            "/retry": self._retry,
            "/clear": self._clear,
            "/reset": self._clear,
            "/save": self._save,
            "/help": lambda _: print(HELP, end=""),
        }

    def answer_all(self, read_line: ReadLine) -> None:
        """Answers every line until their end: each is a message, with whatever it begins.

        Raises:
            RunError: at the end, where messages were not answered; the others were.
            KeyboardInterrupt: at once.
        """
        asked = failed = 0
        while True:
            try:
                line = read_line()
            except EOFError:
                break
            if line.strip():
                asked += 1
                failed += not self._try(partial(self._ask, line))
        if failed:
            raise RunError(f"{failed} of {asked} messages were not answered: see above")

    def run(self, read_line: ReadLine) -> None:
        """Reads and answers until the end of the lines, ``/quit``, or Ctrl-C twice."""
        interrupted = False
        while True:
            try:
                line = read_line()
            except EOFError:
                return
            except KeyboardInterrupt:
                if interrupted:
                    return
                interrupted = True
                print("Ctrl-C again leaves; /help lists the commands", file=sys.stderr)
                continue
            if line.strip() == "/quit":
                return
            interrupted = not self.take(line)

    def take(self, line: str) -> bool:
        """Answers a message, or does what a command says; an error is printed and the conversation stays.

        Returns:
            False where Ctrl-C stopped the answer.
        """
        try:
            if line.startswith("/"):
                self._try(lambda: self._command(*require_utf8(line, "a command").split(maxsplit=1)))
            elif line.strip():
                self._try(partial(self._ask, line), " (/clear forgets the conversation)")
        except KeyboardInterrupt:
            print("\nstopped; the conversation goes on", file=sys.stderr)
            return False
        return True

    def _try(self, work: Callable[[], None], when_full: str = "") -> bool:
        """Whether the work went well; else its error is printed, with what helps where the context is full."""
        try:
            work()
        except (MeltError, ValueError) as error:
            print(f"error: {error}{when_full if isinstance(error, CapacityError) else ''}", file=sys.stderr)
            return False
        return True

    def _ask(self, line: str) -> None:
        message = require_utf8(line, "a message").strip()
        self._answer([*self._spoken(), {"role": "user", "content": message}])

    def _command(self, name: str, text: str = "") -> None:
        """Does what a command says; ``/quit`` alone is where the lines are read."""
        text = text.strip()
        if text and name in _ALONE:
            raise ValueError(f"{name} takes nothing after it, got {shown(text)}")
        if name not in self._commands:
            known = ", ".join([*self._commands, "/quit"])
            raise ValueError(
                f"{shown_name(name)} is no command: {known}; a message that begins with / needs a space first"
            )
        self._commands[name](text)

    def _spoken(self) -> list[Message]:
        """The conversation so far, without instructions."""
        return [message for message in self.session.messages if message["role"] != "system"]

    def _with_system(self, spoken: list[Message]) -> list[Message]:
        return [{"role": "system", "content": self.system}, *spoken] if self.system else spoken

    def _answer(self, spoken: list[Message]) -> None:
        """Streams the answer to the last message. What was said before is continued where it did not change."""
        self._asked = spoken
        messages = self._with_system(spoken)
        prompt = messages[-1]["content"] if messages[:-1] == self.session.messages else messages
        said = False
        try:
            with (
                Line("token", PROMPT_DELAY) as line,
                self.session.stream(prompt, progress=line.prompt, **self.settings) as stream,
            ):
                for piece in stream:
                    said = True
                    print(piece, end="", flush=True)
        except MeltError:
            if said:
                print(flush=True)
            raise
        print(flush=True)
        if sys.stderr.isatty():
            print(f"[{describe_costs(stream.result)}]", file=sys.stderr)

    def _loops(self, text: str) -> None:
        if text:
            whole = text.isdecimal() and len(text) <= _MOST_DIGITS  # Python reads no number of thousands of digits
            if text != "auto" and not whole:
                raise ValueError(f"loops must be auto or a whole number from 1 to {MAX_LOOPS}, got {shown(text)}")
            self.settings["loops"] = GenerationConfig(loops="auto" if text == "auto" else int(text)).loops
        print(f"loops {self.settings.get('loops', 'as many as the model was trained with')}")

    def _system(self, text: str) -> None:
        self.system = text
        print("instructions set" if text else "no instructions")

    def _retry(self, _: str) -> None:
        if not self._asked:
            raise ValueError("nothing was asked yet")
        self._answer(self._asked)

    def _clear(self, _: str) -> None:
        self.session.reset()
        self._asked = []
        print("forgotten")

    def _save(self, text: str) -> None:
        if not text:
            raise ValueError("give a file: /save chat.json")
        messages = self._with_system(self._spoken())
        values = {"saved": time.strftime("%Y-%m-%d %H:%M:%S"), "messages": messages}
        path = path_of("the file", text, "a file")
        try:
            path = path.expanduser()
            if os.path.lexists(path):
                raise ValueError(f"{path} exists: choose another name")
            replace_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
        except (OSError, RuntimeError) as error:  # the latter where there is no such user
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise ValueError(f"{shown_name(text)} cannot be written: {reason}") from error
        print(f"wrote {path}")
