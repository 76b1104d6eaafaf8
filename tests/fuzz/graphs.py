"""Damage to ONNX graphs: what a file may say that ONNX Runtime would read."""

import random

import onnx

_NUMBERS = (0, 1, -1, 2, 3, 5, 64, 1000, 2**31 - 1, 2**31, 2**40, 2**63 - 1, -(2**63))
_OPERATORS = ("Add", "Mul", "MatMul", "Identity", "Reshape", "Gather", "Softmax", "Nonsense", "GroupQueryAttention", "")


def edit_graph(content: bytes, chance: random.Random) -> tuple[bytes, str]:
    """Changes one thing in a graph."""
    model = onnx.load_from_string(content)
    how = chance.choice(list(_EDITS))
    return (model.SerializeToString(), how) if _EDITS[how](model, chance) else (content + b"\0", "one byte more")


def _attribute(model: onnx.ModelProto, chance: random.Random) -> bool:
    found = [attribute for node in model.graph.node for attribute in node.attribute]
    if not found:
        return False
    attribute = chance.choice(found)
    if attribute.type == onnx.AttributeProto.INT:
        attribute.i = chance.choice((*_NUMBERS, -attribute.i, attribute.i // 2, min(2 * attribute.i, 2**62)))
    elif attribute.type == onnx.AttributeProto.FLOAT:
        attribute.f = chance.choice((0.0, -1.0, 1e30, float("nan"), float("inf"), 2 * attribute.f))
    elif attribute.type == onnx.AttributeProto.STRING:
        attribute.s = chance.choice((b"", b"PER_TENSOR", b"nonsense", b"\xff"))
    else:
        attribute.type = chance.choice((0, 1, 2, 3, 7))
    return True


def _operator(model: onnx.ModelProto, chance: random.Random) -> bool:
    node = chance.choice(model.graph.node)
    node.op_type = chance.choice((*_OPERATORS, *(other.op_type for other in model.graph.node)))
    return True


def _domain(model: onnx.ModelProto, chance: random.Random) -> bool:
    chance.choice(model.graph.node).domain = chance.choice(("", "com.microsoft", "nowhere", "ai.onnx.ml"))
    return True


def _node(model: onnx.ModelProto, chance: random.Random) -> bool:
    place = chance.randrange(len(model.graph.node))
    if chance.random() < 0.5:
        del model.graph.node[place]
    else:
        model.graph.node.append(model.graph.node[place])
    return True


def _edge(model: onnx.ModelProto, chance: random.Random) -> bool:
    node = chance.choice(model.graph.node)
    side = chance.choice([side for side in (node.input, node.output) if len(side)] or [node.input])
    if not len(side):
        return False
    names = [name for other in model.graph.node for name in (*other.input, *other.output)]
    names += [tensor.name for tensor in model.graph.initializer]
    side[chance.randrange(len(side))] = chance.choice((*names, "", "nowhere"))
    return True


def _tensor(model: onnx.ModelProto, chance: random.Random) -> bool:
    if not model.graph.initializer:
        return False
    tensor = chance.choice(model.graph.initializer)
    if chance.random() < 0.3 and tensor.dims:
        tensor.dims[chance.randrange(len(tensor.dims))] = chance.choice(_NUMBERS)
    elif chance.random() < 0.3:
        tensor.data_type = chance.randrange(25)
    elif tensor.external_data:
        entry = chance.choice(tensor.external_data)
        odd = ("", "x", "../weights.data", "/etc/passwd", "nowhere", "\0", *map(str, _NUMBERS))
        entry.value = chance.choice(odd)
    return True


def _signature(model: onnx.ModelProto, chance: random.Random) -> bool:
    value = chance.choice([*model.graph.input, *model.graph.output])
    kind = value.type.tensor_type
    if chance.random() < 0.4 and kind.shape.dim:
        size = chance.choice(kind.shape.dim)
        if chance.random() < 0.5:
            size.dim_value = chance.choice(_NUMBERS)
        else:
            size.dim_param = chance.choice(("B", "C", "S", "Z", ""))
    elif chance.random() < 0.5:
        kind.elem_type = chance.randrange(25)
    else:
        value.name = chance.choice(("hidden", "logits", "", "nowhere", value.name + "x"))
    return True


def _version(model: onnx.ModelProto, chance: random.Random) -> bool:
    if chance.random() < 0.5:
        model.ir_version = chance.choice(_NUMBERS)
    else:
        chance.choice(model.opset_import).version = chance.choice(_NUMBERS)
    return True


def _metadata(model: onnx.ModelProto, chance: random.Random) -> bool:
    entry = chance.choice(model.metadata_props)
    entry.value = chance.choice(("", "{", "[]", "{}", "null", entry.value.replace("2", "3"), entry.value[:-2], "\0"))
    return True


_EDITS = {
    edit.__name__.strip("_"): edit
    for edit in (_attribute, _operator, _domain, _node, _edge, _tensor, _signature, _version, _metadata)
}
