"""Reads a checkpoint folder strictly: every fault of configuration and tensors is listed before weights are read."""

import json
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open

from melt_models.configuration import MeltConfig
from melt_models.modeling import MeltCausalLM


class CheckpointError(Exception):
    """A checkpoint folder that cannot be loaded; the message lists every fault found."""


class Checkpoint:
    """A MELT or LoopLM checkpoint whose tensors are read one at a time, so that a model larger than memory can be.

    Attributes:
        folder: where it lies.
        config: its configuration.
    """

    def __init__(self, folder: str | Path):
        """Opens a folder with ``config.json``, and ``model.safetensors`` or its shards and their index.

        Raises:
            CheckpointError: missing files, a bad configuration, or missing, unexpected or wrongly shaped tensors.
        """
        self.folder = Path(folder)
        self.config = read_config(self.folder)
        stored = _stored_tensors(self.folder)
        faults = _compare_tensors(_expected_shapes(self.config), {name: shape for name, (_, shape) in stored.items()})
        if faults:
            raise CheckpointError(f"{folder}: the tensors do not fit config.json:\n  " + "\n  ".join(faults))
        self._files = {name: path for name, (path, _) in stored.items()}

    def read(self, name: str) -> torch.Tensor:
        """One tensor in its stored type; a tied head is its embedding."""
        if name == "lm_head.weight" and self.config.tie_word_embeddings:
            name = "model.embed_tokens.weight"
        # Opened anew each time: an open file keeps every page that was read in this process's memory.
        with safe_open(self._files[name], framework="pt") as tensors:
            return tensors.get_tensor(name)


def load_checkpoint(folder: str | Path) -> MeltCausalLM:
    """Loads a whole checkpoint in its stored type; errors as for ``Checkpoint``.

    Returns:
        The model in evaluation mode.
    """
    checkpoint = Checkpoint(folder)
    return MeltCausalLM.from_pretrained(checkpoint.folder, config=checkpoint.config, dtype="auto").eval()


def read_config(folder: Path) -> MeltConfig:
    """Reads and checks ``config.json``.

    Raises:
        CheckpointError: no such file, not JSON, another model type, unknown keys or bad values.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: a checkpoint folder holds config.json and model.safetensors")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    model_type = values.get("model_type") if isinstance(values, dict) else None
    if model_type != MeltConfig.model_type:
        raise CheckpointError(f"{path}: model_type must be {MeltConfig.model_type!r}, got {model_type!r}")
    try:
        return MeltConfig.from_dict(values)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def empty_model(config: MeltConfig) -> MeltCausalLM:
    """A model in evaluation mode whose tensors have shapes only (torch's ``meta`` device)."""
    with torch.device("meta"):
        return MeltCausalLM(config).eval()


def _expected_shapes(config: MeltConfig) -> dict[str, tuple[int, ...]]:
    shapes = {name: tuple(tensor.shape) for name, tensor in empty_model(config).state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def _stored_tensors(folder: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """File and shape of every tensor, from the headers alone."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder}: missing weight files: {', '.join(missing)}")
    found: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for name in names:
        try:
            with safe_open(folder / name, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (safe_open is not a mapping)
                    found[key] = folder / name, tuple(tensors.get_slice(key).get_shape())
        except Exception as error:  # safetensors raises its own type for a damaged header
            raise CheckpointError(f"{folder / name} cannot be read: {error}; fetch the file again") from error
    return found


def _compare_tensors(expected: dict[str, tuple[int, ...]], stored: dict[str, tuple[int, ...]]) -> list[str]:
    faults = [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in stored]
    faults += [f"unexpected {name} {list(shape)}" for name, shape in stored.items() if name not in expected]
    faults += [
        f"{name} has shape {list(stored[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name] != shape
    ]
    return faults
