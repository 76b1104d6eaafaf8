"""Opens a bundle on a device: its files checked, its memory found to suffice, its graphs as the manifest says."""

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from melt_runtime.arguments import shown
from melt_runtime.bundle.contract import METADATA_KEY, KVCacheKind, ModelShape, graph_metadata, loop_graph, prompt_graph
from melt_runtime.bundle.manifest import REMAKE, TOKENIZER_NAME, Manifest, check_files
from melt_runtime.device.cuda import free_memory
from melt_runtime.device.providers import ORT_TYPES, ProviderChoice, make_session
from melt_runtime.errors import BundleError, CapacityError, ProviderError
from melt_runtime.execute.bindings import Sessions
from melt_runtime.loading.load_cache import LoadCache
from melt_runtime.loading.prepacked import open_graph
from melt_runtime.memory.estimate import format_bytes
from melt_runtime.memory.plan import StatePlan
from melt_runtime.memory.process import available_bytes
from melt_runtime.progress import Report
from melt_runtime.text.codec import TextCodec

_LIBRARY_ROOM = 256 << 20
_SHOWN = 8


def check_bundle(folder: Path, manifest: Manifest, cache: LoadCache, progress: Report | None = None) -> None:
    """Compares every file with the manifest; large bundles only once, as long as their files do not change.

    Raises:
        BundleError: lists every file that is missing, truncated, longer or altered.
    """
    if manifest.weight_bytes < cache.min_bytes:
        check_files(folder, manifest, progress=progress)
        return
    unchanged = cache.unchanged(folder, manifest)
    check_files(folder, manifest, unchanged, progress)
    if unchanged != frozenset(manifest.files):
        with suppress(OSError):  # then it is compared again next time; the prepacked copy's warning names the folder
            cache.remember(folder, manifest)


def check_vocabulary(codec: TextCodec, shape: ModelShape) -> None:
    """Refuses a tokenizer whose texts become tokens that the model has not.

    Raises:
        BundleError: names some of them.
    """
    size = shape.vocab_size
    unknown = {token: text for text, token in codec.tokenizer.get_vocab().items() if token >= size}
    if unknown:
        some = ", ".join(f"{token} {shown(unknown[token])}" for token in sorted(unknown)[:_SHOWN])
        raise BundleError(
            f"{TOKENIZER_NAME}: {len(unknown)} token ids must be below vocab_size ({size}), such as {some}; {REMAKE}"
        )


def require_memory(provider: ProviderChoice, manifest: Manifest, plan: StatePlan) -> None:
    """Refuses a device whose free memory does not hold the state, on CUDA weights and state.

    Raises:
        ProviderError: a CUDA device has too little; says what is needed, what is free and what to lower.
        CapacityError: the machine has.
    """
    if provider.device == "cpu":
        require_state_memory(plan)
        return
    free = free_memory(provider.device_id)
    needed = manifest.weight_bytes + plan.total_bytes
    if free is not None and free < needed:
        raise ProviderError(
            f"CUDA device {provider.device_id} has {free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB are needed "
            f"({manifest.weight_bytes / 1e9:.2f} of weights, {plan.total_bytes / 1e9:.2f} of state): lower "
            f"{_what_to_lower(plan)}, or export to fewer bits"
        )


def require_state_memory(plan: StatePlan) -> None:
    """Refuses a state that this machine has no memory for; what it would take grows with use, until the system ends it.

    Raises:
        CapacityError: says what is needed, what is free and what to lower.
    """
    free = available_bytes()
    if free is not None and free < plan.total_bytes:
        slots = f"{plan.batch} slots of " if plan.batch > 1 else ""
        raise CapacityError(
            f"a state for {slots}{plan.capacity} tokens takes {format_bytes(plan.total_bytes)}, "
            f"{format_bytes(free)} of memory are free: lower {_what_to_lower(plan)}, or choose kv_cache='int8'"
        )


def _what_to_lower(plan: StatePlan) -> str:
    slots = f"slots (now {plan.batch}) or " if plan.batch > 1 else ""
    return f"{slots}capacity (now {plan.capacity})"


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
    progress: Report | None = None,
) -> Sessions:
    """Opens a bundle's graphs and compares them with its manifest: inputs, outputs, and what they say of their model.

    That is all that a reader can know of a graph without running it. Graphs are programs: one that another wrote may
    say the right things and compute others, for any time, in any memory. Trust a bundle by who made it; the manifest's
    hashes say that its files are the ones that were made.

    Args:
        folder: the bundle.
        manifest: what it says of itself.
        provider: where to run.
        threads: CPU threads inside an operator.
        kv_cache: which of the bundle's loops.
        cache: for prepacked copies; default: none are made or used.
        progress: told of each graph.

    Raises:
        BundleError: a graph that cannot be read, or is another than the manifest says.
    """
    opened = {}
    tell = progress or (lambda what, done, total: None)
    roles = {"embed": "embed", "loop": loop_graph(kv_cache), "head": "head"}
    if manifest.prompts is not None:
        roles["prompts"] = prompt_graph(kv_cache)
    for role, name in roles.items():
        tell(f"opening {name}.onnx", 0, 0)
        if cache is None:
            opened[role] = make_session(folder / f"{name}.onnx", provider, threads)
        else:
            opened[role] = open_graph(folder, name, manifest, provider, threads, cache, tell)
        _check_graph(name, opened[role], manifest)
    for name in ("greedy", "sample") if provider.device == "cuda" else ():
        # Never captured: their token goes to the host, which a captured graph could not do.
        plain = replace(provider, cuda=replace(provider.cuda, graphs=False))
        opened[name] = make_session(folder / f"{name}.onnx", plain, threads)
        _check_graph(name, opened[name], manifest)
    return Sessions(
        **opened,
        prompt_rows=0 if manifest.prompts is None else manifest.prompts.rows,
        replayed=provider.device == "cuda" and provider.cuda.graphs,
    )


def _check_graph(name: str, session: Any, manifest: Manifest) -> None:
    """Compares what a session says of its graph with the manifest."""
    try:
        inputs, outputs = session.get_inputs(), session.get_outputs()
        said = json.loads(session.get_modelmeta().custom_metadata_map.get(METADATA_KEY, "{}"))
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{name}.onnx does not say what it is: {error}; {REMAKE}") from error
    faults, spec = [], manifest.graphs[name]
    for side, actual, expected in (("inputs", inputs, spec.inputs), ("outputs", outputs, spec.outputs)):
        found = {(value.name, value.type, tuple(value.shape)) for value in actual}
        wanted = {(tensor.name, ORT_TYPES[tensor.dtype], tensor.shape) for tensor in expected}
        if found != wanted:
            faults.append(f"{side} {sorted(map(str, found ^ wanted))[:_SHOWN]} differ")
    for field, value in graph_metadata(manifest.model, manifest.precision, manifest.activations).items():
        theirs = said.get(field) if isinstance(said, dict) else None
        if theirs != value or type(theirs) is not type(value):
            faults.append(f"{field} is {shown(value)} in the manifest, {shown(theirs)} in the graph")
    if faults:
        raise BundleError("\n  ".join((f"{name}.onnx is not what the manifest says:", *faults)) + f"\n{REMAKE}")
