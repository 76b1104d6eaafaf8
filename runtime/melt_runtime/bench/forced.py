"""Decodes tokens that a measurement chooses, without a request: one after another, or as a wave."""

from collections.abc import Callable, Sequence
from functools import partial

from melt_runtime.engine import finish_loop
from melt_runtime.execute.executor import Executor
from melt_runtime.memory.plan import Array
from melt_runtime.schedule.depth import Depth
from melt_runtime.schedule.span import Span
from melt_runtime.schedule.wave import Wave


def fill(executor: Executor, ids: Sequence[int], loops: int) -> None:
    """Makes ``ids`` what the first slot holds, chunk after chunk."""
    slot = executor.slots[0]
    slot.begin(list(ids), 0, loops)
    while slot.length < len(ids):
        span = slot.next_span(Depth.fixed(loops))
        slot.flight = [span]
        while not span.is_done:
            executor.run([span])
        slot.commit()


def run_plain(
    executor: Executor, ids: Sequence[int], loops: int, read: Callable[[Array], object], after_each_loop: bool = False
) -> int:
    """Appends tokens to the first slot, one after another; where a LoopLM's have more caches, these are filled.

    Args:
        executor: over a state with room for them.
        ids: token ids.
        loops: depth T.
        read: called with the logits after each token's last loop, [V] float32, which the next pass overwrites.
        after_each_loop: call it after every other loop too.

    Returns:
        The passes that it took.
    """
    slot = executor.slots[0]
    for token in ids:
        span = Span(0, slot.length, [token], loops, caches=slot.depth or loops)
        slot.flight = [span]
        while not span.is_done:
            executor.run([span])
            if after_each_loop or span.is_done:
                read(executor.compute_logits([span])[0])
            finish_loop(executor, span, partial(_logits, executor))
        slot.commit()
    return len(ids) * loops


def run_leaving(executor: Executor, ids: Sequence[int], depth: Depth, read: Callable[[Array, int], object]) -> None:
    """Appends tokens to the first slot, one after another; each leaves the loop when its rule says so.

    Args:
        executor: over a state with room for them.
        ids: token ids.
        depth: most loops, and the rule.
        read: called for each token with the logits after its last loop, [V] float32, which the next pass overwrites,
            and the loops that it took.
    """
    slot = executor.slots[0]
    for token in ids:
        span = Span(0, slot.length, [token], depth.most, exit=depth.exit())
        slot.flight = [span]
        while not span.is_done:
            executor.run([span])
            finish_loop(executor, span, partial(_logits, executor))
        read(_logits(executor, span), span.loop)
        slot.commit()


def _logits(executor: Executor, span: Span) -> Array:
    """Logits of a span that has just run alone, [V] float32."""
    return executor.compute_logits([span])[0]


def run_wave(
    executor: Executor, first: int, count: int, loops: int, lag: int, predict: Callable[[Span, Array], int]
) -> int:
    """Appends tokens to the first slot as a wave.

    Args:
        executor: over a state with room for them, without a ``wave_obstacle``.
        first: the first token's id.
        count: tokens.
        loops: depth T.
        lag: loops of a token after which the next one starts.
        predict: called after each loop of each token with it and its logits, [V] float32, which the next pass
            overwrites; the token that follows it, a draft before its last loop.

    Returns:
        The passes that it took.
    """
    slot = executor.slots[0]
    wave = Wave(0, Depth.fixed(loops), lag, executor.state.plan.most_in_flight, not executor.shares_cache)
    token, last, passes = first, slot.length + count - 1, 0
    logits: dict[Span, Array] = {}

    def follow(span: Span, _: list[int]) -> int:
        return predict(span, logits[span])

    while slot.length <= last:
        if not wave.spans:
            wave.start(slot.length, token)
        slot.flight, running = wave.spans, wave.running
        executor.run(running)
        logits = dict(zip(running, executor.compute_logits(running), strict=True))
        passes += 1
        for _, following in wave.advance(follow, lambda _: False, last):
            slot.commit()
            token = following
    return passes
