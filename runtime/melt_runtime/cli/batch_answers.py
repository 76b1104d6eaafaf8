"""The answers of ``melt batch``: a file that one run at a time adds lines to, and the next one reads."""

import io
import json
import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from melt_files.locks import lock
from melt_runtime.arguments import shown
from melt_runtime.cli.json_lines import Faults, Id, parse_object, read_lines, require_id
from melt_runtime.errors import BusyError
from melt_runtime.request.result import GenerationResult

_FIELDS = ("id", "text", "finish_reason", "loops", "prompt_tokens", "new_tokens", "seconds")
_START, _TEXT = b'{"id": ', ', "text": "'
"""How every line begins, and what stands after the id."""


class Answers:
    """A file of answers, open for one run: locked until it is closed, or the process ends, however that comes.

    Attributes:
        path: the file.
        ids: of the prompts that it answers.
    """

    def __init__(self, path: Path, ids: Collection[Id]):
        """Opens the file, makes it where there is none, and reads what it answers already.

        A last line that was cut off, as a killed run leaves it, is removed.

        Args:
            path: the file.
            ids: of all prompts.

        Raises:
            BusyError: another run writes it.
            ValueError: it holds anything else than answers to ``ids``, one each; nothing was changed.
            OSError: it cannot be read or written.
        """
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} must be a file, where the next run can find what is answered")
        self.path = path
        self._is_new = not path.exists()
        self._file = _open_locked(path)
        try:
            self.ids = self._read(ids)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        """The file itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Closes it."""
        self.close()

    def add(self, id: Id, result: GenerationResult) -> None:
        """Writes an answer, at once and as a whole.

        Raises:
            OSError: the disk refuses; what it took of the line, the next run removes.
        """
        timings = result.timings
        values = (
            *(id, result.text, result.finish_reason, result.loops, result.prompt_tokens, len(result.token_ids)),
            round(timings.prefill_seconds + timings.decode_seconds, 6),
        )
        line = json.dumps(dict(zip(_FIELDS, values, strict=True)), ensure_ascii=False) + "\n"
        self._write(line.encode("utf-8"))
        self.ids.add(id)

    def close(self) -> None:
        """Ends the lock; a file that this run made, and gave nothing, goes."""
        with self._file as file:
            os.fsync(file.fileno())
            if self._is_new and not os.fstat(file.fileno()).st_size:
                with suppress(OSError):  # Windows keeps what is open
                    self.path.unlink()

    def _read(self, expected: Collection[Id]) -> set[Id]:
        ids: set[Id] = set()
        faults, whole, line, torn = Faults(str(self.path)), 0, b"", False
        self._file.seek(0)
        reader = io.BufferedReader(self._file)
        try:
            for number, line in read_lines(reader, str(self.path)):
                torn = _is_torn(line)
                if torn:
                    break
                whole += len(line)
                try:
                    ids.add(_answered_id(parse_object(line), ids, expected))
                except ValueError as error:
                    faults.add(number, error)
        finally:
            reader.detach()
        faults.raise_any("are no answers to these prompts: name another --out, or correct them")
        if torn:
            self._file.truncate(whole)
        elif line and not line.endswith(b"\n"):
            self._write(b"\n")
        return ids

    def _write(self, data: bytes) -> None:
        while data:
            data = data[self._file.write(data) :]


def _open_locked(path: Path) -> io.FileIO:
    """The file, to be read and added to, which nobody else writes as long as it is open.

    Raises:
        BusyError: another process does.
    """
    while True:
        file = open(path, "a+b", buffering=0)  # noqa: SIM115
        try:
            if lock(file.fileno(), wait=False) is False:
                raise BusyError(f"another run writes {path}: wait for it, end it, or name another --out")
            with suppress(FileNotFoundError):  # the run before removed it, since it gave it nothing
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return file
        except BaseException:
            file.close()
            raise
        file.close()


def _is_torn(line: bytes) -> bool:
    """Whether an answer begins here that was not written to its end; what looks like anything else is left alone."""
    if line.endswith(b"\n") or not line.startswith(_START[: len(line)]):
        return False
    try:
        parse_object(line)
        return False
    except ValueError:
        rest = line[len(_START) :].decode("utf-8", "ignore")
    try:
        _, end = json.JSONDecoder().raw_decode(rest)
    except (ValueError, RecursionError):  # it ends within the id
        return True
    return rest[end:].startswith(_TEXT[: len(rest) - end])


def _answered_id(values: dict[str, Any], ids: set[Id], expected: Collection[Id]) -> Id:
    """The id of an answer, which is none of ``ids``.

    Raises:
        ValueError: it is no answer, or not to any of these prompts, or another has its id.
    """
    missing = [name for name in _FIELDS if name not in values]
    if missing:
        raise ValueError(f"an answer must have {', '.join(_FIELDS)}, got none of {', '.join(missing)}")
    id = values["id"]
    require_id(id)
    if not isinstance(values["text"], str):
        raise ValueError(f"text must be a string, got {shown(values['text'])}")
    if id not in expected:
        raise ValueError(f"id must be one of the prompts', got {shown(id)}")
    if id in ids:
        raise ValueError(f"id must be in the file once, got {shown(id)} again")
    return cast(Id, id)
