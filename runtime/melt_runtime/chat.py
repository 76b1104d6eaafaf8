"""A conversation at a terminal: what is typed, the commands that begin with a slash, answers as they come.

It knows a ``Session`` and lines of text; where lines come from is the caller's. Nothing here decides about models.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from melt_files import replace_text
from melt_runtime.errors import MeltError
from melt_runtime.generation_config import GenerationConfig
from melt_runtime.session import Session
from melt_runtime.text import Message

HELP = """\
  /loops N        depth from here on; /loops alone says what it is
  /system TEXT    instructions that begin the conversation; /system alone removes them
  /retry          answer the last message again
  /clear          forget the conversation
  /save FILE      write the conversation as JSON
  /help           this list
  /quit           leave (so do Ctrl-D, and Ctrl-C twice)
Ctrl-C stops an answer; what it said so far stays in the conversation.
"""


class ReadLine(Protocol):
    """Gives the next line; ``EOFError`` at the end, ``KeyboardInterrupt`` for Ctrl-C."""

    def __call__(self) -> str:
        """The line, without its end."""
        ...


def terminal_lines() -> ReadLine:
    """Lines of a person at a terminal: arrow keys, history, Ctrl-R. Elsewhere lines of standard input as they are."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return input
    from prompt_toolkit import PromptSession

    lines: PromptSession[str] = PromptSession("> ")
    return lines.prompt


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
        self._commands: dict[str, Callable[[str], None]] = {
            "/loops": self._loops,
            "/system": self._system,
            "/retry": self._retry,
            "/clear": self._clear,
            "/save": self._save,
            "/help": lambda _: print(HELP, end=""),
        }

    def run(self, read_line: ReadLine) -> None:
        """Reads and answers until the end of the lines, ``/quit``, or Ctrl-C twice."""
        interrupted = False
        while True:
            try:
                line = read_line().strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                if interrupted:
                    return
                interrupted = True
                print("Ctrl-C again leaves; /help lists the commands", file=sys.stderr)
                continue
            if line == "/quit":
                return
            interrupted = not self.take(line)

    def take(self, line: str) -> bool:
        """Answers a message, or does what a command says; an error is printed and the conversation stays.

        Returns:
            False where Ctrl-C stopped the answer.
        """
        if not line:
            return True
        try:
            if line.startswith("/"):
                name, _, rest = line.partition(" ")
                if name not in self._commands:
                    raise ValueError(f"{name} is no command: {', '.join([*self._commands, '/quit'])}")
                self._commands[name](rest.strip())
            else:
                self._answer([*self._history(), {"role": "user", "content": line}])
        except KeyboardInterrupt:
            print("\nstopped; the conversation goes on", file=sys.stderr)
            return False
        except (MeltError, ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
        return True

    def _history(self) -> list[Message]:
        """The conversation so far, with the instructions of now."""
        spoken = [message for message in self.session.messages if message["role"] != "system"]
        return [{"role": "system", "content": self.system}, *spoken] if self.system else spoken

    def _answer(self, messages: list[Message]) -> None:
        """Streams the answer to the last message. What was said before is continued where it did not change."""
        continues = messages[:-1] == self.session.messages
        prompt = messages[-1]["content"] if continues else messages
        with self.session.stream(prompt, **self.settings) as stream:
            for piece in stream:
                print(piece, end="", flush=True)
            print()
        if sys.stderr.isatty():
            timings = stream.result.timings
            print(
                f"\033[2mprompt {timings.prefill_tokens} tokens in {timings.prefill_seconds:.2f} s, answer "
                f"{timings.decode_tokens} at {timings.decode_rate:.0f}/s, loops {stream.result.loops}\033[0m",
                file=sys.stderr,
            )

    def _loops(self, text: str) -> None:
        if text:
            if not text.isdecimal():
                raise ValueError(f"loops must be a whole number of at least 1, got {text!r}")
            GenerationConfig(loops=int(text))
            self.settings["loops"] = int(text)
        print(f"loops {self.settings.get('loops', 'as the model was trained')}")

    def _system(self, text: str) -> None:
        self.system = text
        print("instructions set" if text else "no instructions")

    def _retry(self, _: str) -> None:
        spoken = self._history()
        while spoken and spoken[-1]["role"] != "user":
            spoken.pop()
        if not spoken:
            raise ValueError("nothing was asked yet")
        self._answer(spoken)

    def _clear(self, _: str) -> None:
        self.session.reset()
        print("forgotten")

    def _save(self, text: str) -> None:
        if not text:
            raise ValueError("give a file: /save chat.json")
        path = Path(text).expanduser()
        if path.exists():
            raise ValueError(f"{path} exists: choose another name")
        replace_text(
            path,
            json.dumps(
                {"saved": time.strftime("%Y-%m-%d %H:%M:%S"), "messages": self._history()}, indent=2, ensure_ascii=False
            )
            + "\n",
        )
        print(f"wrote {path}")
