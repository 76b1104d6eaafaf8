"""``generation_config.json``: what a bundle says of generation."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from melt_runtime.arguments import shown
from melt_runtime.bundle.contract import ModelShape
from melt_runtime.bundle.manifest import GENERATION_CONFIG_NAME
from melt_runtime.errors import BundleError
from melt_runtime.request.generation_config import MAX_TOKENS, OF_GRAMMAR, GenerationConfig
from melt_runtime.request.settings import settle

_NAMES = {field.name: None for field in fields(GenerationConfig) if field.name not in OF_GRAMMAR}.keys()
"""In their order."""


def write_generation_config(path: Path, config: GenerationConfig) -> None:
    """Writes ``generation_config.json``: the fields that are said."""
    said = {name: getattr(config, name) for name in _NAMES if getattr(config, name) is not None}
    path.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


def read_defaults(folder: Path, shape: ModelShape, cache_sets: int | None = None) -> GenerationConfig:
    """Reads a bundle's defaults of generation, and checks them as a request that says nothing of its own.

    Args:
        folder: the bundle.
        shape: its model.
        cache_sets: KV caches of a LoopLM that a state has, the most loops it can run; None: not known yet.

    Raises:
        BundleError: as for ``read_generation_config``; or every answer with these defaults would be refused.
    """
    path = folder / GENERATION_CONFIG_NAME
    defaults = read_generation_config(path, shape.vocab_size)
    try:
        settings = settle(GenerationConfig(), defaults, shape.trained_loops, MAX_TOKENS, shape.has_exit_gate)
    except ValueError as error:
        raise BundleError(f"{path.name}: {error}") from error
    if settings.lag is not None and shape.has_loop_idx:
        raise BundleError(f"{path.name}: decode must be 'plain' for gate kind {shape.gate_kind!r}, got 'wave'")
    if cache_sets is not None and shape.cache_kind == "per_loop" and settings.loops > cache_sets:
        raise BundleError(
            f"{path.name}: loops must be at most {cache_sets}, got {settings.loops}: a LoopLM has one KV cache per "
            f"loop; load with loops={settings.loops}"
        )
    return defaults


def read_generation_config(path: Path, vocab_size: int | None = None) -> GenerationConfig:
    """Reads ``generation_config.json``.

    Args:
        path: the file.
        vocab_size: of the model, for ``stop_ids`` and ``logit_bias``.

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
    for name in ("stop_ids", "logit_bias") if vocab_size is not None else ():
        if unknown := tuple(token for token in said.get(name) or () if token >= vocab_size):
            faults.append(f"{name} must be below the vocabulary's {vocab_size}, got {shown(unknown)}")
    if faults:
        raise BundleError(f"{path.name}: {'; '.join(sorted(faults))}")
    return GenerationConfig(**said)
