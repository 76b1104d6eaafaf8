"""Opens a graph from a copy whose weights already lie as this machine's kernels read them.

As exported, ONNX Runtime lays out every matrix anew at each load, in private memory. The copy is made once, at first
load; after that it is mapped into memory: a load touches little, and processes share the pages. Results are the same
bit for bit, which is checked when it is made: a graph whose copy differs is loaded as exported. The copy holds for one
version of ONNX Runtime and one kind of processor, so both are part of its key.
"""

import hashlib
import platform
import shutil
import warnings
from pathlib import Path

import numpy as np

from melt_runtime.bundle.contract import PROMPT_GRAPHS, GraphSpec
from melt_runtime.bundle.manifest import PROMPT_WEIGHTS_NAME, WEIGHTS_NAME, Manifest
from melt_runtime.device.ort import ort
from melt_runtime.device.processor import cpuinfo
from melt_runtime.device.providers import ProviderChoice, make_session, session_options
from melt_runtime.errors import BundleError
from melt_runtime.loading.load_cache import LoadCache
from melt_runtime.memory.plan import stored_type
from melt_runtime.progress import Report

_GRAPH = "graph.onnx"
_DATA = "graph.data"
_MIN_EXTERNAL_BYTES = 1024
_PROBED_CHUNKS = (1, 16)  # a decoded token and a prompt run different kernels
_TRIES = 3
_ROOM = 2.5  # bytes of disk that a copy may take, over those of its bundle's weights


def open_graph(
    folder: Path,
    name: str,
    manifest: Manifest,
    choice: ProviderChoice,
    threads: int | None,
    cache: LoadCache,
    progress: Report,
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
        progress: told where a copy is made.

    Raises:
        BundleError: ONNX Runtime cannot read the graph.
    """
    path = folder / f"{name}.onnx"
    # Rows of an embedding are read as they stand in the bundle, mapped into memory already.
    if name == "embed" or choice.device != "cpu" or manifest.weight_bytes < cache.min_bytes:
        return make_session(path, choice, threads)
    key = _key(manifest, name)
    obstacle: str | Exception = "it is deleted again and again"
    for _ in range(_TRIES):
        try:
            copy = cache.find(key)
            if copy is None:
                progress(f"making a copy of {name}.onnx that the next load is fast from", 0, 0)
                copy = _make_copy(key, path, manifest, choice, cache)
        except (OSError, BundleError) as error:
            obstacle = error
            break
        if copy is None:
            continue
        if not (copy / _GRAPH).is_file():  # it only notes that a copy would not compute the same
            return make_session(path, choice, threads)
        try:
            return _open_copy(copy, choice, threads)
        except BundleError as error:  # damaged in a way that its size and time do not show, or deleted by another
            obstacle = error
            cache.remove(key)
    # One warning a process and place: Python shows equal warnings once.
    message = f"no prepacked copy in {cache.folder}, every load will be slow and take memory of its own: {obstacle}"
    warnings.warn(message, RuntimeWarning, stacklevel=2)
    return make_session(path, choice, threads)


def _make_copy(key: str, path: Path, manifest: Manifest, choice: ProviderChoice, cache: LoadCache) -> Path | None:
    """Makes the copy; None where another process deleted it at once."""
    copied = manifest.prompts if path.stem in PROMPT_GRAPHS else None
    _require_disk(cache, manifest.weight_bytes if copied is None else copied.weight_bytes)
    with cache.making(key, f"{path.resolve()}") as made:
        _write_copy(path, made, manifest.graphs[path.stem], choice)
    return cache.find(key)


def _open_copy(copy: Path, choice: ProviderChoice, threads: int | None = None) -> ort.InferenceSession:
    options = session_options(threads)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # the copy is optimized already
    return make_session(copy / _GRAPH, choice, options=options)


def _write_copy(path: Path, made: Path, spec: GraphSpec, choice: ProviderChoice) -> None:
    """Writes the copy, or nothing where it would not compute the same.

    ONNX Runtime 1.31 does not align matrices of less than a mebibyte in the file, and its kernels for quantized ones
    read them wrongly then. So the copy is run beside the original, and must agree bit for bit.
    """
    options = session_options()
    options.optimized_model_filepath = str(made / _GRAPH)
    for entry, value in (
        ("session.optimized_model_external_initializers_file_name", _DATA),
        ("session.optimized_model_external_initializers_min_size_in_bytes", str(_MIN_EXTERNAL_BYTES)),
        ("session.save_external_prepacked_constant_initializers", "1"),
    ):
        options.add_session_config_entry(entry, value)
    original = make_session(path, choice, options=options)
    if not all(_agree(original, _open_copy(made, choice), spec, chunk) for chunk in _PROBED_CHUNKS):
        for file in made.iterdir():
            file.unlink()


def _agree(original: ort.InferenceSession, copy: ort.InferenceSession, spec: GraphSpec, chunk: int) -> bool:
    """Whether both graphs give the same bits for one chunk of random activations."""
    draw = np.random.default_rng(0)
    sizes = {"B": 1, "C": chunk, "S": chunk}
    feeds = {}
    for tensor in spec.inputs:
        shape = [size if isinstance(size, int) else sizes[size] for size in tensor.shape]
        dtype = stored_type(tensor.dtype)
        floats = np.issubdtype(dtype, np.floating)
        feeds[tensor.name] = draw.standard_normal(shape).astype(dtype) if floats else np.zeros(shape, dtype)
    if "seqlens_k" in feeds:
        feeds["seqlens_k"][:] = chunk - 1
        feeds["total_sequence_length"][...] = chunk
    try:
        pairs = list(zip(original.run(None, feeds), copy.run(None, feeds), strict=True))
    except Exception as error:  # ONNX Runtime has no common base class below Exception
        raise BundleError(f"ONNX Runtime cannot run it: {error}") from error
    return all(np.array_equal(one, other) for one, other in pairs)


def _key(manifest: Manifest, graph: str) -> str:
    files = [f"{graph}.onnx", WEIGHTS_NAME, *([PROMPT_WEIGHTS_NAME] if graph in PROMPT_GRAPHS else [])]
    parts = [ort.__version__, _processor(), *(manifest.files[name].sha256 for name in files)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _processor() -> str:
    """The kind of processor, with what it can do where the system says."""
    lines = set(cpuinfo("model name", "flags", "Features", "CPU part"))
    return "\n".join(sorted(lines)) or f"{platform.machine()} {platform.processor()}"


def _require_disk(cache: LoadCache, weight_bytes: int) -> None:
    """Refuses what does not fit, before it is written."""
    needed = int(_ROOM * weight_bytes)
    if needed > cache.limit:
        raise OSError(f"it may take {needed} bytes, the cache {cache.limit}: set MELT_CACHE_GB higher")
    cache.make_folder()
    free = shutil.disk_usage(cache.folder).free
    if free < needed:
        raise OSError(f"it may take {needed} bytes, the disk has {free} left: set MELT_CACHE_DIR to a larger one")
