"""How a batch is answered, and by whom."""

from dataclasses import dataclass, field
from typing import Any, get_args

from melt_ray.parts import PartFormat
from melt_runtime.arguments import is_whole, one_of, real_number, whole_number
from melt_runtime.bundle.contract import KVCacheKind
from melt_runtime.memory.plan import MAX_BATCH
from melt_runtime.request.generation_config import GenerationConfig

_MOST_ACTORS = 1 << 16
_MOST_ROWS = 1 << 20


@dataclass(frozen=True)
class BatchSettings:
    """Checked when it is made.

    Attributes:
        column: that prompts stand in: text, messages, or token ids.
        raw: give text to the model as it is, without the chat template.
        generation: fields of ``GenerationConfig``, for all rows.
        capacity: tokens of a slot; None: as ``MeltModel.load``.
        kv_cache: how keys and values are stored.
        chunk: prompt tokens processed in parallel; None: as in training.
        most_loops: cache sets of a LoopLM; None: as many as it was trained with.
        device: ``cpu``, ``cuda`` or ``auto``.
        format: of the parts.
        part_rows: rows of a part, at most: what a killed actor has to do again.
        slots: prompts that an actor has under way at a time.
        actors: processes with a model, at most.
        cpus: of each; Ray places by them.
        gpus: of each.
        threads: of each on the CPU; None: ``cpus``.

    Raises:
        ValueError: a field outside its rule.
    """

    column: str = "prompt"
    raw: bool = False
    generation: dict[str, Any] = field(default_factory=dict)
    capacity: int | None = None
    kv_cache: KVCacheKind = "float"
    chunk: int | None = None
    most_loops: int | None = None
    device: str = "auto"
    format: PartFormat = "parquet"
    part_rows: int = 256
    slots: int = 8
    actors: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    threads: int | None = None

    def __post_init__(self) -> None:
        """Checks."""
        GenerationConfig(**self.generation)
        one_of("format", self.format, get_args(PartFormat))
        whole_number("part_rows", self.part_rows, 1, _MOST_ROWS)
        whole_number("slots", self.slots, 1, MAX_BATCH)
        whole_number("actors", self.actors, 1, _MOST_ACTORS)
        real_number("cpus", self.cpus, "above 0", lambda value: value > 0)
        real_number("gpus", self.gpus, "at least 0", lambda value: value >= 0)
        if self.threads is not None and not (is_whole(self.threads) and self.threads > 0):
            raise ValueError(f"threads must be a whole number of at least 1, got {self.threads!r}")

    @property
    def threads_of_actor(self) -> int:
        """On the CPU."""
        return self.threads or max(1, int(self.cpus))

    @property
    def of_answers(self) -> dict[str, Any]:
        """What answers depend on, or how they are stored: a run goes on with the same only."""
        names = ("column", "raw", "generation", "capacity", "kv_cache", "chunk", "most_loops", "device", "format")
        values = {name: getattr(self, name) for name in (*names, "part_rows")}
        values["generation"] = {
            name: list(value) if isinstance(value, tuple) else value for name, value in sorted(self.generation.items())
        }
        return values
