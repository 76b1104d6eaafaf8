"""A sequence in a file: its tokens, their division into chunks, and its rows of the cache.

A file is read only by the model that wrote it, over the same kind of KV cache: elsewhere its rows mean nothing.
"""

import hashlib
import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from annotated_types import Interval
from pydantic import TypeAdapter

from melt_files import replace_file
from melt_runtime.bundle.contract import MAX_LOOPS, Depth
from melt_runtime.errors import CapacityError, SavedError
from melt_runtime.execute.slots import Slot
from melt_runtime.execute.snapshot import Snapshot
from melt_runtime.execute.tensors import TensorFile, write_tensors
from melt_runtime.memory.buffers import Buffer, State

_FORMAT = "melt sequence 1"
_IDS, _DEPTHS, _OURS = "ids", "depths", "melt"
_LENGTH: TypeAdapter[int] = TypeAdapter(Annotated[int, Interval(ge=0, le=1 << 26)])
_DEPTH: TypeAdapter[int | None] = TypeAdapter(Depth | None)

T = TypeVar("T")


def save_slot(
    path: Path, state: State, slot: Slot, identity: str, more: Mapping[str, Any], tokens: int | None = None
) -> None:
    """Writes a sequence in one step: the file is the old one or the whole new one.

    Args:
        path: the file; one that exists is replaced.
        state: where the sequence is.
        slot: whose it is.
        identity: tells the model from every other.
        more: what else shall be kept, for JSON.
        tokens: number of cached tokens to write; None: the whole sequence.

    Raises:
        OSError: the file cannot be written.
    """
    snapshot, length = slot.snapshot(), slot.length
    if tokens is not None and tokens < length:
        snapshot = Snapshot(snapshot.ids[:tokens], snapshot.depths[:tokens], snapshot.caches)
        length = tokens
    depths = snapshot.depths.astype(np.int16)
    if slot.depth is not None:  # tokens of an earlier, deeper turn are saved with the caches that are still used
        depths = np.clip(depths, -slot.depth, slot.depth)
    tensors = {_IDS: np.array(snapshot.ids, dtype=np.int64), _DEPTHS: depths}
    for name, buffer in _rows(state, slot.depth):
        tensors[name] = np.ascontiguousarray(buffer.values()[slot.number, :, :length])
    header = {**_about(state, identity), "length": length, "depth": slot.depth, "more": more}
    header["sha256"] = _digest(header, tensors)
    replace_file(path, lambda new: write_tensors(new, tensors, {_OURS: json.dumps(header)}))


def load_slot(path: Path, state: State, slot: Slot, identity: str, more: type[T]) -> T:
    """Makes ``slot`` the sequence of a file.

    Args:
        path: the file.
        state: where the sequence shall be.
        slot: whose it shall be.
        identity: tells the model from every other.
        more: what else must have been kept.

    Returns:
        That.

    Raises:
        SavedError: no such file, another model's, or one that is damaged.
        CapacityError: more tokens than the state has rows, or loops than a LoopLM has caches. The slot is unchanged.
    """
    try:
        with TensorFile(path) as file:
            header = json.loads(file.metadata.get(_OURS, "{}"))
            if not isinstance(header, dict) or header.get("format") != _FORMAT:
                raise SavedError(f"{path} is no saved session of this version")
            other = [name for name, value in _about(state, identity).items() if header.get(name) != value]
            if other:
                raise SavedError(f"{path} was saved by another model, or over another KV cache: its {other} differ")
            kept = TypeAdapter(more).validate_json(json.dumps(header.get("more")), strict=True)
            length = _LENGTH.validate_python(header.get("length"), strict=True)
            depth = _DEPTH.validate_python(header.get("depth"), strict=True)
            _require_fit(path, state, length, depth)
            rows = _rows(state, depth)
            shape = (state.plan.cache_shape[1], length, state.plan.cache_shape[3])
            capacity = state.plan.capacity
            expected: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
                _IDS: (np.dtype(np.int64), (capacity + 1,)),
                _DEPTHS: (np.dtype(np.int16), (capacity,)),
            }
            expected |= {name: (np.dtype(buffer.dtype), shape) for name, buffer in rows}
            # Nothing is read of a file that holds more than the slot can take.
            file.require(expected, {_IDS, _DEPTHS})
            tensors = {name: file.read(name) for name in expected}
            if header.get("sha256") != _digest(header, tensors):
                raise SavedError(f"{path} is damaged: its content is not what was saved")
            snapshot = _snapshot(path, state, tensors[_IDS], tensors[_DEPTHS], length, depth)
    except (OSError, ValueError, RecursionError) as error:
        raise SavedError(f"{path} cannot be read as a saved session: {error}") from error
    except MemoryError as error:
        raise SavedError(f"{path} cannot be read as a saved session: not enough memory") from error
    for name, buffer in rows:
        with buffer.on_host() as host:
            host[slot.number, :, :length] = tensors[name]
    slot.take(snapshot, length)
    return kept


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Any]) -> str:
    """Of all that a file holds but this number itself."""
    rest = {name: value for name, value in header.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape}".encode())
        digest.update(np.ascontiguousarray(tensors[name]).data)
    return digest.hexdigest()


