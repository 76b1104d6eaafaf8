"""Many sequences at once: each is answered as it would be alone, and none harms another."""

import gc
from dataclasses import replace

import numpy as np
import pytest
from conftest import random_model
from tolerances import assert_close, assert_greedy

from melt_runtime import (
    BatchError,
    BusyError,
    CapacityError,
    GenerationConfig,
    MeltModel,
    NumericalError,
    TokenError,
)
from melt_runtime.execute.executor import Flight
from melt_runtime.schedule.span import Span

CAPACITY, CHUNK, SLOTS = 60, 8, 3
KINDS = {
    "MELT": {},
    "scalar gate": {"gate_kind": "scalar"},
    "mean gate": {"gate_kind": "mean"},
    "last loop": {"gate_kind": "last"},
    "LoopLM": {"gate_kind": "none"},
}
FREE = {"stop_ids": ()}


@pytest.fixture(scope="module")
def model(random_bundle) -> MeltModel:
    return load(random_bundle)


def load(random_bundle, slots: int = SLOTS, **changes) -> MeltModel:
    return MeltModel.load(random_bundle(**changes), device="cpu", capacity=CAPACITY, chunk=CHUNK, slots=slots)


def draw(seed: int, count: int = 9) -> tuple[list[list[int]], list[GenerationConfig]]:
    """Prompts of one token to five chunks, answers of one token to what fits, at every depth; one fills the cache."""
    random = np.random.default_rng(seed)
    lengths = [*random.integers(1, 40, count - 1).tolist(), CAPACITY]
    prompts = [random.integers(0, 700, length).tolist() for length in lengths]
    configs = [
        GenerationConfig(loops=int(random.integers(1, 5)), max_new_tokens=int(random.integers(1, 18)), **FREE)
        for _ in prompts[:-1]
    ]
    return prompts, [*configs, GenerationConfig(loops=3, **FREE)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slots", [1, 2, 5])
def test_every_answer_is_torchs(random_bundle, kind, slots):
    """Prompts that come and go in any pass, neighbours at other loops, a slot that is full to its last row."""
    model, torch_model = load(random_bundle, slots, **KINDS[kind]), random_model(**KINDS[kind])
    prompts, configs = draw(slots)
    results = model.generate_batch(prompts, configs)
    for prompt, config, result in zip(prompts, configs, results, strict=True):
        assert len(result.token_ids) == (config.max_new_tokens or 1)
        assert (result.prompt_tokens, result.loops) == (len(prompt), config.loops)
        assert_greedy(torch_model, prompt, list(result.token_ids), config.loops, CHUNK)


def test_a_pass_over_several_gives_what_a_pass_over_one_does(random_bundle):
    """Where products over several rows differ in their last digits, by no more than rounding; the cache too."""
    model = load(random_bundle)
    prompts = [list(range(seed, seed + 5 + seed)) for seed in (3, 9, 14)]
    batch, alone = model.new_runner(batch=3), [model.new_runner() for _ in prompts]
    for number, prompt in enumerate(prompts):
        np.testing.assert_array_equal(
            batch.prefill(prompt, 4, sequence=number).copy(), alone[number].prefill(prompt, 4)
        )
    for token in range(20, 30):
        together = batch.decode([token, token + 1, token + 2], 4)
        for number, runner in enumerate(alone):
            assert_close(together[number], runner.decode([token + number], 4)[0])
    for number, runner in enumerate(alone):
        for ours, theirs in zip(batch.state.caches[0], runner.state.caches[0], strict=True):
            rows = runner.slots[0].length
            assert_close(ours[0].read()[number, :, :rows], theirs[0].read()[0, :, :rows])


def test_sampling_stop_rules_and_texts_are_each_requests_own(model):
    prompts = ["Ana reports to Ben.", "Who is Cleo?", [{"role": "user", "content": "Dan?"}], [5, 6, 7]]
    free = model.generate(prompts[1], max_new_tokens=12, **FREE)
    configs = [
        GenerationConfig(temperature=0.9, seed=3, top_p=0.9, max_new_tokens=9, **FREE),
        GenerationConfig(stop=(free.text[4:8],), max_new_tokens=12, **FREE),
        GenerationConfig(repetition_penalty=1.3, max_new_tokens=7, loops=2, **FREE),
        GenerationConfig(stop_ids=(model.generate([5, 6, 7], max_new_tokens=3, **FREE).token_ids[2],)),
    ]
    alone = [model.generate(prompt, config) for prompt, config in zip(prompts, configs, strict=True)]
    together = model.generate_batch(prompts, configs)
    for one, other in zip(alone, together, strict=True):
        assert (one.text, one.token_ids, one.finish_reason) == (other.text, other.token_ids, other.finish_reason)
    assert together[1].finish_reason == together[3].finish_reason == "stop"


def test_answers_come_as_they_finish_and_prompts_are_read_as_slots_become_free(model):
    taken = []

    def prompts():
        for number in range(7):
            taken.append(number)
            yield [number + 1] * 3

    configs = [GenerationConfig(max_new_tokens=30 if number == 0 else 2, **FREE) for number in range(7)]
    finished = []
    with model.stream_batch(prompts(), configs) as stream:
        for number, result in stream:
            finished.append(number)
            assert len(taken) <= len(finished) + SLOTS
            assert len(result.token_ids) == configs[number].max_new_tokens
    assert finished[-1] == 0
    assert sorted(finished) == list(range(7))


def test_prompts_that_cannot_be_answered_are_named_and_the_others_are_answered(model):
    prompts = [[1, 2], [], [703], [4] * 61, b"no", [3, 4], [{"role": "system", "content": "x"}], ""]
    reports = []
    with pytest.raises(BatchError, match=r"6 of the prompts could not be answered:\n  prompt 1: prompt must") as caught:
        model.generate_batch(prompts, max_new_tokens=2, progress=lambda *done: reports.append(done), **FREE)
    assert {number: type(error) for number, error in caught.value.errors.items()} == {
        1: TokenError,
        2: TokenError,
        3: CapacityError,
        4: ValueError,
        6: TokenError,
        7: TokenError,
    }
    assert set(caught.value.results) == {0, 5}
    assert caught.value.results[5].token_ids == model.generate([3, 4], max_new_tokens=2, **FREE).token_ids
    assert reports == [(done, 8) for done in range(1, 9)]
    assert model.generate_batch([[1, 2]], max_new_tokens=2, **FREE)[0].token_ids == caught.value.results[0].token_ids


def test_a_sequence_that_becomes_nan_harms_no_other(model, monkeypatch):
    prompts = [[seed] * 4 for seed in range(3, 8)]
    alone = [model.generate(prompt, max_new_tokens=6, **FREE).token_ids for prompt in prompts]
    executor = model.session._engine.executor
    compute, steps = executor.compute_logits, []

    def sick(spans: list[Span]) -> list[np.ndarray]:
        steps.extend(span.slot for span in spans)
        found = compute(spans)
        return [
            np.full(703, np.nan) if steps.count(1) == 3 and span.slot == 1 else logits
            for span, logits in zip(spans, found, strict=True)
        ]

    monkeypatch.setattr(executor, "compute_logits", sick)
    with pytest.raises(BatchError) as caught:
        model.generate_batch(prompts, max_new_tokens=6, **FREE)
    assert [type(error) for error in caught.value.errors.values()] == [NumericalError]
    assert {number: result.token_ids for number, result in caught.value.results.items()} == {
        number: tokens for number, tokens in enumerate(alone) if number not in caught.value.errors
    }


@pytest.mark.parametrize("end", ["close", "drop", "error"])
def test_a_batch_that_is_left_leaves_everything_usable(model, end):
    prompts = [[seed] * 20 for seed in range(2, 9)]
    expected = [result.token_ids for result in model.generate_batch(prompts, max_new_tokens=5, **FREE)]

    def broken():
        yield from prompts[:4]
        raise KeyError

    stream = model.stream_batch(broken() if end == "error" else prompts, max_new_tokens=5, **FREE)
    next(stream)
    assert model.session.open_stream is stream
    for call in (lambda: model.generate([1]), lambda: model.generate_batch([[1]]), model.reset):
        with pytest.raises(BusyError):
            call()
    if end == "close":
        stream.close()
        assert list(stream) == []
    elif end == "drop":
        del stream
        gc.collect()
    else:
        with pytest.raises(KeyError):
            list(stream)
    slots = model.session._engine.executor.slots
    assert (slots.free, model.session.open_stream, model.session.token_ids) == (SLOTS - 1, None, ())
    assert [result.token_ids for result in model.generate_batch(prompts, max_new_tokens=5, **FREE)] == expected
    assert model.generate(prompts[0], max_new_tokens=5, **FREE).token_ids == expected[0]


def test_a_batch_that_its_reader_interrupts_is_not_begun_again(model):
    """The callback's own error passes through, and ends the batch."""

    def again(done: int, total: int) -> None:
        if done == 2:
            model.generate([1])

    stream = model.stream_batch([[1], [2], [3], [4]], max_new_tokens=1, progress=again, **FREE)
    next(stream)
    with pytest.raises(BusyError):
        list(stream)
    assert list(stream) == []
    assert model.session.open_stream is None


def test_nothing_moves_before_the_first_answer_is_asked_for(model):
    session = model.session
    session.reset()
    session.generate([1, 2, 3], max_new_tokens=2, **FREE)
    before = session.token_ids
    model.stream_batch([[1]], max_new_tokens=2)
    waiting = session.stream([4], max_new_tokens=2)
    assert session.token_ids == before
    assert len(model.generate_batch([], max_new_tokens=2)) == 0
    assert len(model.generate_batch([[9, 8]], max_new_tokens=2, **FREE)) == 1
    assert session.token_ids == ()
    with pytest.raises(RuntimeError, match="another turn began, or a reset"):
        next(waiting)


def test_a_state_has_room_for_every_slot(random_bundle):
    one, eight = (load(random_bundle, slots) for slots in (1, 8))
    assert eight.session.plan.cache_bytes == 8 * one.session.plan.cache_bytes
    assert eight.state_bytes == eight.session.plan.total_bytes
    assert eight.new_session().plan.batch == 1
    result = eight.generate_batch([[1, 2]], max_new_tokens=1, **FREE)[0]
    assert result.state_bytes == eight.state_bytes
    assert result.token_ids == one.generate([1, 2], max_new_tokens=1, **FREE).token_ids


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": "Ana?"}, "prompts must be several prompts, one after another, got 'Ana\\?'"),
        ({"prompts": 5}, "prompts must be several prompts"),
        ({"prompts": np.array(3)}, r"prompts must be several prompts, one after another, got array\(3\)"),
        ({"raw": 1}, "raw must be True or False"),
        ({"config": 5}, "config must be a GenerationConfig, or a sequence of them"),
        ({"config": [GenerationConfig()]}, "config must be one, or one for each of 2 prompts, got 1"),
        ({"config": [GenerationConfig(), {}]}, "config must be a GenerationConfig, got {}"),
        ({"progress": 1}, "progress must be callable"),
        ({"loops": 0}, "loops must be at least 1"),
        ({"top_q": 0}, "unknown generation options"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_before_anything_moves(model, arguments, message):
    session = model.session
    session.reset()
    session.generate([1, 2, 3], max_new_tokens=2, **FREE)
    before = session.token_ids
    for call in (model.generate_batch, model.stream_batch):
        with pytest.raises(ValueError, match=message):
            call(**{"prompts": [[1], [2]], **arguments})
    assert session.token_ids == before


def test_what_can_be_iterated_once_reaches_every_prompt(model):
    free = model.generate([1, 2], max_new_tokens=9, **FREE)
    config, stop = GenerationConfig(max_new_tokens=9, **FREE), free.text[3:5]
    results = model.generate_batch([[1, 2]] * 3, [config] * 3, stop=(text for text in [stop]))
    assert {result.text for result in results} == {free.text[: free.text.index(stop)]}


def test_slots_that_an_interrupt_left_behind_are_free_again(model, monkeypatch):
    slots = model.session._engine.executor.slots
    acquire = slots.acquire

    def interrupted():
        acquire()
        monkeypatch.setattr(slots, "acquire", acquire)
        raise KeyboardInterrupt

    for _ in range(SLOTS + 1):
        stream = model.stream_batch([[5, 6], [7]], max_new_tokens=1, **FREE)
        monkeypatch.setattr(slots, "acquire", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    assert slots.free == SLOTS - 1
    assert model.generate([1], max_new_tokens=1, **FREE).token_ids


def test_too_few_configs_for_prompts_that_are_made_one_by_one(model):
    with pytest.raises(BatchError, match="prompt 1: config must be one for each prompt: there are 1"):
        model.generate_batch((prompt for prompt in [[1], [2]]), [GenerationConfig(max_new_tokens=1)])


def test_a_looplm_has_as_many_loops_as_caches(random_bundle):
    model = load(random_bundle, gate_kind="none")
    with pytest.raises(ValueError, match=r"loops must be at most 4, got 5.*load with loops=5"):
        model.stream_batch([[1]], loops=5)
    deep = replace(GenerationConfig(max_new_tokens=1, **FREE), loops=5)
    with pytest.raises(BatchError, match=r"prompt 1: loops must be at most 4, got 5"):
        model.generate_batch([[1], [1]], [replace(deep, loops=4), deep])


@pytest.mark.parametrize("slots", [0, -1, 1.5, True, 5000])
def test_slots_outside_their_rule(random_bundle, slots):
    with pytest.raises(ValueError, match="slots must be"):
        load(random_bundle, slots)


def test_a_pass_may_leave_out_a_token_that_is_under_way(model):
    """Its hidden state lies among its neighbours', and is left alone."""

    def run(order: list[tuple[int, ...]]) -> list[np.ndarray]:
        runner = model.new_runner(batch=3)
        for number in range(3):
            runner.prefill([number + 5] * 6, 4, sequence=number)
        spans = [Span(number, 6, [number + 1], 4) for number in range(3)]
        for span in spans:
            runner.slots[span.slot].flight = [span]
        for chosen in order:
            runner._executor.run([spans[number] for number in chosen])
        return [Flight(span, runner.state).hidden for span in spans]

    together = run([(0, 1, 2)] * 4)
    for order in ([(1,), *[(0, 2)] * 4, *[(1,)] * 3], [(2,), (0, 1), (2,), (1,), (0, 2), (0, 1), (0, 1, 2)]):
        for ours, theirs in zip(run(order), together, strict=True):
            assert_close(ours, theirs)
