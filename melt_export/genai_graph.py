"""One decoder graph with a fixed number of loops, in the form that ONNX Runtime GenAI loads unchanged.

GenAI binds one past and present buffer for each layer: MELT's cache, where a LoopLM would need one for each loop. The
graph is put together from a bundle's three: embedding, an ONNX ``Loop`` whose body is the loop graph, head. The weights
are the bundle's file.

Inside the body, attention reads the graph's own ``past_key_values`` and lays its present rows in scratch memory that
the next layer uses again: only the outermost graph's outputs can be bound to the buffers of its inputs. After the last
loop one more attention a layer, whose result nobody reads, writes the chunk's final rows into the shared buffer. An
unrolled graph would need neither, but ONNX Runtime packs a weight once for every node that reads it, T times.
"""

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from melt_export.weights import onnx_type
from melt_runtime.bundle.contract import ModelShape

LOOPS_KEY = "melt.loops"
"""The graph's metadata say how many loops it runs."""
PAST, PRESENT = "past_key_values", "present"


def join_graphs(parts: Mapping[str, ir.Model], shape: ModelShape, dtype: str, loops: int) -> ir.Model:
    """The decoder graph; the models in ``parts`` are used up.

    Inputs: ``input_ids`` [B, C] int64, ``attention_mask`` [B, past + C] int64, ``past_key_values.{layer}.key`` and
    ``.value`` [B, Hk, S, dh]. Outputs: ``logits`` [B, 1, V] of the last token, ``present.{layer}.key`` and ``.value``,
    to be bound to the buffers of their inputs.

    Args:
        parts: a bundle's ``embed``, ``loop`` and ``head``.
        shape: the bundle's model.
        dtype: activation type.
        loops: how often the loop runs.
    """
    return _Joiner(parts, shape, dtype, loops).join()


