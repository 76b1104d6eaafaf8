"""A model's own evaluation, beside its weights: questions with the one right answer, in groups.

``evaluation.jsonl`` in a checkpoint folder has one example a line:
``{"messages": [{"role": "user", "content": "..."}], "answer": "Dan.", "group": "3 hops"}``.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, with_config
from typing_extensions import TypedDict

from melt_models.errors import list_faults
from melt_models.forms import STRICT, fitting, is_there, parse_json, read_text

EVALUATION_NAME = "evaluation.jsonl"


@dataclass(frozen=True)
class Example:
    """A chat that ends with a user's message, the text that must follow, and the group that it counts for."""

    chat: list[Any]
    answer: str
    group: str


@with_config(STRICT)
class _Message(TypedDict):
    role: str
    content: str


@with_config(STRICT)
class _Line(TypedDict):
    messages: Annotated[list[_Message], Field(min_length=1)]
    answer: Annotated[str, Field(min_length=1)]
    group: str


_LINE = TypeAdapter(_Line)


def read_examples(folder: Path) -> tuple[Example, ...]:
    """Reads a checkpoint's evaluation; empty where it has none.

    Raises:
        ValueError: lines that are not examples, each with its number.
    """
    faults: list[str] = []
    examples = examine_examples(folder, faults)
    if faults:
        raise ValueError(f"{folder}:{list_faults(faults)}")
    return examples


def examine_examples(folder: Path, faults: list[str]) -> tuple[Example, ...]:
    """As ``read_examples``, but adds what is wrong to ``faults``."""
    path = folder / EVALUATION_NAME
    text = read_text(path, faults) if is_there(path, faults) else None
    examples = []
    for number, line in enumerate((text or "").splitlines(), start=1):
        before, where = len(faults), f"{EVALUATION_NAME}, line {number}"
        values = parse_json(line, where, faults)
        if values is not None:
            fitting(_LINE, values, where, faults)
        if values is not None and len(faults) == before:
            examples.append(Example(values["messages"], values["answer"], values["group"]))
    return tuple(examples)


def write_examples(folder: Path, examples: tuple[Example, ...]) -> None:
    """Writes a checkpoint's evaluation."""
    lines = [json.dumps({"messages": e.chat, "answer": e.answer, "group": e.group}) for e in examples]
    (folder / EVALUATION_NAME).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
