"""What a cache is kept for: a hit gives what a miss gives, over random sequences of turns and in every way to ask.

Bit for bit where chunks are divided as in a miss; but for rounding where tokens are reused one by one.
"""

from itertools import pairwise

import numpy as np
import pytest
from conftest import ROOT
from tolerances import assert_close

from melt_runtime import GenerationConfig, MeltModel, Session

DEMO = ROOT / "runtime/melt_runtime/demo/melt-tiny"
CAPACITY, CHUNK = 200, 8
KINDS = {"MELT": {}, "mean gate": {"gate_kind": "mean"}, "LoopLM": {"gate_kind": "none"}}
FREE = {"stop_ids": (), "temperature": 1.0, "seed": 3}
PROMPT = list(range(100, 129))
"""Three chunks and a half."""


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(kind, random_bundle) -> MeltModel:
    return MeltModel.load(random_bundle(**KINDS[kind]), device="cpu", capacity=CAPACITY, chunk=CHUNK)


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
    divides = state.plan.shape.cache_kind == "per_loop" or any(loops == 1 for _, loops in reference.chunks)
    compare = assert_close if divides else np.testing.assert_array_equal
    compare(state.logits.read()[0], logits)
    for ours, theirs in zip(rows(state, session._slot), caches, strict=True):
        compare(ours, theirs)


def chat(prompt: list[str]) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(prompt)]


@pytest.mark.parametrize("seed", range(2))
def test_every_answer_is_that_of_a_session_without_reuse(model, kind, seed):
    """Ids appended, chats that replace, that were edited or come again, at changing depths."""
    draw = np.random.default_rng(seed)
    session, reference = model.new_session(), Reference(model)
    words = ["Ana reports to Ben.", "Ben reports to Cleo.", "Who is above?", "Cleo.", "Yes, that is so.", "Dan?"]
    texts, asked, last, hits = [words[0]], None, 4, 0
    for _ in range(9):
        loops, new = int(draw.integers(1, 5)), int(draw.integers(1, 12))
        choice = draw.integers(4)
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
            elif choice == 2:  # one that was edited
                texts[draw.integers(len(texts))] = words[draw.integers(len(words))]
            else:  # the same again, most often at the same depth
                texts, loops = asked or texts, int(draw.choice([loops, last, last]))
            prompt, goes_on, asked = chat(texts), False, texts
            ids = model.codec.encode(model.codec.render(prompt))
        result = session.generate(prompt, loops=loops, max_new_tokens=new, stop_ids=())
        hits, last = hits + (result.cached_tokens > 0), loops
        if choice != 0:
            texts = [*texts, words[draw.integers(len(words))]]
            texts.append(words[draw.integers(len(words))])
        reference.turn(ids, loops, goes_on, list(result.token_ids))
        assert session.token_ids == tuple(reference.ids)
        check(session, reference)
    assert hits > 0


AUTO = {"loops": "auto", "exit_rule": "settled", "exit_threshold": 0.2}
ONE, TWO, FOUR = {"loops": 1}, {"loops": 2}, {"loops": 4}
OTHER = [*PROMPT[:20], *[7] * 5]


@pytest.mark.parametrize(
    ("first", "prompt", "then", "melt", "looplm"),
    [
        pytest.param(FOUR, PROMPT, FOUR, 29, 29, id="again"),
        pytest.param(FOUR, PROMPT, {**FOUR, "decode": "wave", "lag": 3}, 29, 29, id="again, as a wave"),
        pytest.param(FOUR, PROMPT, TWO, 0, 28, id="again, shallower"),
        pytest.param(TWO, PROMPT, FOUR, 0, 0, id="again, deeper"),
        pytest.param(FOUR, PROMPT[:27], FOUR, 24, 26, id="shorter"),
        pytest.param(FOUR, PROMPT[:24], FOUR, 16, 23, id="shorter, whole chunks"),
        pytest.param(FOUR, OTHER, FOUR, 16, 20, id="edited"),
        pytest.param(FOUR, None, FOUR, 24, 34, id="goes on"),
        pytest.param(ONE, PROMPT, ONE, 29, 29, id="one loop, again"),
        pytest.param(ONE, OTHER, ONE, 20, 20, id="one loop, edited"),
        pytest.param(ONE, None, ONE, 34, 34, id="one loop, goes on"),
        pytest.param(AUTO, PROMPT, AUTO, 28, 28, id="by a rule, again"),
        pytest.param(AUTO, OTHER, AUTO, 16, 20, id="by a rule, edited"),
        pytest.param(FOUR, PROMPT[:27], AUTO, 26, 26, id="by a rule after none, shorter"),
        pytest.param(AUTO, PROMPT, FOUR, 24, 28, id="without a rule after one"),
    ],
)
def test_a_prompt_finds_what_running_it_would_give(model, kind, first, prompt, then, melt, looplm):
    """As many tokens as the rule says are found, and the answer is that of a prompt that finds none."""
    if kind == "mean gate" and "decode" in then:
        pytest.skip("a mean gate decodes no waves")
    before, after = (GenerationConfig(max_new_tokens=6, **FREE, **settings) for settings in (first, then))
    prompt = prompt or [*PROMPT, *model.generate(PROMPT, before).token_ids, 5, 6]
    fresh = model.generate(prompt, after)
    found = model.generate_batch([PROMPT, prompt], [before, after])[1]
    assert (found.token_ids, found.loops_per_token) == (fresh.token_ids, fresh.loops_per_token)
    assert found.cached_tokens == (looplm if kind == "LoopLM" else melt)
    assert found.timings.prefill_tokens == len(prompt) - found.cached_tokens


