"""L0: which tokens run next. No graphs, no buffers: spans go through their loops by counting."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from melt_runtime.schedule.batched import Batched
from melt_runtime.schedule.span import Span

CHUNK = 4


@dataclass
class Asked:
    """A request as a schedule sees it: what is left of its prompt, its tokens, its depth."""

    slot: int
    prompt: int
    tokens: int
    depth: int
    waited: list[int] = field(default_factory=list)
    """For each pass with a token to run: how many went without it, one after another."""

    def __post_init__(self):
        self.start = 0
        self.span = self._next()

    def _next(self) -> Span:
        size = min(CHUNK, self.prompt) or 1
        return Span(self.slot, self.start, range(size), self.depth)

    def advance(self) -> bool:
        """Counts a pass; whether the request goes on."""
        self.span.loop += 1
        if self.span.is_done:
            self.start += len(self.span.ids)
            if self.prompt:
                self.prompt -= len(self.span.ids)
            else:
                self.tokens -= 1
            self.span = self._next()
        return self.prompt > 0 or self.tokens > 0


def run(requests: list[Asked], mixes_loops: bool) -> list[list[Span]]:
    """Every pass until nothing is left, each checked; how long each request waited is kept in it."""
    schedule, passes, idle = (
        Batched(mixes_loops, shares_cache=True),
        [],
        dict.fromkeys((one.slot for one in requests), 0),
    )
    chunk_under_way: Span | None = None
    while requests:
        chosen = list(schedule.next([[one.span] for one in requests]))
        passes.append([Span(span.slot, span.start, span.ids, span.depth, span.loop) for span in chosen])
        assert chosen
        assert len({span.slot for span in chosen}) == len(chosen)
        if chosen[0].is_chunk:
            assert len(chosen) == 1
            assert chunk_under_way in (None, chosen[0])  # there is room for one
            chunk_under_way = None if chosen[0].loop + 1 == chosen[0].depth else chosen[0]
        else:
            assert not any(span.is_chunk for span in chosen)
            assert mixes_loops or len({span.loop for span in chosen}) == 1
        slots = {span.slot for span in chosen}
        for one in list(requests):
            idle[one.slot] = 0 if one.slot in slots else idle[one.slot] + 1
            if not one.span.is_chunk:
                one.waited.append(idle[one.slot])
            if one.slot in slots and not one.advance():
                requests.remove(one)
    return passes


asked = st.builds(Asked, st.just(0), st.integers(1, 3 * CHUNK), tokens=st.integers(1, 6), depth=st.integers(1, 5))


@given(st.lists(asked, min_size=1, max_size=6), st.booleans())
def test_everybody_is_served_and_no_token_waits_for_more_than_one_pass(requests, mixes_loops):
    """A token waits for one loop of a chunk at most, or for those that it must go together with."""
    for slot, one in enumerate(requests):
        one.slot = slot
        one.__post_init__()
    everybody, deepest = list(requests), max(one.depth for one in requests)
    run(requests, mixes_loops)
    for one in everybody:
        assert max(one.waited, default=0) <= (1 if mixes_loops else 2 * deepest)


def test_tokens_at_different_loops_share_a_pass():
    passes = run([Asked(0, 1, 5, depth=1), Asked(1, 1, 2, depth=4)], mixes_loops=True)
    assert [sorted((span.slot, span.loop) for span in chosen) for chosen in passes[:5]] == [
        [(0, 0), (1, loop)] for loop in (0, 1, 2, 3, 0)
    ]


def test_a_shallow_request_does_not_wait_for_the_deep_ones():
    """Six passes for six tokens of one loop, whatever goes on beside them."""
    requests = [Asked(0, 1, 5, depth=1), *(Asked(slot, 1, 20, depth=4) for slot in range(1, 8))]
    shallow = requests[0]
    run(requests, mixes_loops=True)
    assert len(shallow.waited) == 6
    assert max(shallow.waited) == 0


def test_where_loops_cannot_mix_tokens_go_together_until_the_deepest_is_done():
    passes = run([Asked(0, 1, 2, depth=1), Asked(1, 1, 2, depth=3)], mixes_loops=False)
    assert [sorted((span.slot, span.loop) for span in chosen) for chosen in passes[:4]] == [
        [(0, 0), (1, 0)],
        [(1, 1)],
        [(1, 2)],
        [(0, 0), (1, 0)],
    ]


@pytest.mark.parametrize("mixes_loops", [True, False])
def test_a_prompt_goes_between_passes_of_tokens_and_stalls_nobody(mixes_loops):
    """One loop of one chunk, then everybody's tokens, and so on."""
    talker, newcomer = Asked(0, 1, 30, depth=2), Asked(1, 2 * CHUNK, 1, depth=2)
    passes = run([talker, newcomer], mixes_loops)
    kinds = [chosen[0].is_chunk for chosen in passes[:8]]
    assert kinds == [True, False] * 4
    assert max(talker.waited) == 1


def test_what_needs_a_pass_to_itself_takes_turns_between_passes_of_tokens():
    """Two waves over MELT's one cache, two prompts of which one chunk is in flight, and a token."""
    waves = [[Span(slot, 9, [1], 4, loop=2, is_wave=True), Span(slot, 10, [1], 4, is_wave=True)] for slot in (0, 1)]
    chunks = [[Span(2, 0, [1, 2], 4)], [Span(3, 0, [1, 2], 4, loop=1)]]
    token = [Span(4, 5, [1], 4)]
    schedule = Batched(mixes_loops=True, shares_cache=True)
    chosen = [schedule.next([*waves, *chunks, token]) for _ in range(8)]
    assert chosen[::2] == [waves[0], waves[1], chunks[1], waves[0]]
    assert [list(spans) for spans in chosen[1::2]] == [token] * 4


def test_a_looplms_waves_share_the_pass_of_all_tokens():
    wave = [Span(0, 9, [1], 4, loop=2, is_wave=True), Span(0, 10, [1], 4, is_wave=True)]
    token = [Span(1, 5, [1], 4, loop=1)]
    schedule = Batched(mixes_loops=True, shares_cache=False)
    assert list(schedule.next([wave, token])) == [*wave, *token]
