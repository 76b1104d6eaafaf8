"""Opens a graph from a copy whose weights already lie as this machine's kernels read them.

As exported, ONNX Runtime lays out every matrix anew at each load, in private memory. The copy is made once, at first
load; after that it is mapped into memory: a load touches little, and processes share the pages. Results are the same
bit for bit. The copy holds for one version of ONNX Runtime and one kind of processor, so both are part of its key.
"""

import hashlib
import platform
import shutil
import warnings
from pathlib import Path

import onnxruntime as ort

from melt_runtime.errors import BundleError
from melt_runtime.load_cache import LoadCache
from melt_runtime.manifest import WEIGHTS_NAME, Manifest
from melt_runtime.providers import ProviderChoice, make_session, session_options

_GRAPH = "graph.onnx"
_DATA = "graph.data"
_MIN_EXTERNAL_BYTES = 1024
_ROOM = 2.5  # bytes of disk that a copy may take, over those of its bundle's weights


def open_graph(
    folder: Path, name: str, manifest: Manifest, choice: ProviderChoice, threads: int | None, cache: LoadCache
) -> ort.InferenceSession:
    """Opens one graph of a bundle, on the CPU through a prepacked copy where the bundle is large.

    A cache that cannot be written costs a warning and the time, nothing else.

    Args:
        folder: the bundle.
        name: of the graph.
        manifest: what the bundle says of itself; its files are as it says.
        choice: the provider.
        threads: CPU threads inside an operator.
        cache: where copies are kept.

    Raises:
        BundleError: ONNX Runtime cannot read the graph.
    """
    path = folder / f"{name}.onnx"
    # Rows of an embedding are read as they stand in the bundle, mapped into memory already.
    if name == "embed" or choice.device != "cpu" or manifest.weight_bytes < cache.min_bytes:
        return make_session(path, choice, threads)
    key = _key(manifest, f"{name}.onnx")
    if cache.find(key) is None:
        try:
            _require_disk(cache, manifest.weight_bytes)
            with cache.making(key, f"{path.resolve()}") as made:
                _write_copy(path, made, choice)
        except (OSError, BundleError) as error:
            # One warning a process and place: Python shows equal warnings once.
            message = f"no prepacked copy in {cache.folder}, every load will be slow and take memory of its own: {error}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
    copy = cache.find(key)
    if copy is None:
        return make_session(path, choice, threads)
    options = session_options(threads)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # the copy is optimized already
    try:
        return make_session(copy / _GRAPH, choice, options=options)
    except BundleError:
        shutil.rmtree(copy, ignore_errors=True)  # damaged in a way that its size and time do not show
        return open_graph(folder, name, manifest, choice, threads, cache)


def _write_copy(path: Path, made: Path, choice: ProviderChoice) -> None:
    options = session_options()
    options.optimized_model_filepath = str(made / _GRAPH)
    for entry, value in (
        ("session.optimized_model_external_initializers_file_name", _DATA),
        ("session.optimized_model_external_initializers_min_size_in_bytes", str(_MIN_EXTERNAL_BYTES)),
        ("session.save_external_prepacked_constant_initializers", "1"),
    ):
        options.add_session_config_entry(entry, value)
    make_session(path, choice, options=options)


def _key(manifest: Manifest, graph: str) -> str:
    parts = [ort.__version__, _processor(), manifest.files[graph].sha256, manifest.files[WEIGHTS_NAME].sha256]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _processor() -> str:
    """The kind of processor, with what it can do where the system says."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    known = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(known)}))


def _require_disk(cache: LoadCache, weight_bytes: int) -> None:
    """Refuses what does not fit, before it is written."""
    needed = int(_ROOM * weight_bytes)
    if needed > cache.limit:
        raise OSError(f"it may take {needed} bytes, the cache {cache.limit}: set MELT_CACHE_GB higher")
    cache.folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache.folder).free
    if free < needed:
        raise OSError(f"it may take {needed} bytes, the disk has {free} left: set MELT_CACHE_DIR to a larger one")
