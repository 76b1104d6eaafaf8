"""The graphs' inputs and outputs, in one place: the exporter writes them, the runtime checks and binds them.

Letters: N layers, B batch, C tokens processed in parallel, D hidden size, H query heads, Hk key/value heads, dh head
size, S cache capacity in tokens, V vocabulary. ``float`` is the bundle's activation type.

embed.onnx: token ids to the state before the first loop.

    in   ids [B, C] int64
    out  hidden [B, C, D] float                   embeddings
         latent [N, B, C, D] float                zeros, h_0 of every layer (only where the gate has a latent state)

loop.onnx: ONE loop over all layers, and the norm that closes it. Run it T times.

    in   hidden [B, C, D] float
         latent.{layer} [B, C, D] float           the gates' h of the tokens in flight (only with a latent state)
         past_key.{layer}, past_value.{layer} [B, Hk, S, dh] float
         seqlens_k [B] int32                      row of the last token of the chunk: start + C - 1
         total_sequence_length [] int32           longest start + C in the batch; read on the host
         loop_idx [] int64                        counted from 0 (only for gate kind ``mean``)
    out  hidden_out [B, C, D] float
         latent_out.{layer} [B, C, D] float       (only with a latent state)
         present_key.{layer}, present_value.{layer} [B, Hk, S, dh] float
         exit_logit [B, C, 1] float               the exit gate before its sigmoid (only where the model has one)

Every output of the loop but ``exit_logit`` may be bound to the very buffer of its input: rows [start, start + C) of the
cache are rewritten in place and the others are left alone; ``hidden`` and ``latent`` are read, through data
dependencies, before they are written. MELT binds the same cache at every loop, a LoopLM one cache per loop.
With past tokens in the cache and C > 1, B must be 1 (a rule of GroupQueryAttention).

loop_int8.onnx, loop_int4.onnx: the same loop over a quantized KV cache, with scales per channel inside. Only the types
of the cache differ: int8 [B, Hk, S, dh], or uint8 [B, Hk, S, dh / 2], two values a byte, the first in the low nibble.

prompts.onnx, prompts_int8.onnx, prompts_int4.onnx, only where the bundle has them: the same loops, for passes of
several rows. Their matrices are 8-bit integers by column, whose products cost half for many rows and more for one.

head.onnx: the normed value to logits.

    in   hidden [B, C, D] float
    out  logits [B, C, V] float32

greedy.onnx, sample.onnx, only in bundles for CUDA: logits to the next token, without a copy of them to the host.

    in   logits [B, 1, V] float32
         temperature [], top_p [] float32, top_k [] int64   (sample only; V tokens: no top-k)
         uniform [B, 1] float32                   drawn by the host from [0, 1) (sample only)
    out  ids [B, 1] int64                         what embed.onnx reads next
         token [B, 1] int32                       the same for the host; -1 where a logit is not a number or
                                                  the largest is infinite

Every graph also says what its inputs and outputs cannot: under ``melt`` in its metadata stands a JSON object with
``precision``, ``activations`` and ``model.{field}`` for every field of ``ModelShape``, as the manifest has them.
"""

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, get_args

from annotated_types import Interval, Len

SCHEMA_VERSION = 5
"""Of ``manifest.json`` and of this contract; a reader refuses any other."""

Precision = Literal["float32", "float16", "bfloat16", "int8", "int4"]
"""Of weights. Floats are those of the activations; integers are rounded in blocks."""
Activations = Literal["float32", "float16", "bfloat16"]
"""Types of hidden states, latent states and the unquantized KV cache."""
PRECISIONS = get_args(Precision)
ACTIVATIONS = get_args(Activations)
INTEGERS = ("int8", "int4")
"""Precisions of weights that are rounded to integers."""
PROVIDERS = {"float32": ("cpu",), "float16": ("cuda", "cpu"), "bfloat16": ("cuda",)}
"""Devices that a bundle is made for, by activation type: whose execution provider has every operator in that type."""

