"""``weights.data``: every tensor of every graph, once, written one at a time. What only graphs for prompts need stands
in ``prompts.data``.

Tensors are known by their name in the checkpoint and inside the module that stores them, so that graphs which share a
tensor (a tied head, the loops over other KV caches) share its bytes.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from melt_export.stored import stored
from melt_runtime.bundle.manifest import WEIGHTS_NAME
from melt_runtime.memory.plan import stored_type

_PAGE = 4096  # large tensors begin on a page of memory, so that they can be mapped
_LINE = 64


def onnx_type(name: str) -> ir.DataType:
    """The type of a tensor by its name in torch, which is numpy's where numpy has it."""
    return ir.DataType.BFLOAT16 if name == "bfloat16" else ir.DataType.from_numpy(np.dtype(name))


@dataclass(frozen=True)
class Entry:
    """Where a tensor stands: file, offset in bytes, shape, type name."""

    file: str
    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * stored_type(self.dtype).itemsize


class WeightFile:
    """The weights of a bundle while it is made."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        self._name = WEIGHTS_NAME

    @contextmanager
    def beside(self, name: str) -> Iterator[None]:
        """What is added in the block, and stands nowhere yet, goes to a file of its own."""
        before, self._name = self._name, name
        try:
            yield
        finally:
            self._name = before

    def add(self, key: str, tensor: Tensor) -> None:
        """Appends one tensor."""
        tensor = tensor.contiguous()
        dtype = str(tensor.dtype).removeprefix("torch.")
        values = tensor.view(torch.uint16).numpy() if dtype == "bfloat16" else tensor.numpy()
        align = _PAGE if values.nbytes >= _PAGE else _LINE
        with (self.folder / self._name).open("ab") as stream:
            stream.write(b"\0" * (-stream.tell() % align))
            self.entries[key] = Entry(self._name, stream.tell(), tuple(values.shape), dtype)
            stream.write(values.data)

    def read(self, key: str) -> Tensor:
        """Reads one tensor back."""
        entry = self.entries[key]
        path = self.folder / entry.file
        values = np.fromfile(path, stored_type(entry.dtype), math.prod(entry.shape), offset=entry.offset)
        return torch.from_numpy(values.reshape(entry.shape)).view(getattr(torch, entry.dtype))

    def add_module(self, module: nn.Module, name: str, read: Callable[[str], Tensor]) -> dict[str, str]:
        """Packs what a module itself owns, unless it stands here already.

        Args:
            module: a module with tensors of its own, traced or to be traced.
            name: its name in the checkpoint, where it is the checkpoint's own.
            read: gives a tensor of the checkpoint.

        Returns:
            Keys by tensor name inside the module.
        """
        matrix = stored(module)
        origin = name if matrix is None else matrix.key
        owned = [tensor for tensor, _ in module.named_parameters(recurse=False)]
        owned += [tensor for tensor, _ in module.named_buffers(recurse=False)]
        keys = {tensor: f"{origin}.{tensor}" for tensor in owned}
        missing = [tensor for tensor, key in keys.items() if key not in self.entries]
        if missing:
            reader = (lambda tensor: read(f"{name}.{tensor}")) if matrix is None else matrix.reader(read)
            packed = _pack(module, reader)
            for tensor in missing:
                self.add(keys[tensor], packed[tensor])
        return keys

    def attach(self, graph: ir.Graph, keys: dict[str, str]) -> None:
        """Points a graph's initializers at their bytes.

        Args:
            graph: traced with empty weights.
            keys: key by initializer name.
        """
        for name, key in keys.items():
            value, entry = graph.initializers[name], self.entries[key]
            dtype = onnx_type(entry.dtype)
            assert value.dtype == dtype, f"{name} is {value.dtype}, stored as {dtype}"
            assert math.prod(value.shape) == math.prod(entry.shape), f"{name} is {value.shape}, stored as {entry.shape}"
            value.const_value = ir.ExternalTensor(
                entry.file,
                entry.offset,
                entry.nbytes,
                dtype,
                shape=value.shape,
                name=name,
                base_dir=self.folder,
            )


def owners(graph: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """The modules of a graph that own tensors, with their names."""
    for name, module in graph.named_modules():
        if any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(recurse=False)):
            yield name, module


def _pack(module: nn.Module, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    if hasattr(module, "pack"):
        return module.pack(read)
    return {name: read(name).to(parameter.dtype) for name, parameter in module.named_parameters(recurse=False)}
