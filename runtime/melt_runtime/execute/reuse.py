"""Which cached rows a prompt may keep: those that running it from the start would give. Pure.

With a KV cache for each loop, or with one loop, rows do not depend on the division into chunks (rounding apart): they
are reused token by token. Over MELT's one cache they do: inside a chunk tokens see each other at the same loop, earlier
chunks at their last. There a prompt reuses whole chunks, and all of itself where the same prompt comes again.
"""

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np

from melt_runtime.memory.plan import Array, StatePlan
from melt_runtime.schedule.depth import Depth


def count_shared(ids: Sequence[int], prompt: Sequence[int]) -> int:
    """Number of tokens with which both begin."""
    limit = min(len(ids), len(prompt))
    return bisect_left(range(1, limit + 1), True, key=lambda n: list(ids[:n]) != list(prompt[:n]))


def count_reusable(plan: StatePlan, depths: Array, shared: int, prompt_tokens: int, depth: Depth, has_end: bool) -> int:
    """Number of cached tokens that a prompt may keep.

    Args:
        plan: sizes of the state.
        depths: of the cached tokens, as ``Slot.depths``.
        shared: cached tokens with which the prompt begins.
        prompt_tokens: length of the prompt.
        depth: of the prompt; chunks take the most loops, whatever rule lets later tokens leave.
        has_end: whether the hidden state is kept that this prompt ends with at this depth: then no token has to be run
            for its logits.
    """
    rows, last = _count_same(plan, depths[:shared], depth.most), prompt_tokens - 1
    if rows == prompt_tokens and has_end and depth.rule is None:
        return rows
    rows = min(rows, last)
    # Where a rule decides, a prompt's last token is run alone: all before it end a chunk (``Slot.next_span``).
    if not _depends_on_chunks(plan, depth.most) or (rows == last and depth.rule is not None):
        return rows
    return rows // plan.chunk * plan.chunk


def _depends_on_chunks(plan: StatePlan, loops: int) -> bool:
    """Whether rows depend on the division into chunks, by more than rounding."""
    return plan.shape.cache_kind == "shared" and loops > 1


def _count_same(plan: StatePlan, depths: Array, loops: int) -> int:
    """How many rows, from the start on, are those of a prompt through ``loops`` loops.

    A row never depends on later ones, so those at the beginning of a chunk may come from a longer chunk.
    """
    starts: Array = np.flatnonzero(depths)
    # The caches of a LoopLM's first loops do not depend on later loops, nor on where a token left after them.
    per_loop = plan.shape.cache_kind == "per_loop"
    same: Array = np.abs(depths[starts]) >= loops if per_loop else depths[starts] == loops
    by_chunks = _depends_on_chunks(plan, loops)
    if by_chunks:
        same &= starts == plan.chunk * np.arange(len(starts))
    chunks = len(starts) if same.all() else int(same.argmin())
    end = int(starts[chunks]) if chunks < len(starts) else len(depths)
    return min(end, chunks * plan.chunk) if by_chunks else end
