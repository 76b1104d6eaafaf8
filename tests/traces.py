"""Graphs that a run has traced once: tracing one again, of the same modules, takes seconds and gives the same graph."""

import hashlib
import inspect
import types
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import torch
from filelock import FileLock
from torch import nn

from melt_runtime.bundle.contract import GraphSpec

Trace = Callable[[str, nn.Module, GraphSpec], ir.Model]
_MAX_BYTES = 16 << 20
"""Weights of a graph that is kept: those of a large model would only be copied."""


def remembered(trace: Trace, folder: Path) -> Trace:
    """``trace_graph``, which keeps the graphs that it made in ``folder``, by all that a trace depends on."""

    def trace_once(name: str, module: nn.Module, spec: GraphSpec) -> ir.Model:
        if sum(tensor.nbytes for tensor in module.state_dict().values()) > _MAX_BYTES:
            return trace(name, module, spec)
        path = folder / f"{_key(name, module, spec)}.onnx"
        with FileLock(f"{path}.lock"):
            if not path.exists():
                ir.save(trace(name, module, spec), path)
        model = ir.load(path)
        for value in model.graph.initializers.values():  # not of a file that others read
            assert value.const_value is not None
            value.const_value = ir.Tensor(value.const_value.numpy(), name=value.name)
        return model

    return trace_once


def _key(name: str, module: nn.Module, spec: GraphSpec) -> str:
    """A digest of what each part holds besides weights, and of the code and constants that it runs."""
    parts = [name, repr(spec)]
    classes: set[type] = set()
    for place, part in module.named_modules():
        parts += [place, *(f"{key} {_text(value)}" for key, value in sorted(vars(part).items()))]
        classes.update(kind for kind in type(part).__mro__ if kind.__module__.startswith("melt_"))
    for kind in sorted(classes, key=lambda kind: kind.__qualname__):
        for values in (vars(kind), vars(inspect.getmodule(kind))):
            parts += [f"{kind} {key} {_text(value)}" for key, value in sorted(values.items()) if _matters(value)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _matters(value: object) -> bool:
    """Whether a name of a class or module is code or a constant."""
    return callable(value) or isinstance(value, bool | int | float | str | tuple | frozenset)


def _text(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    if isinstance(value, nn.Module | type | types.ModuleType):
        return type(value).__name__
    if isinstance(value, dict):
        return " ".join(f"{key} {_text(item)}" for key, item in value.items())
    if isinstance(value, frozenset):
        return repr(sorted(map(repr, value)))  # its own order is another in every process
    code = getattr(inspect.unwrap(getattr(value, "__func__", value)), "__code__", None)  # a patched function differs
    return hashlib.sha256(_read(code).encode()).hexdigest() if code else repr(value)


def _read(code: types.CodeType) -> str:
    """What a function does; ``marshal`` would also write which of its constants happen to be shared."""
    parts = [_read(part) if isinstance(part, types.CodeType) else _text(part) for part in code.co_consts]
    return " ".join([code.co_code.hex(), repr(code.co_names), *parts])
