"""What a cache is kept for: a hit gives what a miss gives, bit for bit, over random sequences of turns."""

from itertools import pairwise

import numpy as np
import pytest

from melt_runtime import MeltModel, Session

CAPACITY, CHUNK = 200, 8
KINDS = {"MELT": {}, "mean gate": {"gate_kind": "mean"}, "LoopLM": {"gate_kind": "none"}}


class Reference:
    """What a session must hold, told chunk by chunk and computed without any reuse."""

    def __init__(self, model: MeltModel):
        self.model = model
        self.ids: list[int] = []
        self.chunks: list[tuple[int, int]] = []  # tokens and depth of each

    def turn(self, ids: list[int], loops: int, goes_on: bool, answer: list[int]) -> None:
        """Notes a turn that gave ``answer``; the last token of it is not run."""
        ran = sum(tokens for tokens, _ in self.chunks) if goes_on else 0
        self.chunks = self.chunks if goes_on else []
        left = len(ids) - ran
        self.chunks += [(min(CHUNK, left - start), loops) for start in range(0, left, CHUNK)]
        self.chunks += [(1, loops)] * (len(answer) - 1)
        self.ids = [*ids, *answer]

    def compute(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """Logits behind the last token that was run, and the rows of every cache, from an empty state."""
        runner, start = self.model.new_runner(), 0
        for tokens, loops in self.chunks:
            logits = runner.prefill(self.ids[start : start + tokens], loops)
            start += tokens
        return logits.copy(), rows(runner.state, runner.slots[0])


def rows(state, slot) -> list[np.ndarray]:
    used = slot.length
    sets = state.caches[: slot.depth] if len(state.caches) > 1 else state.caches  # deeper ones hold nothing
    return [buffer.read()[:, :, :used] for layers in sets for pair in layers for buffer in pair]


def check(session: Session, reference: Reference) -> None:
    logits, caches = reference.compute()
    state = session._engine.executor.state
    np.testing.assert_array_equal(state.logits.read()[0], logits)
    for ours, theirs in zip(rows(state, session._slot), caches, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def chat(prompt: list[str]) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(prompt)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(2))
def test_every_answer_is_that_of_a_session_without_reuse(random_bundle, kind, seed):
    """Ids appended, chats that replace, chats that were edited, at changing depths."""
    model = MeltModel.load(random_bundle(**KINDS[kind]), device="cpu", capacity=CAPACITY, chunk=CHUNK)
    draw = np.random.default_rng(seed)
    session, reference = model.new_session(), Reference(model)
    words = ["Ana reports to Ben.", "Ben reports to Cleo.", "Who is above?", "Cleo.", "Yes, that is so.", "Dan?"]
    texts, hits = [words[0]], 0
    for _ in range(9):
        loops, new = int(draw.integers(1, 5)), int(draw.integers(1, 12))
        choice = draw.integers(3)
        if choice == 0 and len(reference.ids) + 40 < CAPACITY:
            more = draw.integers(0, 700, draw.integers(1, 20)).tolist()
            ids, goes_on, prompt = [*reference.ids, *more], bool(reference.ids), more
            if kind == "LoopLM" and reference.chunks:
                loops = reference.chunks[-1][1]
        else:
            if choice == 1:  # a chat that goes on or was cut short
                texts = [*texts[: 2 * int(draw.integers(1, 4))], words[draw.integers(len(words))]]
                texts = texts if len(texts) % 2 else texts[:-1] or [words[0]]
                texts = texts if len(texts) % 2 else texts[:-1]
            else:  # one that was edited
                texts[draw.integers(len(texts))] = words[draw.integers(len(words))]
            prompt, goes_on = chat(texts), False
            ids = model.codec.encode(model.codec.render(prompt))
        result = session.generate(prompt, loops=loops, max_new_tokens=new, stop_ids=())
        hits += result.cached_tokens > 0
        if choice != 0:
            texts = [*texts, words[draw.integers(len(words))]]
            texts.append(words[draw.integers(len(words))])
        reference.turn(ids, loops, goes_on, list(result.token_ids))
        assert session.token_ids == tuple(reference.ids)
        check(session, reference)
    assert hits > 0


def test_a_chat_that_replaces_is_computed_as_afresh(random_bundle):
    """Decoded tokens and chunks of another depth or division are not taken, whole chunks of the same are."""
    model = MeltModel.load(random_bundle(), device="cpu", capacity=CAPACITY, chunk=CHUNK)
    long = chat(["Ana reports to Ben. Ben reports to Cleo. Cleo reports to Dan. Who is above Ana?"])
    session = model.new_session()
    first = session.generate(long, max_new_tokens=9, stop_ids=())
    assert first.cached_tokens == 0
    whole = (first.prompt_tokens - 1) // CHUNK * CHUNK
    assert whole >= 2 * CHUNK
    assert session.generate(long, max_new_tokens=9, stop_ids=()).cached_tokens == whole
    assert session.generate(long, max_new_tokens=9, stop_ids=(), loops=2).cached_tokens == 0
    assert session.generate(long, max_new_tokens=9, stop_ids=(), loops=2).cached_tokens == whole
    session.reset()
    ids = model.codec.encode(model.codec.render(long))
    session.generate(ids[:11], max_new_tokens=1, stop_ids=())  # chunks of 8 and 3
    session.generate(ids[11:], max_new_tokens=1, stop_ids=())
    assert session.generate(long, max_new_tokens=9, stop_ids=()).cached_tokens == CHUNK


def test_a_conversation_goes_on_over_everything_before(tiny_bundle):
    """A message after a turn that ended with its stop token: only the new tokens are run, at any depth.

    The same conversation given as a list is another thing: its chunks are those of one long prompt.
    """
    model = MeltModel.load(tiny_bundle, device="cpu", capacity=300, chunk=4)
    session = model.new_session()
    results = [
        session.generate(text, loops=loops)
        for text, loops in (
            ("Ana reports to Ben. Ben reports to Cleo. Who is one level above Ana?", 4),
            ("Who is two levels above Ana?", 2),
            ("Who is one level above Ben?", 4),
        )
    ]
    assert all(result.finish_reason == "stop" for result in results)
    lengths = [result.prompt_tokens + len(result.token_ids) - 1 for result in results]
    for before, after in pairwise(range(3)):
        assert results[after].cached_tokens == lengths[before]
    whole = [*session.messages, {"role": "user", "content": "Who is one level above Cleo?"}]
    ids, before = model.codec.encode(model.codec.render(whole)), session.token_ids
    assert tuple(ids[: len(before)]) == before
    fresh = model.new_session()
    assert fresh.generate(whole).text == session.generate(whole).text
    for ours, theirs in zip(*(rows(one._engine.executor.state, one._slot) for one in (session, fresh)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