GateKind = Literal["elementwise", "scalar", "ema", "mean", "last", "none"]
MAX_LOOPS = 1024
"""Most loops that may be asked for: far beyond what any model was trained with, and an answer still ends."""
CacheKind = Literal["shared", "per_loop"]
KVCacheKind = Literal["float", "int8", "int4"]
KV_CACHES: tuple[KVCacheKind, ...] = ("float", "int8", "int4")
"""How keys and values are stored; ``float`` is the activation type."""

# Upper bounds, far above any model: a number beyond them is damage, and would take the memory or never come back.
Depth = Annotated[int, Interval(ge=1, le=MAX_LOOPS)]
"""A count of layers or loops."""
Width = Annotated[int, Interval(ge=1, le=1 << 20)]
"""A size of the hidden state or the MLP, or a count of heads."""
Tokens = Annotated[int, Interval(ge=1, le=1 << 26)]
"""A count of token ids, or of tokens in a sequence."""
Name = Annotated[str, Len(1, 100)]
Dimension = Annotated[int, Interval(ge=0, le=1 << 26)] | Name
METADATA_KEY = "melt"
"""Of what a graph says of its model, see above."""


@dataclass(frozen=True)
class ModelShape:
    """What the runtime must know of a model.

    Attributes:
        trained_loops: loops T that the model was trained for; any other count from 1 to ``MAX_LOOPS`` may be asked for.
        trained_chunk: tokens processed in parallel in training, the default of prefill.
        max_positions: longest sequence that the rotary tables cover.
        cache_kind: ``shared``, one KV cache for all loops (MELT), or ``per_loop`` (LoopLM).
        has_latent: whether the gate has a latent state.
        has_exit_gate: whether the model says at every loop if it is done.
    """

    layers: Depth
    hidden_size: Width
    intermediate_size: Width
    heads: Width
    kv_heads: Width
    head_dim: Width
    vocab_size: Tokens
    max_positions: Tokens
    trained_loops: Depth
    trained_chunk: Tokens
    gate_kind: GateKind
    cache_kind: CacheKind
    has_latent: bool
    has_exit_gate: bool

    @property
    def has_loop_idx(self) -> bool:
        """Whether the loop graph is told which loop it runs."""
        return self.gate_kind == "mean"


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a graph: its name, its numpy type name, its shape with symbols for dynamic sizes."""

    name: Name
    dtype: Name
    shape: Annotated[tuple[Dimension, ...], Len(0, 8)]


@dataclass(frozen=True)
class GraphSpec:
    """Inputs and outputs of one graph, in order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def graph_metadata(shape: ModelShape, precision: str, activations: str) -> dict[str, Any]:
    """What every graph of a bundle says under ``METADATA_KEY``, before it becomes JSON."""
    model = {f"model.{name}": value for name, value in asdict(shape).items()}
    return {"precision": precision, "activations": activations, **model}


def activation_dtype(precision: str) -> str:
    """Activation type that weights of a precision have where nothing else is said."""
    return precision if precision in ACTIVATIONS else "float32"


def offered_kv_caches(activations: str) -> tuple[KVCacheKind, ...]:
    """Kinds of KV cache that bundles of an activation type have a loop for."""
    return KV_CACHES if activations == "float32" else ("float",)


def loop_graph(kv_cache: KVCacheKind) -> str:
    """Name of the loop graph over a kind of KV cache."""
    return "loop" if kv_cache == "float" else f"loop_{kv_cache}"


def prompt_graph(kv_cache: KVCacheKind) -> str:
    """Name of the loop graph for passes of several rows, over a kind of KV cache."""
    return "prompts" if kv_cache == "float" else f"prompts_{kv_cache}"


PROMPT_GRAPHS = tuple(map(prompt_graph, KV_CACHES))
"""Names of all graphs whose matrices stand in a file of their own, the copy for prompts."""


def cache_tensor(shape: ModelShape, dtype: str, kv_cache: KVCacheKind) -> tuple[str, int]:
    """Type of a KV cache's elements, and how many of them a head's row takes."""
    if kv_cache == "int4":
        return "uint8", shape.head_dim // 2
    return ("int8" if kv_cache == "int8" else dtype), shape.head_dim


