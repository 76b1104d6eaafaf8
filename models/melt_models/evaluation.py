"""A model's own evaluation, beside its weights: questions with the one right answer, in groups.

``evaluation.jsonl`` in a checkpoint folder has one example a line:
``{"messages": [{"role": "user", "content": "..."}], "answer": "Dan.", "group": "3 hops"}``.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EVALUATION_NAME = "evaluation.jsonl"


@dataclass(frozen=True)
class Example:
    """A chat that ends with a user's message, the text that must follow, and the group that it counts for."""

    chat: list[Any]
    answer: str
    group: str


def read_examples(folder: Path) -> tuple[Example, ...]:
    """Reads a checkpoint's evaluation; empty where it has none.

    Raises:
        ValueError: a line that is not an example, with its number.
    """
    path = folder / EVALUATION_NAME
    if not path.is_file():
        return ()
    examples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            values = json.loads(line)
            examples.append(Example(list(values["messages"]), str(values["answer"]), str(values["group"])))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} must be messages, answer and group: {error!r}") from error
    return tuple(examples)


def write_examples(folder: Path, examples: tuple[Example, ...]) -> None:
    """Writes a checkpoint's evaluation."""
    lines = [json.dumps({"messages": e.chat, "answer": e.answer, "group": e.group}) for e in examples]
    (folder / EVALUATION_NAME).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
