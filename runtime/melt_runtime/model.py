"""``MeltModel``: a loaded bundle. The door through which applications come in."""

from pathlib import Path
from typing import Any

from melt_runtime.contract import KVCacheKind
from melt_runtime.cuda import CudaOptions
from melt_runtime.generate import GenerationResult, GenerationStream
from melt_runtime.generation_config import GenerationConfig, read_generation_config
from melt_runtime.load_cache import LoadCache
from melt_runtime.loop import Sessions
from melt_runtime.manifest import GENERATION_CONFIG_NAME, Manifest, read_manifest
from melt_runtime.opening import check_bundle, check_vocabulary, open_sessions, require_memory, with_memory_limit
from melt_runtime.plan import StatePlan, plan_state
from melt_runtime.providers import ProviderChoice, choose_provider
from melt_runtime.session import Prompt, Session
from melt_runtime.state import State
from melt_runtime.text import TextCodec


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
        check_vocabulary(codec, defaults, manifest.model)
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
