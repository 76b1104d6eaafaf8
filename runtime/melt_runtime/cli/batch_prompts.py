"""The prompts of ``melt batch``: a file of them, checked as a whole before anything is done."""

from dataclasses import dataclass, fields
from typing import Any, BinaryIO, cast

from melt_runtime.arguments import shown
from melt_runtime.cli.json_lines import BOM, Faults, Id, parse_object, read_lines, require_id
from melt_runtime.errors import TokenError
from melt_runtime.request.generation_config import GenerationConfig
from melt_runtime.text.codec import Message
from melt_runtime.text.messages import check_messages

_OF_PROGRAMS = ("logits_processors", "logprobs")
SETTINGS = tuple(field.name for field in fields(GenerationConfig) if field.name not in _OF_PROGRAMS)
"""Fields of a line that say how its prompt is to be continued."""

_FIELDS = ("id", "prompt", "messages", *SETTINGS)
_UNSET: dict[str, tuple[object, ...]] = {"seed": (-1,), "top_k": (-1,), "stop": ("",)}
"""Values that ask for nothing, as elsewhere."""
_OTHERS = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens", "stop_token_ids": "stop_ids"}
"""Names of OpenAI and vLLM."""


@dataclass(frozen=True)
class PromptLine:
    """A prompt of the file.

    Attributes:
        number: of its line, from 1.
        id: what its answer is called.
        prompt: a user's message, or a whole chat.
        config: how to continue it.
    """

    number: int
    id: Id
    prompt: str | list[Message]
    config: GenerationConfig


def read_prompts(file: BinaryIO, name: str, settings: GenerationConfig) -> list[PromptLine]:
    """Every prompt of a file. Lines with nothing on them are passed over, and a field that is null counts as not there.

    Args:
        file: at its beginning.
        name: of the file, for messages.
        settings: hold where a line says nothing.

    Raises:
        ValueError: lists the lines that cannot be used; or there is none.
    """
    prompts: list[PromptLine] = []
    places: dict[Id, int] = {}
    faults = Faults(name)
    for number, line in read_lines(file, name):
        if number == 1:
            line = line.removeprefix(BOM)
        if not line.strip():
            continue
        try:
            prompt = _as_prompt(number, parse_object(line), settings, places)
        except ValueError as error:
            faults.add(number, error)
        else:
            places[prompt.id] = number
            prompts.append(prompt)
    faults.raise_any("cannot be used")
    if not prompts:
        raise ValueError(f"{name} is empty: it must hold a prompt, a JSON object, on each line")
    return prompts


def _as_prompt(number: int, values: dict[str, Any], settings: GenerationConfig, places: dict[Id, int]) -> PromptLine:
    """The prompt of a line; ``places`` are lines by the ids before.

    Raises:
        ValueError: lists what is wrong with it.
    """
    said = {name: value for name, value in values.items() if value is not None and value not in _UNSET.get(name, ())}
    faults = []
    unknown = [name for name in said if name not in _FIELDS]
    for name in [name for name in unknown if name in _OTHERS]:
        unknown.remove(name)
        faults.append(f"{name} is called {_OTHERS[name]} here")
    if "raw" in unknown:
        unknown.remove("raw")
        faults.append("raw is for the whole file: give --raw")
    if unknown:
        faults.append(f"unknown fields {shown(unknown)}: see melt batch --help")
    config = settings
    try:
        _check_id(values.get("id"), places)
    except ValueError as error:
        faults.append(str(error))
    try:
        _check_prompt(said)
    except (TokenError, ValueError) as error:
        faults.append(str(error))
    try:
        config = settings.with_changes(**cast(Any, {name: said[name] for name in SETTINGS if name in said}))
    except ValueError as error:
        faults.append(str(error))
    if faults:
        raise ValueError("; ".join(faults))
    return PromptLine(number, values["id"], said.get("prompt") or said["messages"], config)


def _check_id(id: object, places: dict[Id, int]) -> None:
    require_id(id)
    if id in places:
        raise ValueError(f"id must be in the file once, got {shown(id)}, which line {places[id]} has")


def _check_prompt(said: dict[str, Any]) -> None:
    if ("prompt" in said) == ("messages" in said):
        found = "both" if "prompt" in said else "neither"
        raise ValueError(f"a line must have one of prompt and messages, got {found}")
    if "messages" in said:
        check_messages(said["messages"], takes_parts=True)
        return
    if not isinstance(said["prompt"], str):
        raise ValueError(f"prompt must be a string, got {shown(said['prompt'])}")
    if not said["prompt"].strip():
        raise ValueError(f"prompt must hold at least one character, got {shown(said['prompt'])}")
