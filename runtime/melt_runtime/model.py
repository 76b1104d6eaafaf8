"""``MeltModel``: a loaded bundle. The door through which applications come in."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Unpack

from melt_runtime.arguments import function_or_none, instance
from melt_runtime.bundle.contract import KVCacheKind
from melt_runtime.bundle.manifest import GENERATION_CONFIG_NAME, Manifest, read_manifest
from melt_runtime.device.cuda import CudaOptions
from melt_runtime.device.providers import ProviderChoice, check_threads, choose_provider
from melt_runtime.generate import GenerationResult, GenerationStream
from melt_runtime.loading.load_cache import LoadCache
from melt_runtime.loading.opening import (
    check_bundle,
    check_vocabulary,
    open_sessions,
    require_memory,
    with_memory_limit,
)
from melt_runtime.loop import LoopRunner, Progress, Sessions
from melt_runtime.memory.plan import StatePlan, plan_state
from melt_runtime.progress import Report
from melt_runtime.request.generation_config import GenerationChanges, GenerationConfig, read_generation_config
from melt_runtime.session import DepthNotice, Prompt, Session
from melt_runtime.state import State
from melt_runtime.text.codec import TextCodec


class MeltModel:
    """A bundle on a device, with one session of its own; ``new_session`` makes more over the same weights.

    A session serves one call at a time and refuses another with ``BusyError``: give each thread one of its own.

    Attributes:
        manifest: what the bundle says of itself.
        provider: where it runs, and why.
        defaults: what the bundle says of generation, where a caller says nothing.
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
        self._notice = DepthNotice(manifest.model.trained_loops)
        self.session = self.new_session()

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
        cache: LoadCache | None = None,
        cuda: CudaOptions | None = None,
        progress: Report | None = None,
    ) -> "MeltModel":
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
            cache: folder that makes the next load of a large bundle fast; default: the user's.
            cuda: how a CUDA device is used: graphs, TF32, a limit of its memory.
            progress: told what is done, and how much of it: a large bundle takes seconds, the first time above all.

        Raises:
            BundleError: the bundle is missing, damaged or not for this version.
            ProviderError: the device cannot run here or has too little memory, or the bundle is for another.
            ValueError: an argument of a wrong type or outside its rule.
        """
        folder = Path(instance("bundle", bundle, (str, os.PathLike), "the path of a folder"))
        check_threads(threads)
        instance("cache", cache, (LoadCache, type(None)), "a LoadCache or None")
        function_or_none("progress", progress)
        instance("cuda", cuda, (CudaOptions, type(None)), "CudaOptions or None")
        manifest = read_manifest(folder)
        plan = plan_state(manifest, capacity, chunk=chunk, loops=loops, kv_cache=kv_cache)
        provider = choose_provider(device, manifest.activations, cuda)
        require_memory(provider, manifest, plan)
        provider = with_memory_limit(provider, manifest, plan)
        cache = LoadCache() if cache is None else cache
        check_bundle(folder, manifest, cache, progress)
        codec = TextCodec.read(folder)
        check_vocabulary(codec, manifest.model)
        defaults = read_generation_config(folder / GENERATION_CONFIG_NAME, manifest.model.vocab_size)
        sessions = open_sessions(folder, manifest, provider, threads, kv_cache, cache, progress)
        return cls(manifest, provider, sessions, codec, defaults, plan)

    @property
    def state_bytes(self) -> int:
        """Bytes of the session's whole state; for MELT the same for every number of loops."""
        return self.session.state_bytes

    def new_session(self) -> Session:
        """A conversation with a state of its own, over the same weights.

        Raises:
            CapacityError: its state cannot be allocated.
        """
        return Session(self._sessions, self._new_state(1), self.codec, self.defaults, self._notice)

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
        return State(replace(self._plan, batch=batch), self.provider.device, self.provider.device_id)

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
