"""``MeltModel``: a loaded bundle. The door through which applications come in."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self, TypeVar, Unpack

from melt_runtime.arguments import function_or_none, instance, path_of, whole_number
from melt_runtime.batch import Batch, BatchAsk, BatchStream
from melt_runtime.bundle.contract import KVCacheKind
from melt_runtime.bundle.manifest import Manifest, read_manifest
from melt_runtime.device.cuda import CudaOptions
from melt_runtime.device.providers import ProviderChoice, check_threads, choose_provider
from melt_runtime.engine import Engine
from melt_runtime.errors import BatchError, ClosedError
from melt_runtime.execute.bindings import Sessions
from melt_runtime.execute.executor import Executor
from melt_runtime.loading.load_cache import LoadCache
from melt_runtime.loading.opening import (
    check_bundle,
    check_vocabulary,
    open_sessions,
    require_memory,
    require_state_memory,
    with_memory_limit,
)
from melt_runtime.memory.buffers import State
from melt_runtime.memory.plan import MAX_BATCH, StatePlan, plan_state
from melt_runtime.progress import Progress, Report
from melt_runtime.request.generation_config import GenerationChanges, GenerationConfig
from melt_runtime.request.generation_files import read_defaults
from melt_runtime.request.grammar_compiler import GrammarCompiler
from melt_runtime.request.prompts import Desk, Prompt
from melt_runtime.request.result import GenerationResult
from melt_runtime.runner import LoopRunner
from melt_runtime.service import QUEUE, Service
from melt_runtime.session import DepthNotice, Session
from melt_runtime.stream import GenerationStream
from melt_runtime.text.codec import TextCodec

T = TypeVar("T")


def _open(part: T | None) -> T:
    if part is None:
        raise ClosedError("this model was closed: load it again")
    return part


class MeltModel:
    """A bundle on a device, with one session of its own; ``new_session`` makes more over the same weights.

    A session serves one call at a time and refuses another with ``BusyError``: give each thread one of its own.
    ``close``, or the end of a ``with`` block, frees what the model holds.

    Attributes:
        manifest: what the bundle says of itself.
        provider: where it runs, and why.
        defaults: what the bundle says of generation, where a caller says nothing.
        codec: tokenizer and chat template.
        grammars: compiles what answers shall follow; ``generate`` and all others take a grammar by itself.
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
        self._opened: Sessions | None = sessions
        self.codec = codec
        self._plan = plan
        self._notice = DepthNotice(manifest.model.trained_loops)
        self.grammars = GrammarCompiler(codec, manifest.model.vocab_size, tuple(defaults.stop_ids or ()))
        self._own: Session | None = self._open_session(plan)

    @classmethod
    def load(
        cls,
        bundle: str | os.PathLike[str],
        device: str = "auto",
        capacity: int | None = None,
        chunk: int | None = None,
        loops: int | None = None,
        threads: int | None = None,
        kv_cache: KVCacheKind = "float",
        slots: int = 1,
        cache: LoadCache | None = None,
        cuda: CudaOptions | None = None,
        progress: Report | None = None,
    ) -> Self:
        """Loads a bundle and allocates its state.

        Args:
            bundle: folder written by ``melt-export``.
            device: ``cpu``, ``cuda``, ``cuda:1`` for another than the first, or ``auto``, which takes CUDA where it can
                run and says why in ``provider``.
            capacity: tokens that prompt and answers of a session may take together; default: 2048, or as many
                positions as the model has where those are fewer.
            chunk: tokens processed in parallel in prefill; default: as in training.
            loops: cache sets of a LoopLM, the most loops it can run; default: as in training. MELT needs no such
                number: its cache serves every depth.
            threads: CPU threads inside an operator, at most one per processor; default: one per physical core.
            kv_cache: how keys and values are stored. ``int8`` and ``int4`` take a quarter and an eighth of float32's
                memory and read less of it per token, at the cost that ``manifest.quality`` states.
            slots: sequences that ``generate_batch`` and ``stream_batch`` answer side by side, each with a cache of the
                whole capacity; ``state_bytes`` counts them all.
            cache: folder that makes the next load of a large bundle fast; default: the user's.
            cuda: how a CUDA device is used: graphs, TF32, a limit of its memory.
            progress: told what is done, and how much of it: a large bundle takes seconds, the first time above all.

        Raises:
            BundleError: the bundle is missing, damaged or not for this version.
            ProviderError: the device cannot run here or has too little memory, or the bundle is for another.
            CapacityError: the machine has too little memory for the state; nothing was allocated.
            ValueError: an argument of a wrong type or outside its rule.
        """
        folder = path_of("bundle", bundle)
        check_threads(threads)
        instance("cache", cache, (LoadCache, type(None)), "a LoadCache or None")
        function_or_none("progress", progress)
        instance("cuda", cuda, (CudaOptions, type(None)), "CudaOptions or None")
        manifest = read_manifest(folder)
        whole_number("slots", slots, 1, MAX_BATCH)
        plan = plan_state(manifest, capacity, slots, chunk, loops, kv_cache)
        provider = choose_provider(device, manifest.activations, cuda)
        require_memory(provider, manifest, plan)
        provider = with_memory_limit(provider, manifest, plan)
        cache = LoadCache() if cache is None else cache
        check_bundle(folder, manifest, cache, progress)
        codec = TextCodec.read(folder)
        check_vocabulary(codec, manifest.model)
        # Whoever names the loops of the caches may name those of each answer, too.
        defaults = read_defaults(folder, manifest.model, plan.cache_sets if loops is None else None)
        sessions = open_sessions(folder, manifest, provider, threads, kv_cache, cache, progress)
        return cls(manifest, provider, sessions, codec, defaults, plan)

    def close(self) -> None:
        """Frees the weights and the state of the model's own session, of which an open stream ends where it stands.

        Sessions and runners that it made go on, and hold the weights until they are gone; ``generate`` and all that
        needs the model itself raise ``ClosedError``. Nothing happens where it is closed.

        Raises:
            BusyError: its own session is at work: in another thread, or in a service, which is closed before.
        """
        if self._own is None:
            return
        if (stream := self._own.open_stream) is not None:
            stream.close()
        self._own._hold.require_free()
        self._own = self._opened = None

    def __enter__(self) -> Self:
        """The model itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes it."""
        self.close()

    @property
    def session(self) -> Session:
        """The one that ``generate`` and ``stream`` use.

        Raises:
            ClosedError: the model was closed.
        """
        return _open(self._own)

    @property
    def _sessions(self) -> Sessions:
        return _open(self._opened)

    @property
    def state_bytes(self) -> int:
        """Bytes of the session's whole state; for MELT the same for every number of loops."""
        return self.session.state_bytes

    def new_session(self) -> Session:
        """A conversation with a state of its own, over the same weights.

        Raises:
            CapacityError: its state cannot be allocated.
        """
        return self._open_session(replace(self._plan, batch=1))

    def _open_session(self, plan: StatePlan) -> Session:
        engine = Engine(Executor(self._sessions, self._new_state(plan.batch)))
        slot = engine.executor.slots.acquire()
        obstacle = engine.executor.wave_obstacle
        desk = Desk(self.codec, self.defaults, plan, self.manifest.identity, obstacle, self.grammars)
        return Session(engine, slot, desk, self._notice)

    def new_runner(self, batch: int = 1) -> LoopRunner:
        """A driver over a state of its own, for applications that handle token ids and logits themselves.

        Args:
            batch: sequences that are decoded together.

        Raises:
            ValueError: ``batch`` outside its rule.
            CapacityError: its state cannot be allocated.
        """
        return LoopRunner(self._sessions, self._new_state(batch))

    def _new_state(self, batch: int) -> State:
        plan = replace(self._plan, batch=batch)
        if self.provider.device == "cpu":
            require_state_memory(plan)
        return State(plan, self.provider.device, self.provider.device_id)

    def new_service(self, queue: int = QUEUE) -> Service:
        """Answers requests from any thread over the model's ``slots``, until it is closed.

        Args:
            queue: requests that may wait for a slot; more are refused.

        Raises:
            BusyError: the model's own session is at work; it is until the service is closed.
            ValueError: ``queue`` outside its rule.
        """
        session = self.session
        session._hold.require_free()
        return Service(session._engine, session._desk, session._lent, queue)

    def reset(self) -> None:
        """Forgets what the model's own session holds.

        Raises:
            BusyError: it is at work.
        """
        self.session.reset()

    def generate(
        self,
        prompt: Prompt,
        config: GenerationConfig | None = None,
        raw: bool = False,
        progress: Progress | None = None,
        **changes: Unpack[GenerationChanges],
    ) -> GenerationResult:
        """Answers one prompt from an empty cache, in place of what the model's own session held.

        Args:
            prompt: a user's message, a list of messages, or token ids.
            config: what it does not say, the bundle says.
            raw: give a string to the model as it is, without the chat template.
            progress: called with the tokens done and all of them after every chunk of the prompt.
            **changes: single fields of ``GenerationConfig``, e.g. ``loops=2``, over ``config``.

        Raises:
            TokenError, CapacityError, BusyError, ValueError: before anything is computed, as for ``Session.stream``.
        """
        return self.session._stream(prompt, config, raw, progress, changes, fresh=True).run_to_end()

    def stream(
        self,
        prompt: Prompt,
        config: GenerationConfig | None = None,
        raw: bool = False,
        progress: Progress | None = None,
        **changes: Unpack[GenerationChanges],
    ) -> GenerationStream:
        """As ``generate``, piece by piece."""
        return self.session._stream(prompt, config, raw, progress, changes, fresh=True)

    def generate_batch(
        self,
        prompts: Iterable[Prompt],
        config: GenerationConfig | Sequence[GenerationConfig] | None = None,
        raw: bool = False,
        progress: Progress | None = None,
        **changes: Unpack[GenerationChanges],
    ) -> list[GenerationResult]:
        """Answers many prompts over the model's ``slots``, each as ``generate`` would alone, whatever its depth,
        sampling, stop rules and length.

        In float32 the tokens are those of one at a time as long as no two logits are nearly equal: products over
        several rows differ in their last digits from those over one.

        Args:
            prompts: any number of them, each as for ``generate``.
            config: for all, or one for each; what it does not say, the bundle says.
            raw: give strings to the model as they are, without the chat template.
            progress: called after every prompt with those done and all of them.
            **changes: single fields of ``GenerationConfig`` over each ``config``.

        Returns:
            The answers in the order of the prompts.

        Raises:
            BatchError: prompts could not be answered; it names them by number and holds the other answers.
            BusyError, ValueError: before anything is computed, as for ``generate``.
        """
        results: dict[int, GenerationResult] = {}
        with self.stream_batch(prompts, config, raw, progress, **changes) as stream:
            try:
                results.update(stream)
            except BatchError as error:
                raise BatchError(error.errors, results) from None
        return [results[number] for number in range(len(results))]

    def stream_batch(
        self,
        prompts: Iterable[Prompt],
        config: GenerationConfig | Sequence[GenerationConfig] | None = None,
        raw: bool = False,
        progress: Progress | None = None,
        **changes: Unpack[GenerationChanges],
    ) -> BatchStream:
        """As ``generate_batch``: (number of the prompt, its answer) as they finish.

        Prompts are read as slots become free, so that they may be made, or fetched, one by one. The slots are those of
        the model's own session, which forgets what it held.
        """
        session = self.session
        ask = BatchAsk.make(prompts, config, raw, progress, changes, session._desk)
        session._hold.require_free()
        return BatchStream(Batch(session._engine, session._desk, self._notice, session._lent, ask).run)
