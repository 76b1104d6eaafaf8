"""PyTorch definitions of MELT and of the LoopLM that it starts from, checkpoints and training.

A name is imported when it is asked for: command lines of this package show their help without torch. Importing
``MeltConfig`` or ``MeltCausalLM`` registers ``model_type: melt`` with the Auto classes of transformers.

The hub is asked only where a name of the hub is given. ``HF_HUB_DISABLE_TELEMETRY`` is set here, because
huggingface_hub reads it at its import: requests then carry no telemetry. ``HF_HUB_DISABLE_TELEMETRY=0`` keeps it.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from melt_models.checkpoint import load_checkpoint
    from melt_models.configuration import MeltConfig
    from melt_models.configuration_form import GATE_KINDS
    from melt_models.errors import CheckpointError
    from melt_models.modeling import KVCache, MeltCausalLM, MeltOutput

__all__ = [
    "GATE_KINDS",
    "CheckpointError",
    "KVCache",
    "MeltCausalLM",
    "MeltConfig",
    "MeltOutput",
    "load_checkpoint",
]

_HOMES = {
    "GATE_KINDS": "configuration_form",
    "CheckpointError": "errors",
    "KVCache": "modeling",
    "MeltCausalLM": "modeling",
    "MeltConfig": "modeling",
    "MeltOutput": "modeling",
    "load_checkpoint": "checkpoint",
}


def __getattr__(name: str) -> Any:
    """Imports one of ``__all__``."""
    if name in _HOMES:
        return getattr(import_module(f"melt_models.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
