"""``generation_config.json``: what a bundle says of generation."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from melt_runtime.arguments import shown
from melt_runtime.errors import BundleError
from melt_runtime.request.generation_config import GenerationConfig

_NAMES = {field.name: None for field in fields(GenerationConfig)}.keys()
"""In their order."""


def write_generation_config(path: Path, config: GenerationConfig) -> None:
    """Writes ``generation_config.json``: the fields that are said."""
    said = {name: getattr(config, name) for name in _NAMES if getattr(config, name) is not None}
    path.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


def read_generation_config(path: Path, vocab_size: int | None = None) -> GenerationConfig:
    """Reads ``generation_config.json``.

    Args:
        path: the file.
        vocab_size: of the model, for ``stop_ids``.

    Raises:
        BundleError: no object in JSON and UTF-8; else lists unknown keys and values of a wrong type or outside their
            rule.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path.name} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise BundleError(f"{path.name} must hold a JSON object, got {shown(values)}")
    faults = [f"{shown(name)} is unknown" for name in values if name not in _NAMES]
    said: dict[str, Any] = {}
    for name in _NAMES & values.keys():
        try:
            said[name] = getattr(GenerationConfig(**{name: values[name]}), name)
        except ValueError as error:
            faults.append(str(error))
    if vocab_size is not None and any(token >= vocab_size for token in said.get("stop_ids") or ()):
        faults.append(f"stop_ids must be below the vocabulary's {vocab_size}, got {shown(said['stop_ids'])}")
    if faults:
        raise BundleError(f"{path.name}: {'; '.join(sorted(faults))}")
    return GenerationConfig(**said)
