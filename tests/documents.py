"""The examples of the documents and of the commands' own help: shell commands and blocks of Python, as they stand."""

import importlib
import re
import shlex
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO

import pytest
from conftest import ROOT

import melt_runtime

DOCUMENTS = (ROOT / "README.md", ROOT / "models" / "melt-tiny" / "README.md", *sorted((ROOT / "docs").glob("*.md")))
COMMANDS = {
    "melt": "melt_runtime.cli.main",
    "melt-export": "melt_export.cli",
    "melt-train": "melt_models.training.cli",
    "python -m melt_models.training.prepare": "melt_models.training.prepare",
}
"""Commands whose help has examples, and their modules."""
SUBCOMMANDS = ("demo", "generate", "chat", "batch", "serve", "info", "plan", "bench", "cache", "doctor")
_EXAMPLE = re.compile(r"^ {2,4}((?:melt|melt-export|melt-train|python) .*)$", re.MULTILINE)


@dataclass(frozen=True)
class Example:
    """One command.

    Attributes:
        text: without its comment; what would be typed.
        folder: of the repository, in which it is typed.
        place: where it is written, the first place of several.
    """

    text: str
    folder: str
    place: str

    @property
    def words(self) -> list[str]:
        """What the shell makes of it, redirections apart."""
        words = shlex.split(self.text)
        return words[: words.index("<")] if "<" in words else words

    @property
    def input(self) -> str | None:
        """The file that it reads as standard input."""
        words = shlex.split(self.text)
        return words[words.index("<") + 1] if "<" in words else None


def shell_examples() -> list[Example]:
    """Every command once, in the order of the documents."""
    found: dict[tuple[str, str], Example] = {}
    for example in (*_of_documents(), *_of_help()):
        found.setdefault((example.text, example.folder), example)
    return list(found.values())


def python_examples() -> list[tuple[str, str]]:
    """Every block of Python: where it is written, and its text."""
    blocks = [
        (path.relative_to(ROOT).as_posix(), text)
        for path in DOCUMENTS
        for kind, text in blocks_of(path.read_text(encoding="utf-8"))
        if kind == "python"
    ]
    doc = (melt_runtime.__doc__ or "").partition("Example::")[2]
    return [*blocks, ("melt_runtime", "\n".join(line.removeprefix("    ") for line in doc.splitlines()).strip())]


def blocks_of(markdown: str) -> Iterator[tuple[str, str]]:
    """Blocks of code with their kinds: what stands after the fence, ``sh`` for indented ones."""
    kind, lines, before = None, [], ""
    for line in [*markdown.splitlines(), ""]:
        if line.startswith("```"):
            if kind is None:
                kind = line.removeprefix("```")
            else:
                yield kind, "\n".join(lines)
                kind, lines = None, []
        elif kind is not None and kind != "indented":
            lines.append(line)
        elif line.startswith("    ") and (kind == "indented" or not before.strip()):
            kind = "indented"
            lines.append(line.removeprefix("    "))
        elif kind == "indented":
            yield "sh", "\n".join(lines)
            kind, lines = None, []
        before = line


def commands_of(block: str, place: str) -> Iterator[Example]:
    """The commands of a shell block: lines joined, comments left out, taken apart at ``&&``."""
    folder = ""
    for line in block.replace("\\\n", " ").splitlines():
        for part in re.split(r"\s&&\s", re.sub(r"(^|\s)#.*", "", line)):
            text = " ".join(part.split())
            if text.startswith("cd "):
                folder = text.removeprefix("cd ")
                assert (ROOT / folder).is_dir(), f"{place}: {folder} is no folder"
            elif text:
                yield Example(text, folder, place)


def _of_documents() -> Iterator[Example]:
    for path in DOCUMENTS:
        place = path.relative_to(ROOT).as_posix()
        for kind, text in blocks_of(path.read_text(encoding="utf-8")):
            if kind in ("sh", "bash"):
                yield from commands_of(text, place)


def _of_help() -> Iterator[Example]:
    for command, module in COMMANDS.items():
        for arguments in ([], *([name] for name in SUBCOMMANDS if command == "melt")):
            place = " ".join([command, *arguments, "--help"])
            texts = _EXAMPLE.findall(help_of(module, arguments))
            assert texts, f"{place} has no example"
            yield from commands_of("\n".join(texts), place)


def help_of(module: str, arguments: list[str]) -> str:
    """What a command prints when it is asked for help."""
    with redirect_stdout(StringIO()) as out, pytest.raises(SystemExit) as exited:
        importlib.import_module(module).main([*arguments, "--help"])
    assert exited.value.code == 0
    return out.getvalue()
