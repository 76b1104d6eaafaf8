"""Reads a checkpoint folder strictly: every fault of configuration and tensors is listed before weights are read."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from tqdm import tqdm

from melt_models.configuration import MeltConfig
from melt_models.families import FAMILIES, KNOWN_TYPES
from melt_models.modeling import MeltCausalLM

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_FLOATS = ("F32", "BF16", "F16")


class CheckpointError(Exception):
    """A checkpoint folder that cannot be loaded; the message lists every fault found."""


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies, its shape, and its type by safetensors' name (``BF16``)."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class Checkpoint:
    """A checkpoint of a known family whose tensors are read one at a time, so that a model larger than memory can be.

    Attributes:
        folder: where it lies.
        config: its configuration.
        notes: what of the published files was corrected or passed over, a sentence each.
        tensors: its tensors by name; a tied head is not among them.
    """

    def __init__(self, folder: str | Path):
        """Opens a folder with ``config.json``, and ``model.safetensors`` or its shards and their index.

        Raises:
            CheckpointError: missing files, a bad configuration, or missing, unexpected, wrongly shaped or quantized
                tensors.
        """
        self.folder = Path(folder)
        self.config, notes = read_config(self.folder)
        stored = _stored_tensors(self.folder)
        idle = [name for name in stored if _is_idle(name, self.config)]
        if idle:
            notes.append(f"tensors that the model does not use are passed over: {', '.join(idle)}")
        self.tensors = {name: entry for name, entry in stored.items() if name not in idle}
        self.notes = tuple(notes)
        faults = _compare_tensors(_expected_shapes(self.config), self.tensors)
        if faults:
            raise CheckpointError(f"{folder}: the tensors do not fit config.json:\n  " + "\n  ".join(faults))

    def read(self, name: str) -> torch.Tensor:
        """One tensor in its stored type; a tied head is its embedding."""
        if name == "lm_head.weight" and self.config.tie_word_embeddings:
            name = "model.embed_tokens.weight"
        # Opened anew each time: an open file keeps every page that was read in this process's memory.
        with safe_open(self.tensors[name].file, framework="pt") as tensors:
            return tensors.get_tensor(name)

    def require_finite(self) -> None:
        """Reads every weight once, with progress.

        Raises:
            CheckpointError: weights that are infinite or not a number, all such tensors at once.
        """
        faults = []
        for name in tqdm(self.tensors, desc="checking weights", unit="tensor", leave=False, disable=None):
            tensor = self.read(name)
            if not torch.stack(torch.aminmax(tensor)).isfinite().all():
                bad = int((~tensor.isfinite()).sum())
                faults.append(f"{name}: {bad} of {tensor.numel()} weights are infinite or not a number")
        if faults:
            raise CheckpointError(f"{self.folder} is damaged, fetch it again:\n  " + "\n  ".join(faults))


def load_checkpoint(folder: str | Path) -> MeltCausalLM:
    """Loads a whole checkpoint in its stored type; errors as for ``Checkpoint``.

    Returns:
        The model in evaluation mode.
    """
    checkpoint = Checkpoint(folder)
    return MeltCausalLM.from_pretrained(checkpoint.folder, config=checkpoint.config, dtype="auto").eval()


def read_config(folder: Path) -> tuple[MeltConfig, list[str]]:
    """Reads and checks ``config.json``, of ours or of another family.

    Returns:
        The configuration, and what was corrected or passed over.

    Raises:
        CheckpointError: no such file, not JSON, an unknown model type, unknown keys, bad values, or what is not
            implemented.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: a checkpoint folder holds config.json and {WEIGHTS_NAME}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    model_type = values.get("model_type") if isinstance(values, dict) else None
    if model_type not in KNOWN_TYPES:
        raise CheckpointError(f"{path}: model_type must be one of {', '.join(KNOWN_TYPES)}, got {model_type!r}")
    notes: list[str] = []
    try:
        if model_type in FAMILIES:
            values, notes = FAMILIES[model_type](values)
        return MeltConfig.from_dict(values), notes
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


def _is_idle(name: str, config: MeltConfig) -> bool:
    """Tensors that some published files hold beside the model's own: a tied head once more, rotary frequencies."""
    tied_head = name == "lm_head.weight" and config.tie_word_embeddings
    return tied_head or name.endswith("rotary_emb.inv_freq")


def _stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a folder by name, from the headers alone."""
    index = folder / INDEX_NAME
    names = _shards(index) if index.is_file() else [WEIGHTS_NAME]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder}: missing weight files: {', '.join(missing)}")
    found: dict[str, Stored] = {}
    for name in names:
        try:
            with safe_open(folder / name, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (safe_open is not a mapping)
                    piece = tensors.get_slice(key)
                    found[key] = Stored(folder / name, tuple(piece.get_shape()), piece.get_dtype())
        except Exception as error:  # safetensors raises its own type for a damaged header
            raise CheckpointError(f"{folder / name} cannot be read: {error}; fetch the file again") from error
    return found


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of shards: {error!r}; fetch the file again") from error


def _compare_tensors(expected: dict[str, tuple[int, ...]], stored: dict[str, Stored]) -> list[str]:
    faults = [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in stored]
    faults += [f"unexpected {name} {list(entry.shape)}" for name, entry in stored.items() if name not in expected]
    faults += [
        f"{name} has shape {list(stored[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ]
    faults += [
        f"{name} has type {entry.dtype}, expected one of {', '.join(_FLOATS)}: give the unquantized checkpoint"
        for name, entry in stored.items()
        if entry.dtype not in _FLOATS
    ]
    return faults