class _Joiner:
    """The graph while it grows."""

    def __init__(self, parts: Mapping[str, ir.Model], shape: ModelShape, dtype: str, loops: int):
        self.embed, self.loop, self.head = (parts[name].graph for name in ("embed", "loop", "head"))
        self.opsets = dict(self.loop.opset_imports)
        self.shape, self.dtype, self.loops = shape, onnx_type(dtype), loops
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []

    def join(self) -> ir.Model:
        shape, layers = self.shape, range(self.shape.layers)
        ids = ir.val("input_ids", ir.DataType.INT64, ("B", "C"))
        mask = ir.val("attention_mask", ir.DataType.INT64, ("B", "past_and_C"))
        cache = ("B", shape.kv_heads, "S", shape.head_dim)
        parts = [(layer, part) for layer in layers for part in ("key", "value")]
        pasts = {where: ir.val(f"{PAST}.{where[0]}.{where[1]}", self.dtype, cache) for where in parts}
        lengths = self.lengths(mask)
        hidden = self.inline(self.embed, "embed", {"ids": ids})["hidden"]
        zeros = self.add("Sub", (hidden, hidden), "zeros") if shape.has_latent else None
        hidden, rows = self.run_loops(hidden, zeros, pasts, lengths)
        presents = self.write_rows(rows, pasts, lengths, cache)
        bounds = [self.constant(name, [value]) for name, value in (("last", -1), ("end", 2**31), ("axis", 1))]
        last = self.add("Slice", (hidden, *bounds), "last_hidden")
        logits = self.inline(self.head, "head", {"hidden": last})["logits"]
        logits.name, logits.shape = "logits", ir.Shape(("B", 1, shape.vocab_size))
        graph = ir.Graph(
            (ids, mask, *pasts.values()),
            (logits, *presents),
            nodes=self.nodes,
            initializers=self.initializers,
            opset_imports=self.opsets,
            name="decoder",
        )
        model = ir.Model(graph, ir_version=10, producer_name="melt-onnx")
        model.metadata_props[LOOPS_KEY] = str(self.loops)
        return model

    def lengths(self, mask: ir.Value) -> tuple[ir.Value, ir.Value]:
        """``seqlens_k`` [B] and ``total_sequence_length`` [], int32, out of the attention mask."""
        one, axis = self.constant("one", [1]), self.constant("mask_axis", [1])
        to_int32 = {"to": ir.DataType.INT32}
        count = self.add("ReduceSum", (mask, axis), "count", {"keepdims": 0})
        seqlens = self.add("Cast", (self.add("Sub", (count, one), "last_row"),), "seqlens_k", to_int32)
        columns = self.add("Shape", (mask,), "columns", {"start": 1, "end": 2})
        total = self.add("Squeeze", (columns, self.constant("first", [0])), "total")
        return seqlens, self.add("Cast", (total,), "total_sequence_length", to_int32)

    def run_loops(
        self,
        hidden: ir.Value,
        zeros: ir.Value | None,
        pasts: dict[tuple[int, str], ir.Value],
        lengths: tuple[ir.Value, ir.Value],
    ) -> tuple[ir.Value, list[ir.Value]]:
        """The normed value after the last loop, and that loop's keys and values of every layer, before rotation."""
        layers = range(self.shape.layers)
        step, go_on = ir.val("loop_idx", ir.DataType.INT64, ()), ir.val("go_on", ir.DataType.BOOL, ())
        state = [ir.val("hidden_in", self.dtype, ("B", "C", self.shape.hidden_size))]
        if zeros is not None:
            state += [ir.val(f"latent_in.{i}", self.dtype, ("B", "C", self.shape.hidden_size)) for i in layers]
        width = self.shape.kv_heads * self.shape.head_dim
        unread = [ir.val(f"{part}_rows_in.{i}", self.dtype, ("B", "C", width)) for i in layers for part in "kv"]
        places = {"hidden": state[0], "loop_idx": step}
        places |= {f"latent.{i}": value for i, value in enumerate(state[1:])}
        places |= {f"past_{part}.{layer}": value for (layer, part), value in pasts.items()}
        places |= dict(zip(("seqlens_k", "total_sequence_length"), lengths, strict=True))
        outer, self.nodes = self.nodes, []
        attentions = [node for node in self.loop if node.op_type == "GroupQueryAttention"]
        results = self.inline(self.loop, "loop", places)
        rows = [value for node in attentions for value in node.inputs[1:3]]
        for node in attentions:
            self.release(node)
        following = [results["hidden_out"], *(results[f"latent_out.{i}"] for i in layers if zeros is not None)]
        carried_on = self.add("Identity", (go_on,), "carried_on")
        body = ir.Graph((step, go_on, *state, *unread), (carried_on, *following, *rows), nodes=self.nodes, name="loop")
        body.sort()  # the reshapings were added last
        self.nodes = outer
        empty = self.constant("no_rows", [[[0.0]]], self.dtype)
        start = [hidden, *([zeros] * len(state[1:])), *([empty] * len(unread))]
        trips = self.constant("loops", self.loops)
        after = [ir.val(f"after.{value.name}", self.dtype, value.shape) for value in (*state, *unread)]
        node = ir.node("Loop", (trips, None, *start), {"body": body}, outputs=after)
        self.nodes.append(node)
        return node.outputs[0], list(node.outputs[len(state) :])

    def release(self, attention: ir.Node) -> None:
        """Frees the scratch memory of an attention before the next layer takes its own.

        ONNX Runtime frees a value after its last reader, and one without readers at the end. So the result passes
        through a reshaping to the shape that it has, whose batch size is read off the scratch.
        """
        attended, *scratch = attention.outputs
        name = str(attended.name)
        sizes = [self.add("Shape", (value,), f"{value.name}/batch", {"end": 1}) for value in scratch]
        batch = self.add("Max", sizes, f"{name}/batch")
        width = self.constant(f"{name}/rest", [-1, self.shape.heads * self.shape.head_dim])
        target = self.add("Concat", (batch, width), f"{name}/shape", {"axis": 0})
        reshaped = self.add("Reshape", (attended, target), f"{name}/reshaped")
        users = [use for use in attended.uses() if use.node is not reshaped.producer()]
        for user, place in users:
            user.replace_input_with(place, reshaped)

    def write_rows(
        self,
        rows: list[ir.Value],
        pasts: dict[tuple[int, str], ir.Value],
        lengths: tuple[ir.Value, ir.Value],
        cache: Sequence[int | str],
    ) -> list[ir.Value]:
        """Attention for what it leaves in the cache; its queries are the keys, whatever they find."""
        tables = [value for value in self.initializers if value.name in ("loop/cos", "loop/sin")]
        tables.sort(key=lambda value: str(value.name))
        heads = self.shape.kv_heads
        presents = []
        for layer in range(self.shape.layers):
            keys, values = rows[2 * layer : 2 * layer + 2]
            outputs = [ir.val(f"unread.{layer}", self.dtype, keys.shape)]
            outputs += [ir.val(f"{PRESENT}.{layer}.{part}", self.dtype, cache) for part in ("key", "value")]
            operands = (keys, keys, values, pasts[layer, "key"], pasts[layer, "value"], *lengths, *tables)
            attributes = {"num_heads": heads, "kv_num_heads": heads, "do_rotary": 1, "local_window_size": 1}
            node = ir.node("GroupQueryAttention", operands, attributes, domain="com.microsoft", outputs=outputs)
            self.nodes.append(node)
            presents += outputs[1:]
        return presents

    def inline(self, graph: ir.Graph, prefix: str, places: dict[str, ir.Value]) -> dict[str, ir.Value]:
        """Moves a graph's nodes and weights here; ``places`` says what its inputs are. Returns its outputs by name."""
        outputs = {str(value.name): value for value in graph.outputs}
        graph.outputs.clear()
        for value in graph.inputs:
            ir.convenience.replace_all_uses_with(value, places[str(value.name)])
        nodes = list(graph)
        graph.remove(nodes)
        weights = list(graph.initializers.values())
        graph.initializers.clear()
        for node in nodes:
            node.name = f"{prefix}/{node.name}"
        for value in (*weights, *(value for node in nodes for value in node.outputs)):
            if value.name:
                value.name = f"{prefix}/{value.name}"
        self.initializers += weights
        self.nodes += nodes
        return outputs

    def add(self, operator: str, inputs: Sequence[ir.Value], name: str, attributes: dict | None = None) -> ir.Value:
        """One more node of a standard operator with one output."""
        self.nodes.append(ir.node(operator, inputs, attributes, outputs=[ir.Value(name=name)]))
        return self.nodes[-1].outputs[0]

    def constant(self, name: str, values: object, dtype: ir.DataType = ir.DataType.INT64) -> ir.Value:
        """A small constant, of the shape of ``values``."""
        tensor = ir.tensor(values, dtype=dtype, name=name)
        value = ir.val(name, dtype, tensor.shape, const_value=tensor)
        self.initializers.append(value)
        return value
