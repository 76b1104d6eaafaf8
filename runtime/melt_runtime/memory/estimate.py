"""What a model takes in memory, before anything is allocated: weights and state exactly, the rest of the process about.

MELT stands beside a KV cache for each loop, as a LoopLM has it.
"""

from dataclasses import dataclass

from melt_runtime.bundle.contract import KVCacheKind
from melt_runtime.bundle.manifest import Manifest
from melt_runtime.memory.plan import StatePlan, plan_state
from melt_runtime.memory.process import current_bytes

OPENING_BYTES = 40_000_000
"""What opening sessions and a tokenizer adds to a process: 28 to 48 MiB where it was measured (docs/performance.md)."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes for one choice of sizes.

    Attributes:
        weight_bytes: weights of the three graphs.
        prompt_bytes: those of the loop for passes of several rows, mapped, so that only what runs takes memory.
        state: the state that this bundle allocates.
        per_loop: the state if every loop had a KV cache of its own, as in a LoopLM.
        program_bytes: Python, its libraries and the open sessions, about: what this process takes now, which has
            loaded them, and ``OPENING_BYTES``.
    """

    weight_bytes: int
    prompt_bytes: int
    state: StatePlan
    per_loop: StatePlan
    program_bytes: int

    @property
    def total_bytes(self) -> int:
        """Weights and state."""
        return self.weight_bytes + self.prompt_bytes + self.state.total_bytes

    @property
    def process_bytes(self) -> int:
        """Peak resident memory of a process that fills its capacity, on the CPU, about."""
        return self.total_bytes + self.program_bytes + self.state.activation_bytes

    @property
    def kv_cache_name(self) -> str:
        """How keys and values are stored, for people: ``int4``, though its bytes are those of uint8."""
        return self.state.dtype if self.state.kv_cache == "float" else self.state.kv_cache

    def as_json(self) -> dict[str, int | str]:
        """Sizes and bytes, for programs; those of ``program``, ``activations`` and ``process`` are estimates."""
        state = self.state
        return {
            **{name: getattr(state, name) for name in ("capacity", "batch", "chunk", "loops")},
            "kv_cache": self.kv_cache_name,
            "weight_bytes": self.weight_bytes,
            "prompt_weight_bytes": self.prompt_bytes,
            "kv_cache_bytes": state.cache_bytes,
            "state_bytes": state.total_bytes,
            "state_bytes_per_loop_caches": self.per_loop.total_bytes,
            "total_bytes": self.total_bytes,
            "program_bytes": self.program_bytes,
            "activation_bytes": state.activation_bytes,
            "process_bytes": self.process_bytes,
        }

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of keys and values that one more token of capacity costs."""
        return self.state.cache_bytes // (self.state.batch * self.state.capacity)


def plan_memory(
    manifest: Manifest,
    capacity: int | None = None,
    batch: int = 1,
    loops: int | None = None,
    kv_cache: KVCacheKind = "float",
    chunk: int | None = None,
) -> MemoryPlan:
    """Computes the plan for a bundle.

    Args:
        manifest: of the bundle.
        capacity: tokens that the cache holds.
        batch: sequences.
        loops: depth.
        kv_cache: how keys and values are stored.
        chunk: tokens in parallel in prefill; defaults are those of ``MeltModel.load``.

    Raises:
        ValueError: a size outside its rule.
    """
    state = plan_state(manifest, capacity, batch=batch, chunk=chunk, loops=loops, kv_cache=kv_cache)
    prompt_bytes = 0 if manifest.prompts is None else manifest.prompts.weight_bytes
    return MemoryPlan(manifest.weight_bytes, prompt_bytes, state, state.as_per_loop(), current_bytes() + OPENING_BYTES)


def format_bytes(count: int) -> str:
    """Bytes for people, in decimal units: ``12.58 MB``."""
    amount, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while amount >= 1000 and len(units) > 1:
        amount /= 1000
        units.pop(0)
    return f"{count} B" if units[0] == "B" else f"{amount:.2f} {units[0]}"


def format_plan(plan: MemoryPlan) -> str:
    """The plan as a table."""
    state = plan.state
    more = plan.per_loop.total_bytes - state.total_bytes
    sizes = f"capacity {state.capacity} tokens, batch {state.batch}, loops {state.loops}, KV cache {plan.kv_cache_name}"
    rows = (
        ("weights", plan.weight_bytes, plan.weight_bytes),
        *([("for prompts", plan.prompt_bytes, plan.prompt_bytes)] if plan.prompt_bytes else []),
        ("KV cache", state.cache_bytes, plan.per_loop.cache_bytes),
        ("other state", state.work_bytes, plan.per_loop.work_bytes),
        ("total", plan.total_bytes, plan.total_bytes + more),
        ("program", plan.program_bytes, plan.program_bytes),
        ("activations", state.activation_bytes, state.activation_bytes),
        ("process", plan.process_bytes, plan.process_bytes + more),
    )
    lines = [sizes, f"{'':<12} {'this bundle':>16} {'a cache per loop':>18}"]
    lines += [f"{name:<12} {format_bytes(ours):>16} {format_bytes(theirs):>18}" for name, ours, theirs in rows]
    if plan.prompt_bytes:
        lines.append(
            "for prompts: weights of passes of several rows; the system may drop what the load cache has mapped"
        )
    lines.append(f"total is exact; program, activations (chunks of {state.chunk}) and process are estimates for a CPU")
    return "\n".join(lines)
