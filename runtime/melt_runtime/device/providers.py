"""Execution providers: which one runs, why, and the sessions it runs in. Knows nothing of language models."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from melt_runtime.arguments import instance, shown, whole_number
from melt_runtime.bundle.contract import PROVIDERS
from melt_runtime.device.cuda import PROVIDER, CudaOptions, cuda_obstacle, has_driver
from melt_runtime.device.integers import EXACT_PRODUCTS, overflows
from melt_runtime.device.ort import ort
from melt_runtime.errors import BundleError, ProviderError

DeviceKind = Literal["cpu", "cuda"]
DEVICES = ("cpu", "cuda", "auto")
_MOST_DIGITS = 9  # of a device's number; CUDA counts in 32 bits

ORT_TYPES = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "bfloat16": "tensor(bfloat16)",
    "int8": "tensor(int8)",
    "uint8": "tensor(uint8)",
    "int64": "tensor(int64)",
    "int32": "tensor(int32)",
}
"""What ONNX Runtime calls numpy's types."""

_CPU = "CPUExecutionProvider"


@dataclass(frozen=True)
class ProviderChoice:
    """The provider taken.

    Attributes:
        device: ``cpu`` or ``cuda``.
        reason: why, in one line.
        device_id: which of several CUDA devices.
        cuda: how it is used.
    """

    device: DeviceKind
    reason: str
    device_id: int = 0
    cuda: CudaOptions = field(default_factory=CudaOptions)

    @property
    def name(self) -> str:
        """What ONNX Runtime calls the provider."""
        return PROVIDER if self.device == "cuda" else _CPU

    @property
    def providers(self) -> list[Any]:
        """What the sessions are asked to run on."""
        if self.device == "cpu":
            return [_CPU]
        return [(PROVIDER, self.cuda.provider_options(self.device_id))]


def choose_provider(device: str, activations: str, cuda: CudaOptions | None = None) -> ProviderChoice:
    """Decides where to run a bundle.

    Args:
        device: ``cpu``, ``cuda``, ``cuda:1`` for another than the first, or ``auto``.
        activations: type of the bundle's activations.
        cuda: how to use a CUDA device.

    Raises:
        ValueError: ``device`` is none of these.
        ProviderError: the bundle was made for another device, or ``cuda`` was asked for and cannot run here.
    """
    kind, colon, number = instance("device", device, str, f"one of {', '.join(DEVICES)}, or cuda:N").partition(":")
    numbered = kind == "cuda" and number.isdecimal() and len(number) <= _MOST_DIGITS
    if kind not in DEVICES or (colon and not numbered):
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, or cuda:N, got {shown(device)}")
    device_id, made_for = int(number or 0), PROVIDERS[activations]
    if kind == "cpu":
        if "cpu" not in made_for:
            raise ProviderError(_mismatch("cpu", activations))
        return ProviderChoice("cpu", "device='cpu' was asked for")
    obstacle = cuda_obstacle(device_id)
    if obstacle is None and "cuda" not in made_for:
        obstacle = _mismatch("cuda", activations)
    if obstacle is None:
        options = CudaOptions() if cuda is None else cuda
        return ProviderChoice("cuda", "the CUDA execution provider can run here", device_id, options)
    if kind == "cuda":
        raise ProviderError(f"device={device!r} cannot run here: {obstacle}; use device='cpu', or see: melt doctor")
    if "cpu" not in made_for:
        raise ProviderError(f"{_mismatch('cpu', activations)}; and CUDA cannot run here: {obstacle}")
    if not has_driver():
        return ProviderChoice("cpu", "there is no other device")
    return ProviderChoice("cpu", f"CUDA cannot run here: {obstacle}")


def _mismatch(device: DeviceKind, activations: str) -> str:
    """Says what a bundle was made for, and the command that makes the right one."""
    right = "--precision int4" if device == "cpu" else "--precision int4 --activations float16"
    made_for = " or ".join(PROVIDERS[activations])
    return (
        f"this bundle was made for {made_for} ({activations} activations), not for {device}: "
        f"make another with melt-export CHECKPOINT --out BUNDLE {right}"
    )


def check_threads(threads: int | None) -> None:
    """Refuses more threads than processors: they would wait for each other.

    Raises:
        ValueError: no whole number from 1 to the number of processors, nor None.
    """
    if threads is not None:
        most = os.cpu_count() or 1
        whole_number("threads", threads, 1, most, f" ({most} processors)")


def session_options(threads: int | None = None) -> ort.SessionOptions:
    """Options of every session.

    Args:
        threads: threads inside an operator; default: one per physical core.

    Raises:
        ValueError: ``threads`` outside its rule.
    """
    check_threads(threads)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    # The three graphs alternate within a token; workers that spin after one would take the cores from the next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if overflows():
        options.add_session_config_entry(*EXACT_PRODUCTS)
    return options


def make_session(
    path: Path, choice: ProviderChoice, threads: int | None = None, options: ort.SessionOptions | None = None
) -> ort.InferenceSession:
    """Opens a graph on the chosen provider, and only on it.

    Args:
        path: the graph.
        choice: the provider.
        threads: see ``session_options``.
        options: in place of ``session_options(threads)``.

    Raises:
        BundleError: ONNX Runtime cannot read the graph.
        ProviderError: the session runs on another provider than the one chosen.
    """
    options = session_options(threads) if options is None else options
    if choice.device == "cuda":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        # Its own fallback would print to standard output and try the same again.
        session = ort.InferenceSession(path, options, providers=choice.providers, enable_fallback=0)
    except Exception as error:  # ONNX Runtime has no common base class below Exception
        raise BundleError(f"ONNX Runtime cannot load {path.name} on {choice.device}: {error}") from error
    if session.get_providers()[0] != choice.name:
        raise ProviderError(f"{path.name} was asked to run on {choice.name}, runs on {session.get_providers()}")
    return session