def test_prompts_that_come_together_are_computed_once(random_bundle, kind):
    """The same one several times, as for ``n`` answers, and others that begin alike."""
    model = MeltModel.load(random_bundle(**KINDS[kind]), device="cpu", capacity=CAPACITY, chunk=CHUNK, slots=4)
    prompts = [PROMPT, PROMPT, OTHER, PROMPT]
    configs = [GenerationConfig(loops=4, max_new_tokens=4, **{**FREE, "seed": seed}) for seed in range(4)]
    fresh = [model.generate(prompt, config).token_ids for prompt, config in zip(prompts, configs, strict=True)]
    expected = [0, 29, 20 if kind == "LoopLM" else 16, 29]
    together = model.generate_batch(prompts, configs)
    assert [(one.token_ids, one.cached_tokens) for one in together] == [*zip(fresh, expected, strict=True)]
    with model.new_service() as service:
        replies = [service.submit(prompt, config) for prompt, config in zip(prompts, configs, strict=True)]
        results = [reply.wait() for reply in replies]
        assert [one.token_ids for one in results] == fresh
        assert [one.cached_tokens for one in results] == [29, 29, 25, 29]  # the slots hold what the batch left
        passes = service.load.passes
        one = service.submit(PROMPT, GenerationConfig(loops=4, max_new_tokens=1, **FREE)).wait()
        assert (one.cached_tokens, service.load.passes) == (29, passes)  # only the head ran


def test_conversations_that_begin_alike_keep_their_slots(random_bundle):
    model = MeltModel.load(random_bundle(gate_kind="none"), device="cpu", capacity=CAPACITY, chunk=CHUNK, slots=2)
    config, other = GenerationConfig(loops=2, max_new_tokens=2, **FREE), [*PROMPT[:10], *range(300, 340)]
    with model.new_service() as service:
        cached = [service.submit(prompt, config).wait().cached_tokens for prompt in (PROMPT, other, PROMPT, other)]
    assert cached == [0, 10, 29, 50]


def test_a_failed_turn_gives_back_a_chunk_that_it_had_kept_a_part_of(model):
    settings = {"loops": 3, "max_new_tokens": 3, **FREE}
    session, fresh = model.new_session(), model.new_session()
    for one in (session, fresh):
        one.generate(chat(["Ana reports to Ben. Who is above Ana?"]), **settings)

    def fail(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.generate(chat(["Ana reports to Cleo. Who is above Ana?"]), progress=fail, **settings)
    results = [one.generate([7, 8, 9], **settings) for one in (session, fresh)]
    assert results[0].token_ids == results[1].token_ids
    for ours, theirs in zip(*(rows(one._engine.executor.state, one._slot) for one in (session, fresh)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_shallower_turn_over_deeper_tokens_is_saved_and_goes_on(random_bundle, tmp_path):
    """A LoopLM's tokens of an earlier, deeper turn serve a shallower one, and later a deeper one again."""
    model = MeltModel.load(random_bundle(gate_kind="none"), device="cpu", capacity=CAPACITY, chunk=CHUNK)
    deep, shallow = ({"loops": loops, "max_new_tokens": 3, **FREE} for loops in (4, 2))
    long, short = chat(["Who is above Ana? Ana reports to Ben."]), chat(["Who is above Ana? Ben reports to Ana."])
    session, restored, fresh = model.new_session(), model.new_session(), model.new_session()
    session.generate(long, **deep)
    found = session.generate(short, **shallow).cached_tokens
    session.save(tmp_path / "talk")
    restored.restore(tmp_path / "talk")
    kept = session.generate(long, **deep).cached_tokens
    assert kept == found > 0
    fresh.generate(short, **shallow)
    results = [one.generate("And Cleo?", **shallow) for one in (restored, fresh)]
    assert results[0].token_ids == results[1].token_ids
    assert results[0].cached_tokens == results[1].cached_tokens


def test_a_conversation_goes_on_over_everything_before():
    """A message after a turn that ended with its stop token: only the new tokens are run, at any depth.

    The same conversation given as a list is another thing: its chunks are those of one long prompt.
    """
    model = MeltModel.load(DEMO, device="cpu", capacity=300, chunk=4)
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
