"""Reads a checkpoint folder strictly: every fault of configuration and tensors is listed before weights are read."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import Field, TypeAdapter, with_config
from safetensors import safe_open
from tqdm import tqdm
from typing_extensions import TypedDict

from melt_models.configuration import MeltConfig
from melt_models.configuration_form import check_configuration
from melt_models.errors import CheckpointError as CheckpointError
from melt_models.families import READERS
from melt_models.forms import STRICT, fitting, is_there, read_json, shown
from melt_models.model_types import KNOWN_TYPES
from melt_models.modeling import MeltCausalLM

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
ADAPTER_NAME = "adapter_config.json"
_FLOATS = ("F32", "BF16", "F16")
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_ROWS = 4096  # of a matrix that are compared at once


@with_config(STRICT)
class _Index(TypedDict):
    weight_map: Annotated[dict[str, str], Field(min_length=1)]


_INDEX = TypeAdapter(_Index)


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
        config: its configuration; ``tie_word_embeddings`` is false where the stored head is another matrix.
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
        faults: list[str] = []
        config, notes = examine_config(self.folder, faults)
        stored, readable = _stored_tensors(self.folder, faults)
        if config and config.tie_word_embeddings and readable and _is_untied(stored):
            config.tie_word_embeddings = False
            notes.append(
                f"{CONFIG_NAME} ties the head to the embedding, but {_HEAD} is stored with other values: it is a "
                "matrix of its own, as in transformers"
            )
        idle = [name for name in stored if config and _is_idle(name, config)]
        if idle:
            notes.append(f"tensors that the model does not use are passed over: {', '.join(idle)}")
        self.tensors = {name: entry for name, entry in stored.items() if name not in idle}
        self.notes = tuple(notes)
        if config and readable:
            faults += _compare_tensors(_expected_shapes(config), self.tensors)
        if faults or config is None:
            raise CheckpointError(f"{folder} cannot be loaded:", faults)
        self.config = config

    def read(self, name: str) -> torch.Tensor:
        """One tensor in its stored type; a tied head is its embedding."""
        if name == _HEAD and self.config.tie_word_embeddings:
            name = _EMBEDDING
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
            raise CheckpointError(f"{self.folder} is damaged, fetch it again:", faults)


def load_checkpoint(folder: str | Path) -> MeltCausalLM:
    """Loads a whole checkpoint in its stored type; errors as for ``Checkpoint``.

    Returns:
        The model in evaluation mode.
    """
    checkpoint = Checkpoint(folder)
    # The tensors that were checked, by name: transformers would choose among the folder's files by a rule of its own.
    tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
    return MeltCausalLM.from_pretrained(None, config=checkpoint.config, state_dict=tensors, dtype="auto").eval()


def read_config(folder: Path) -> tuple[MeltConfig, list[str]]:
    """Reads and checks ``config.json``, of ours or of another family.

    Returns:
        The configuration, and what was corrected or passed over.

    Raises:
        CheckpointError: no such file, not JSON, an unknown model type, unknown keys, bad values, or what is not
            implemented; all faults at once.
    """
    faults: list[str] = []
    config, notes = examine_config(folder, faults)
    if config is None:
        raise CheckpointError(f"{folder} cannot be loaded:", faults)
    return config, notes


def examine_config(folder: Path, faults: list[str]) -> tuple[MeltConfig | None, list[str]]:
    """As ``read_config``, but adds what is wrong to ``faults``; the configuration is None then."""
    path, notes = folder / CONFIG_NAME, list[str]()
    missing = f"{path} does not exist: a checkpoint folder holds {CONFIG_NAME} and {WEIGHTS_NAME}"
    values = read_json(path, faults) if is_there(path, faults, missing) else None
    if values is None:
        return None, notes
    model_type = values.get("model_type")
    if model_type not in KNOWN_TYPES:
        faults.append(f"{CONFIG_NAME}: model_type must be one of {', '.join(KNOWN_TYPES)}, got {shown(model_type)}")
        return None, notes
    before = len(faults)
    arguments, notes = READERS[model_type](values, CONFIG_NAME, faults)
    check_configuration(arguments, CONFIG_NAME, faults)
    if len(faults) > before:
        return None, notes
    try:
        config = MeltConfig(**{name: _as_float(name, value) for name, value in arguments.items()})
    except (TypeError, ValueError, StrictDataclassError) as error:  # what transformers refuses beyond our rules
        faults.append(f"{CONFIG_NAME}: {error}")
        return None, notes
    if config.early_exit_threshold < 1 and not config.exit_gate:
        notes.append(f"early_exit_threshold {config.early_exit_threshold:g} is passed over: the model has no exit gate")
    return config, notes


def _as_float(name: str, value: Any) -> Any:
    """JSON writes 1e6 as 1000000 too; transformers wants a float where one is declared."""
    return float(value) if isinstance(getattr(MeltConfig, name, None), float) else value


def empty_model(config: MeltConfig) -> MeltCausalLM:
    """A model in evaluation mode whose tensors have shapes only (torch's ``meta`` device)."""
    with torch.device("meta"):
        return MeltCausalLM(config).eval()


def _expected_shapes(config: MeltConfig) -> dict[str, tuple[int, ...]]:
    shapes = {name: tuple(tensor.shape) for name, tensor in empty_model(config).state_dict().items()}
    if config.tie_word_embeddings:
        del shapes[_HEAD]
    return shapes


def _is_idle(name: str, config: MeltConfig) -> bool:
    """Tensors that some published files hold beside the model's own: a tied head once more, rotary frequencies."""
    tied_head = name == _HEAD and config.tie_word_embeddings
    return tied_head or name.endswith("rotary_emb.inv_freq")


def _is_untied(stored: dict[str, Stored]) -> bool:
    """Whether head and embedding are both stored, with different shapes or values."""
    if not {_HEAD, _EMBEDDING} <= stored.keys():
        return False
    head, embedding = stored[_HEAD], stored[_EMBEDDING]
    if head.shape != embedding.shape or len(head.shape) != 2:
        return True  # the shape that is wrong is told with the others
    with safe_open(head.file, framework="pt") as ours, safe_open(embedding.file, framework="pt") as theirs:
        left, right = ours.get_slice(_HEAD), theirs.get_slice(_EMBEDDING)
        return not all(
            torch.equal(left[start : start + _ROWS].float(), right[start : start + _ROWS].float())
            for start in range(0, head.shape[0], _ROWS)
        )


def _stored_tensors(folder: Path, faults: list[str]) -> tuple[dict[str, Stored], bool]:
    """Every tensor of a folder by name, from the headers alone; and whether all files could be read."""
    before = len(faults)
    index = folder / INDEX_NAME
    if os.path.lexists(folder / ADAPTER_NAME):
        faults.append(f"{ADAPTER_NAME}: adapters are not applied to the weights: merge them, or remove the file")
    names = _shards(index, faults) if is_there(index, faults) else [WEIGHTS_NAME]
    if WEIGHTS_NAME not in names and os.path.lexists(folder / WEIGHTS_NAME):
        faults.append(f"{WEIGHTS_NAME} stands beside {INDEX_NAME}, which does not name it: remove the one that is old")
    missing = [name for name in names if not os.path.isfile(folder / name)]  # Path.is_file raises on odd names
    faults += [f"missing weight file {name}" for name in missing]
    found: dict[str, Stored] = {}
    for name in names:
        if name in missing:
            continue
        try:
            with safe_open(folder / name, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (safe_open is not a mapping)
                    piece = tensors.get_slice(key)
                    if key in found:
                        faults.append(f"{key} stands in {found[key].file.name} and in {name}: remove one of them")
                    found[key] = Stored(folder / name, tuple(piece.get_shape()), piece.get_dtype())
        except Exception as error:  # safetensors raises its own type for a damaged header
            faults.append(f"{name} cannot be read: {error}; fetch the file again")
    return found, len(faults) == before


def _shards(index: Path, faults: list[str]) -> list[str]:
    before = len(faults)
    values = read_json(index, faults)
    places = fitting(_INDEX, values, index.name, faults).get("weight_map", {}) if values is not None else {}
    names = sorted(set(places.values()))
    faults += [
        f"{index.name}: weight_map must name files of this folder, got {shown(name)}"
        for name in names
        if Path(name).name != name
    ]
    if len(faults) == before:
        return names
    faults.append(f"{index.name} is not an index of shards: fetch the file again")
    return []


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
