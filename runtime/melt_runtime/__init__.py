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
from melt_runtime.bundle.contract import GraphSpec, KVCacheKind, ModelShape, TensorSpec
from melt_runtime.bundle.manifest import FileEntry, Manifest, Prompts, Quantization, read_manifest
from melt_runtime.bundle.measured import (
    CacheQuality,
    Difference,
    LossLimit,
    Parity,
    ParityRun,
    PromptQuality,
    Quality,
    WaveQuality,
)
from melt_runtime.device.cuda import CudaOptions
from melt_runtime.device.providers import ProviderChoice
from melt_runtime.errors import (
    BatchError,
    BundleError,
    BusyError,
    CancelledError,
    CapacityError,
    ClosedError,
    MeltError,
    NumericalError,
    ProviderError,
    QueueError,
    RunError,
    SavedError,
    StreamError,
    TokenError,
)
from melt_runtime.loading.load_cache import CacheEntry, Cleared, LoadCache
from melt_runtime.memory.plan import RowCounts, StatePlan, plan_state
from melt_runtime.model import MeltModel
from melt_runtime.progress import Progress, Report
from melt_runtime.reply import Part, Reply, Submission
from melt_runtime.request.generation_config import GenerationChanges, GenerationConfig, LogitsProcessor
from melt_runtime.request.logprobs import TokenLogprob
from melt_runtime.request.prompts import EncodedPrompt, Prompt
from melt_runtime.request.request import Request
from melt_runtime.request.result import FinishReason, GenerationResult, Timings
from melt_runtime.runner import LoopRunner
from melt_runtime.schedule.wave import Drafts
from melt_runtime.service import Load, Service
from melt_runtime.session import Session
from melt_runtime.stream import GenerationStream, Held
from melt_runtime.text.codec import Message, TextCodec
from melt_runtime.text.detokenizer import StreamDecoder
from melt_runtime.text.stops import StopMatcher
from melt_runtime.version import __version__

if TYPE_CHECKING:
    from melt_runtime.asynchronous import AsyncGenerationStream, AsyncMeltModel

__all__ = [
    "AsyncGenerationStream",
    "AsyncMeltModel",
    "BatchError",
    "BatchStream",
    "BundleError",
    "BusyError",
    "CacheEntry",
    "CacheQuality",
    "CancelledError",
    "CapacityError",
    "Cleared",
    "ClosedError",
    "CudaOptions",
    "Difference",
    "Drafts",
    "EncodedPrompt",
    "FileEntry",
    "FinishReason",
    "GenerationChanges",
    "GenerationConfig",
    "GenerationResult",
    "GenerationStream",
    "GraphSpec",
    "Held",
    "KVCacheKind",
    "Load",
    "LoadCache",
    "LogitsProcessor",
    "LoopRunner",
    "LossLimit",
    "Manifest",
    "MeltError",
    "MeltModel",
    "Message",
    "ModelShape",
    "NumericalError",
    "Parity",
    "ParityRun",
    "Part",
    "Progress",
    "Prompt",
    "PromptQuality",
    "Prompts",
    "ProviderChoice",
    "ProviderError",
    "Quality",
    "Quantization",
    "QueueError",
    "Reply",
    "Report",
    "Request",
    "RowCounts",
    "RunError",
    "SavedError",
    "Service",
    "Session",
    "StatePlan",
    "StopMatcher",
    "StreamDecoder",
    "StreamError",
    "Submission",
    "TensorSpec",
    "TextCodec",
    "Timings",
    "TokenError",
    "TokenLogprob",
    "WaveQuality",
    "__version__",
    "plan_state",
    "read_manifest",
]


def __getattr__(name: str) -> Any:
    """Imports what is asynchronous when it is asked for: the library of event loops takes a tenth of a second."""
    if name in ("AsyncGenerationStream", "AsyncMeltModel"):
        from melt_runtime import asynchronous

        return getattr(asynchronous, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
