"""ONNX Runtime without its telemetry: the only file of the runtime and the exporter that imports ``onnxruntime``.

Official builds from 1.29 on have telemetry. The import itself starts it: it stores a device id and a database of events
below the user's cache folder (or warns, where that cannot be written) and uploads events to Microsoft while the process
runs. ``ORT_DISABLE_TELEMETRY`` is read once, at that import, so this module sets it first: an exception to the rule
that nothing happens at import. Child processes inherit the variable. ``ORT_DISABLE_TELEMETRY=0`` keeps telemetry.
"""

import os
import sys

VARIABLE = "ORT_DISABLE_TELEMETRY"
_OFF = frozenset({"1", "true", "yes", "on", "y"})
"""Values that ONNX Runtime takes as a yes; with any other one its telemetry runs."""
_KEEP = frozenset({"0", "false", "no", "off", "n"})


def _value() -> str:
    return os.environ.get(VARIABLE, "").strip().lower()


def _state() -> str:
    if _value() in _KEEP:
        return f"on, as {VARIABLE}={os.environ[VARIABLE]} asks"
    if "onnxruntime" in sys.modules and _value() not in _OFF:
        return f"on: onnxruntime was imported before melt_runtime; set {VARIABLE}=1 before that import"
    return "off"


TELEMETRY = _state()
"""The state of ONNX Runtime's telemetry in this process: ``off``, or ``on`` with the reason."""

if _value() not in _OFF | _KEEP:
    os.environ[VARIABLE] = "1"

import onnxruntime as ort  # noqa: E402

if _value() in _OFF:
    # Stops what the variable does not govern: event tracing of Windows builds and, when another module imported
    # onnxruntime first, the events after those of its start.
    ort.disable_telemetry_events()

__all__ = ["TELEMETRY", "VARIABLE", "ort"]
