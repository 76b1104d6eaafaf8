"""``MeltModel``: a loaded bundle. The door through which applications come in."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from melt_runtime.contract import GraphSpec, KVCacheKind, loop_graph
from melt_runtime.cuda import CudaOptions, free_memory
from melt_runtime.errors import BundleError, ProviderError
from melt_runtime.generate import GenerationResult, GenerationStream
from melt_runtime.generation_config import GenerationConfig, read_generation_config
from melt_runtime.load_cache import LoadCache
from melt_runtime.loop import Sessions
from melt_runtime.manifest import GENERATION_CONFIG_NAME, Manifest, check_files, read_manifest
from melt_runtime.prepacked import open_graph
from melt_runtime.providers import ORT_TYPES, ProviderChoice, choose_provider, make_session
from melt_runtime.session import Prompt, Session
from melt_runtime.state import State, StatePlan
from melt_runtime.text import TextCodec

DEFAULT_CAPACITY = 2048
_LIBRARY_ROOM = 256 << 20


class MeltModel:
    """A bundle on a device, with one session of its own; ``new_session`` makes more over the same weights.

    Attributes:
        manifest: what the bundle says of itself.
        provider: where it runs, and why.
        defaults: the bundle's ``GenerationConfig``.
        codec: tokenizer and chat template.
        session: the one that ``generate`` and ``stream`` use.
    """

    def __init__(
        self,
        manifest: Manifest,
        provider: ProviderChoice,
        sessions: Sessions,
        codec: TextCodec,
        defaults: GenerationConfig,
        plan: StatePlan,
    ):
        self.manifest = manifest
        self.provider = provider
        self.defaults = defaults
        self._sessions = sessions
        self.codec = codec
        self._plan = plan
        self.session = self.new_session()

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        device: str = "auto",
        capacity: int | None = None,
        chunk: int | None = None,
        loops: int | None = None,
        threads: int | None = None,
        kv_cache: KVCacheKind = "float",
        cache: LoadCache | None = None,
        cuda: CudaOptions | None = None,
    ) -> "MeltModel":
        """Loads a bundle and allocates its state.

        Args:
            bundle: folder written by ``export.py``.
            device: ``cpu``, ``cuda``, ``cuda:1`` for another than the first, or ``auto``, which takes CUDA where it can
                run and says why in ``provider``.
            capacity: tokens that prompt and answers of a session may take together; default: 2048, or as many
                positions as the model has where those are fewer.
            chunk: tokens processed in parallel in prefill; default: as in training.
            loops: cache sets of a LoopLM, the most loops it can run; default: as in training. MELT needs no such
                number: its cache serves every depth.
            threads: CPU threads inside an operator; default: one per physical core.
            kv_cache: how keys and values are stored. ``int8`` and ``int4`` take a quarter and an eighth of float32's
                memory and read less of it per token, at the cost that ``manifest.quality`` states.
            cache: folder that makes the next load of a large bundle fast; default: the user's.
            cuda: how a CUDA device is used: graphs, TF32, a limit of its memory.

        Raises:
            BundleError: the bundle is missing, damaged or not for this version.
            ProviderError: the device cannot run here or has too little memory, or the bundle is for another.
            ValueError: a size outside its rule.
        """
        folder = Path(bundle)
        manifest = read_manifest(folder)
        plan = plan_state(manifest, capacity, chunk=chunk, loops=loops, kv_cache=kv_cache)
        provider = choose_provider(device, manifest.activations, cuda)
        require_memory(provider, manifest, plan)
        provider = with_memory_limit(provider, manifest, plan)
        cache = LoadCache() if cache is None else cache
        check_bundle(folder, manifest, cache)
        codec = TextCodec.read(folder)
        defaults = read_generation_config(folder / GENERATION_CONFIG_NAME)
        sessions = open_sessions(folder, manifest, provider, threads, kv_cache, cache)
        return cls(manifest, provider, sessions, codec, defaults, plan)

    @property
    def state_bytes(self) -> int:
        """Bytes of the session's whole state; for MELT the same for every number of loops."""
        return self.session.state.nbytes

    def new_session(self) -> Session:
        """A conversation with a state of its own, over the same weights."""
        state = State(self._plan, self.provider.device, self.provider.device_id)
        return Session(self._sessions, state, self.codec, self.defaults)

    def reset(self) -> None:
        """Forgets what the model's own session holds."""
        self.session.reset()

    def generate(
        self, prompt: Prompt, config: GenerationConfig | None = None, raw: bool = False, **changes: Any
    ) -> GenerationResult:
        """Answers one prompt, from an empty cache.

        Args:
            prompt: a user's message, a list of messages, or token ids.
            config: default: the bundle's.
            raw: give a string to the model as it is, without the chat template.
            **changes: single fields of ``GenerationConfig``, e.g. ``loops=2``.

        Raises:
            TokenError, CapacityError, ValueError: before anything is computed.
        """
        self.reset()
        return self.session.generate(prompt, config, raw, **changes)

    def stream(
        self, prompt: Prompt, config: GenerationConfig | None = None, raw: bool = False, **changes: Any
    ) -> GenerationStream:
        """As ``generate``, piece by piece."""
        self.reset()
        return self.session.stream(prompt, config, raw, **changes)


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


def plan_state(
    manifest: Manifest,
    capacity: int | None = None,
    batch: int = 1,
    chunk: int | None = None,
    loops: int | None = None,
    kv_cache: KVCacheKind = "float",
) -> StatePlan:
    """Sizes of a state for a bundle, without allocating it.

    Raises:
        ValueError: a size outside its rule, or a kind of KV cache that the bundle has no loop for.
    """
    shape = manifest.model
    if kv_cache not in manifest.kv_caches:
        offered = ", ".join(manifest.kv_caches)
        raise ValueError(
            f"kv_cache must be one of {offered}, which this {manifest.precision} bundle has, got {kv_cache!r}"
        )
    capacity = min(DEFAULT_CAPACITY, shape.max_positions) if capacity is None else capacity
    return StatePlan(
        shape=shape,
        dtype=manifest.activations,
        batch=batch,
        capacity=capacity,
        # A prompt longer than the capacity does not fit, so neither does a chunk.
        chunk=min(shape.trained_chunk, capacity) if chunk is None else chunk,
        loops=shape.trained_loops if loops is None else loops,
        kv_cache=kv_cache,
    )


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
