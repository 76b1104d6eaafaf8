"""Runs MELT bundles through ONNX Runtime: depth is a knob at run time, memory stays constant. No torch.

Example::

    from melt_runtime import MeltModel

    model = MeltModel.load("build/melt-tiny")
    print(model.generate("Ana reports to Ben. Ben reports to Cleo. Who is two levels above Ana?", loops=4).text)
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if find_spec("onnxruntime") is None:
    raise ImportError("melt_runtime needs ONNX Runtime, which is not installed: pip install 'melt-onnx[cpu]'")

from melt_runtime.batch import BatchStream
from melt_runtime.bundle.manifest import Manifest, read_manifest
from melt_runtime.device.cuda import CudaOptions
from melt_runtime.errors import (
    BatchError,
    BundleError,
    BusyError,
    CancelledError,
    CapacityError,
    MeltError,
    NumericalError,
    ProviderError,
    QueueError,
    RunError,
    SavedError,
    StreamError,
    TokenError,
)
from melt_runtime.loading.load_cache import LoadCache
from melt_runtime.memory.plan import plan_state
from melt_runtime.model import MeltModel
from melt_runtime.request.generation_config import GenerationConfig
from melt_runtime.request.result import GenerationResult, Timings
from melt_runtime.runner import LoopRunner
from melt_runtime.session import Session
from melt_runtime.stream import GenerationStream
from melt_runtime.text.codec import Message
from melt_runtime.version import __version__

if TYPE_CHECKING:
    from melt_runtime.asynchronous import AsyncMeltModel

__all__ = [
    "AsyncMeltModel",
    "BatchError",
    "BatchStream",
    "BundleError",
    "BusyError",
    "CancelledError",
    "CapacityError",
    "CudaOptions",
    "GenerationConfig",
    "GenerationResult",
    "GenerationStream",
    "LoadCache",
    "LoopRunner",
    "Manifest",
    "MeltError",
    "MeltModel",
    "Message",
    "NumericalError",
    "ProviderError",
    "QueueError",
    "RunError",
    "SavedError",
    "Session",
    "StreamError",
    "Timings",
    "TokenError",
    "__version__",
    "plan_state",
    "read_manifest",
]


def __getattr__(name: str) -> Any:
    """Imports ``AsyncMeltModel`` when it is asked for: the library of event loops takes a tenth of a second."""
    if name == "AsyncMeltModel":
        from melt_runtime.asynchronous import AsyncMeltModel

        return AsyncMeltModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