def _about(state: State, identity: str) -> dict[str, Any]:
    """What must be the same where a file is read."""
    return {"format": _FORMAT, "model": identity, "kv_cache": state.plan.kv_cache, "type": state.plan.cache_dtype}


def _rows(state: State, depth: int | None) -> list[tuple[str, Buffer]]:
    """Name in the file and buffer of every tensor of the cache that a sequence of this depth uses."""
    sets = state.caches if _shares(state) else state.caches[: depth or 0]
    return [
        (f"{what}.{cache_set}.{layer}", buffer)
        for cache_set, layers in enumerate(sets)
        for layer, pair in enumerate(layers)
        for what, buffer in zip(("keys", "values"), pair, strict=True)
    ]


def _shares(state: State) -> bool:
    return state.plan.shape.cache_kind == "shared"


def _require_fit(path: Path, state: State, length: int, depth: int | None) -> None:
    if length > state.plan.capacity:
        raise CapacityError(f"{path} holds {length} tokens, the capacity is {state.plan.capacity}: load with more")
    if not _shares(state) and (depth or 0) > len(state.caches):
        raise CapacityError(f"{path} needs {depth} caches, there are {len(state.caches)}: load with loops={depth}")


def _snapshot(path: Path, state: State, ids: Any, depths: Any, length: int, depth: int | None) -> Snapshot:
    """The facts of a sequence, where they fit each other."""
    vocabulary = state.plan.shape.vocab_size
    good = (
        (ids.dtype, depths.dtype, ids.ndim, depths.ndim) == (np.int64, np.int16, 1, 1)
        and length <= len(depths) <= state.plan.capacity
        and len(ids) <= state.plan.capacity + 1
        and (len(ids) in (len(depths), len(depths) + 1))
        and ((ids >= 0) & (ids < vocabulary)).all()
        and (not len(depths) or depths[0] != 0)
        and (length == len(depths) or depths[length] != 0)
        and np.abs(depths.astype(np.int32)).max(initial=0) <= MAX_LOOPS
        and (depth is None) == (_shares(state) or not len(depths))
        and (_shares(state) or not len(depths) or np.abs(depths.astype(np.int32)).max() <= depth)
    )
    if not good:
        raise SavedError(f"{path} is damaged: its tokens and their chunks do not fit each other")
    begins = [*(length + np.flatnonzero(depths[length:])).tolist(), len(depths)]
    longest = max((later - earlier for earlier, later in pairwise(begins)), default=0)
    if longest > state.plan.chunk:  # tokens that a failed turn took are run again, in the chunks that they had
        raise CapacityError(f"{path} has chunks of {longest} tokens to run again: load with chunk={longest} or more")
    return Snapshot(ids.tolist(), depths, depth or 0)
