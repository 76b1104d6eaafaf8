"""Every tolerance of the tests, by level and type: largest absolute difference."""

# L3: random weights, torch against ONNX Runtime, every tensor after every loop.
PARITY = {"float32": 1e-4, "float16": 4e-2}

# L4: logits of melt-tiny against the committed goldens, made on another machine.
GOLDEN_LOGITS = 1e-3


def describe(actual, expected) -> str:
    """What a failure prints: largest and mean difference, and whether the greedy choice changed."""
    difference = abs(actual - expected)
    changed = (actual.argmax(-1) != expected.argmax(-1)).any()
    return f"max {difference.max():.3g}, mean {difference.mean():.3g}, argmax {'changed' if changed else 'equal'}"
