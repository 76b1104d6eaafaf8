"""Opens a bundle on a device: its files checked, its memory found to suffice, its graphs as the manifest says."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from melt_runtime.contract import GraphSpec, KVCacheKind, loop_graph
from melt_runtime.cuda import free_memory
from melt_runtime.errors import BundleError, ProviderError
from melt_runtime.load_cache import LoadCache
from melt_runtime.loop import Sessions
from melt_runtime.manifest import Manifest, check_files
from melt_runtime.plan import StatePlan
from melt_runtime.prepacked import open_graph
from melt_runtime.providers import ORT_TYPES, ProviderChoice, make_session

_LIBRARY_ROOM = 256 << 20


def check_bundle(folder: Path, manifest: Manifest, cache: LoadCache) -> None:
    """Compares every file with the manifest; large bundles only once, as long as their files do not change.

    Raises:
        BundleError: lists every file that is missing, truncated, longer or altered.
    """
    if manifest.weight_bytes < cache.min_bytes:
        check_files(folder, manifest)
        return
    unchanged = cache.unchanged(folder, manifest)
    check_files(folder, manifest, unchanged)
    if unchanged != frozenset(manifest.files):
        with suppress(OSError):  # then it is compared again next time; the prepacked copy's warning names the folder
            cache.remember(folder, manifest)


def require_memory(provider: ProviderChoice, manifest: Manifest, plan: StatePlan) -> None:
    """Refuses a CUDA device whose free memory does not hold weights and state.

    Raises:
        ProviderError: says what is needed, what is free and what to lower.
    """
    free = free_memory(provider.device_id) if provider.device == "cuda" else None
    needed = manifest.weight_bytes + plan.total_bytes
    if free is not None and free < needed:
        raise ProviderError(
            f"CUDA device {provider.device_id} has {free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB are needed "
            f"({manifest.weight_bytes / 1e9:.2f} of weights, {plan.total_bytes / 1e9:.2f} of state): lower capacity "
            f"(now {plan.capacity}), or export to fewer bits"
        )


def with_memory_limit(provider: ProviderChoice, manifest: Manifest, plan: StatePlan) -> ProviderChoice:
    """Bounds the arenas of a CUDA device where the caller did not: weights, four times the intermediate results that a
    CPU was seen to take, and room for the libraries' own work."""
    if provider.device != "cuda" or provider.cuda.memory_limit is not None:
        return provider
    limit = manifest.weight_bytes + 4 * plan.activation_bytes + _LIBRARY_ROOM
    return replace(provider, cuda=replace(provider.cuda, memory_limit=limit))


def open_sessions(
    folder: Path,
    manifest: Manifest,
    provider: ProviderChoice,
    threads: int | None = None,
    kv_cache: KVCacheKind = "float",
    cache: LoadCache | None = None,
) -> Sessions:
    """Opens a bundle's graphs and compares their inputs and outputs with its manifest.

    Args:
        folder: the bundle.
        manifest: what it says of itself.
        provider: where to run.
        threads: CPU threads inside an operator.
        kv_cache: which of the bundle's loops.
        cache: for prepacked copies; default: none are made or used.

    Raises:
        BundleError: a graph that cannot be read, or is another than the manifest says.
    """
    opened = {}
    for role, name in (("embed", "embed"), ("loop", loop_graph(kv_cache)), ("head", "head")):
        if cache is None:
            opened[role] = make_session(folder / f"{name}.onnx", provider, threads)
        else:
            opened[role] = open_graph(folder, name, manifest, provider, threads, cache)
        _check_signature(name, opened[role], manifest.graphs[name])
    for name in ("greedy", "sample") if provider.device == "cuda" else ():
        # Never captured: their token goes to the host, which a captured graph could not do.
        plain = replace(provider, cuda=replace(provider.cuda, graphs=False))
        opened[name] = make_session(folder / f"{name}.onnx", plain, threads)
        _check_signature(name, opened[name], manifest.graphs[name])
    return Sessions(**opened, replayed=provider.device == "cuda" and provider.cuda.graphs)


def _check_signature(name: str, session: Any, spec: GraphSpec) -> None:
    """Compares a session's inputs and outputs with the contract."""
    for side, actual, expected in (
        ("inputs", session.get_inputs(), spec.inputs),
        ("outputs", session.get_outputs(), spec.outputs),
    ):
        found = {(value.name, value.type, tuple(value.shape)) for value in actual}
        wanted = {(tensor.name, ORT_TYPES[tensor.dtype], tensor.shape) for tensor in expected}
        if found != wanted:
            raise BundleError(f"{name}.onnx: {side} {sorted(map(str, found ^ wanted))} differ from the manifest")
