"""Traces the three graph modules with ``torch.onnx.export`` and names their inputs and outputs after the contract."""

import warnings
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, nn

from melt_export.graphs import EmbedGraph, HeadGraph, LoopGraph
from melt_models.modeling import MeltCausalLM
from melt_runtime.contract import GraphSpec, ModelShape

OPSET = 21

# Example sizes: all different from each other and from 1, so that the tracer takes none for a constant.
_BATCH, _CHUNK, _CAPACITY = 2, 3, 8


def model_shape(model: MeltCausalLM) -> ModelShape:
    """What the runtime must know of ``model``."""
    config = model.config
    return ModelShape(
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        trained_loops=config.total_ut_steps,
        trained_chunk=config.chunk_size,
        gate_kind=config.gate_kind,
        cache_kind=config.cache_kind,
        has_latent=config.has_latent,
    )


def trace_graph(name: str, model: MeltCausalLM, spec: GraphSpec, folder: Path) -> None:
    """Writes ``{name}.onnx`` and its weights, ``{name}.onnx.data``; the first arguments are ``trace_program``'s."""
    trace_program(name, model, spec).save(folder / f"{name}.onnx", external_data=True)


def trace_program(name: str, model: MeltCausalLM, spec: GraphSpec) -> torch.onnx.ONNXProgram:
    """Traces one graph; the weights are not looked at.

    Args:
        name: ``embed``, ``loop`` or ``head``.
        model: in the precision that the graph shall have.
        spec: the contract's inputs and outputs of this graph.
    """
    module, args = _module_and_args(name, model)
    batch, chunk, capacity = torch.export.Dim("B"), torch.export.Dim("C"), torch.export.Dim("S")
    symbols = {"B": batch, "C": chunk, "S": capacity}
    by_name = {t.name: {i: symbols[d] for i, d in enumerate(t.shape) if isinstance(d, str)} for t in spec.inputs}
    dynamic_shapes = _shapes_like(args, _input_names(name, model), by_name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # notices of the tracer about its own future
        program = torch.onnx.export(
            module.eval(),
            args,
            dynamo=True,
            opset_version=OPSET,
            input_names=_flat(_input_names(name, model)),
            output_names=_flat(_output_names(name, model)),
            dynamic_shapes=dynamic_shapes,
            verbose=False,
        )
    assert program is not None
    _name_dimensions(program.model.graph, spec)
    return program


def _name_dimensions(graph: ir.Graph, spec: GraphSpec) -> None:
    """Gives inputs and outputs the contract's symbols; the tracer keeps ours for some and invents others."""
    for values, specs in ((graph.inputs, spec.inputs), (graph.outputs, spec.outputs)):
        tensors = {tensor.name: tensor for tensor in specs}
        for value in values:
            value.shape = ir.Shape(tensors[str(value.name)].shape)


def _module_and_args(name: str, model: MeltCausalLM) -> tuple[nn.Module, tuple]:
    config = model.config
    if name == "embed":
        return EmbedGraph(model), (torch.zeros(_BATCH, _CHUNK, dtype=torch.int64),)
    hidden = torch.zeros(_BATCH, _CHUNK, config.hidden_size, dtype=model.dtype)
    if name == "head":
        return HeadGraph(model), (hidden,)

    def cache() -> list[Tensor]:
        shape = (_BATCH, config.num_key_value_heads, _CAPACITY, config.head_dim)
        return [torch.zeros(shape, dtype=model.dtype) for _ in range(config.num_hidden_layers)]

    latents = [torch.zeros_like(hidden) for _ in range(config.num_hidden_layers)] if config.has_latent else []
    seqlens_k = torch.full((_BATCH,), _CHUNK - 1, dtype=torch.int32)
    total = torch.tensor(_CHUNK, dtype=torch.int32)
    loop_idx = torch.tensor(0) if config.gate_kind == "mean" else None
    return LoopGraph(model), (hidden, latents, cache(), cache(), seqlens_k, total, loop_idx)


def _per_layer(model: MeltCausalLM, name: str) -> list[str]:
    return [f"{name}.{layer_idx}" for layer_idx in range(model.config.num_hidden_layers)]


def _input_names(name: str, model: MeltCausalLM) -> tuple:
    """Names in the shape of the module's arguments."""
    if name != "loop":
        return ("ids",) if name == "embed" else ("hidden",)
    latents = _per_layer(model, "latent") if model.config.has_latent else []
    loop_idx = "loop_idx" if model.config.gate_kind == "mean" else None
    caches = (_per_layer(model, "past_key"), _per_layer(model, "past_value"))
    return ("hidden", latents, *caches, "seqlens_k", "total_sequence_length", loop_idx)


def _output_names(name: str, model: MeltCausalLM) -> tuple:
    if name == "embed":
        return ("hidden", "latent") if model.config.has_latent else ("hidden",)
    if name == "head":
        return ("logits",)
    latents = _per_layer(model, "latent_out") if model.config.has_latent else []
    return (
        "hidden_out",
        latents,
        _per_layer(model, "present_key"),
        _per_layer(model, "present_value"),
        "exit_logit",
    )


def _flat(names: tuple) -> list[str]:
    flat: list[str] = []
    for name in names:
        flat += name if isinstance(name, list) else [] if name is None else [name]
    return flat


def _shapes_like(args: tuple, names: tuple, by_name: dict[str, dict]) -> tuple:
    return tuple(
        [by_name[n] for n in name] if isinstance(arg, list) else None if arg is None else by_name[name]
        for arg, name in zip(args, names, strict=True)
    )