def graph_specs(
    shape: ModelShape, dtype: str, kv_caches: tuple[KVCacheKind, ...] = ("float",), prompts: bool = False
) -> dict[str, GraphSpec]:
    """The contract of a bundle's graphs: embed, a loop for each kind of KV cache, head; for CUDA greedy and sample.

    Args:
        shape: the model.
        dtype: activation type.
        kv_caches: kinds of KV cache that the bundle offers.
        prompts: whether each has a loop for passes of several rows too.
    """
    hidden: tuple[Dimension, ...] = ("B", "C", shape.hidden_size)
    latent: tuple[Dimension, ...] = (shape.layers, *hidden)
    embed_outputs = [TensorSpec("hidden", dtype, hidden)]
    if shape.has_latent:
        embed_outputs.append(TensorSpec("latent", dtype, latent))
    loops = {loop_graph(kind): _loop_spec(shape, dtype, kind, hidden) for kind in kv_caches}
    if prompts:
        loops |= {prompt_graph(kind): loops[loop_graph(kind)] for kind in kv_caches}
    return {
        "embed": GraphSpec((TensorSpec("ids", "int64", ("B", "C")),), tuple(embed_outputs)),
        **loops,
        "head": GraphSpec(
            (TensorSpec("hidden", dtype, hidden),),
            (TensorSpec("logits", "float32", ("B", "C", shape.vocab_size)),),
        ),
        **(_sampling_specs(shape) if PROVIDERS[dtype][0] == "cuda" else {}),
    }


def _sampling_specs(shape: ModelShape) -> dict[str, GraphSpec]:
    logits = TensorSpec("logits", "float32", ("B", 1, shape.vocab_size))
    outputs = (TensorSpec("ids", "int64", ("B", 1)), TensorSpec("token", "int32", ("B", 1)))
    scalars = (
        TensorSpec("temperature", "float32", ()),
        TensorSpec("top_k", "int64", ()),
        TensorSpec("top_p", "float32", ()),
    )
    uniform = TensorSpec("uniform", "float32", ("B", 1))
    return {"greedy": GraphSpec((logits,), outputs), "sample": GraphSpec((logits, *scalars, uniform), outputs)}


def cache_names(layer_idx: int) -> tuple[tuple[str, str], tuple[str, str]]:
    """(input, output) names of one layer's keys, then of its values."""
    return (f"past_key.{layer_idx}", f"present_key.{layer_idx}"), (
        f"past_value.{layer_idx}",
        f"present_value.{layer_idx}",
    )


def latent_names(layer_idx: int) -> tuple[str, str]:
    """(input, output) names of one layer's latent state."""
    return f"latent.{layer_idx}", f"latent_out.{layer_idx}"


def _loop_spec(shape: ModelShape, dtype: str, kv_cache: KVCacheKind, hidden: tuple[Dimension, ...]) -> GraphSpec:
    cache_dtype, width = cache_tensor(shape, dtype, kv_cache)
    cache: tuple[Dimension, ...] = ("B", shape.kv_heads, "S", width)
    inputs = [TensorSpec("hidden", dtype, hidden)]
    outputs = [TensorSpec("hidden_out", dtype, hidden)]
    if shape.has_latent:
        for layer_idx in range(shape.layers):
            name_in, name_out = latent_names(layer_idx)
            inputs.append(TensorSpec(name_in, dtype, hidden))
            outputs.append(TensorSpec(name_out, dtype, hidden))
    for layer_idx in range(shape.layers):
        for name_in, name_out in cache_names(layer_idx):
            inputs.append(TensorSpec(name_in, cache_dtype, cache))
            outputs.append(TensorSpec(name_out, cache_dtype, cache))
    inputs.append(TensorSpec("seqlens_k", "int32", ("B",)))
    inputs.append(TensorSpec("total_sequence_length", "int32", ()))
    if shape.has_loop_idx:
        inputs.append(TensorSpec("loop_idx", "int64", ()))
    if shape.has_exit_gate:
        outputs.append(TensorSpec("exit_logit", dtype, ("B", "C", 1)))
    return GraphSpec(tuple(inputs), tuple(outputs))
