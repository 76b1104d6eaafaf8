"""Streams: nothing moves before the first piece, whatever ends one leaves a usable session, one call at a time."""

import gc
import sys
import threading

import numpy as np
import pytest
from conftest import HANG

from melt_runtime import BusyError, MeltModel, NumericalError, Session, StreamError

PROMPT = "Ana reports to Ben. Who is one level above Ana?"
FREE = {"stop_ids": (), "temperature": 1.0, "seed": 1}
"""Drawn, so that a random model says some text: greedily it may repeat one token, even one that has none."""


@pytest.fixture(scope="module")
def model(random_bundle) -> MeltModel:
    return MeltModel.load(random_bundle(), device="cpu", capacity=250)


@pytest.fixture
def session(model) -> Session:
    """A session with one turn of chat."""
    session = model.new_session()
    session.generate("Ana reports to Ben.", max_new_tokens=7, **FREE)
    return session


def look(session: Session) -> tuple:
    """All that a caller can see of a session, and what its cache holds."""
    state, slot = session._engine.executor.state, session._slot
    rows = slot.length
    keys = [buffer.read()[:, :, :rows].tobytes() for layer in state.caches[0] for buffer in layer]
    return session.token_ids, list(session.messages), slot.depths.tolist(), keys


def next_turn(session: Session, prompt="Who is Ben?") -> tuple:
    """A turn's answer and the last logits behind it."""
    result = session.generate(prompt, max_new_tokens=6, **FREE)
    return result.token_ids, result.text, session._engine.executor.state.logits.read()[0].tobytes()


def test_nothing_moves_before_the_first_piece(model, session):
    before = look(session)
    streams = [session.stream(PROMPT), session.stream([1, 2, 3]), session.stream("x", raw=True)]
    assert look(session) == before
    assert session.open_stream is None
    streams[0].close()
    assert list(streams[0]) == []
    del streams
    assert look(session) == before
    model.generate(PROMPT, max_new_tokens=3)
    before = look(model.session)
    model.stream("Something else.", max_new_tokens=3).close()
    assert look(model.session) == before


def test_a_stream_that_the_conversation_left_behind_says_so(session):
    unused = session.stream(PROMPT, max_new_tokens=3)
    session.generate("Who?", max_new_tokens=2)
    before = look(session)
    for _ in range(2):
        with pytest.raises(StreamError, match="another turn began, or a reset, since this stream was made"):
            next(unused)
    assert look(session) == before
    unused = session.stream(PROMPT, max_new_tokens=3)
    session.reset()
    with pytest.raises(StreamError, match="another turn began, or a reset"):
        next(unused)


def test_streams_that_stand_alone_do_not_mind_the_turns_between(model):
    expected = model.generate(PROMPT, max_new_tokens=5).text
    first, second = model.stream(PROMPT, max_new_tokens=5), model.stream("Who?", max_new_tokens=5)
    list(second)
    assert "".join(first) == expected
    assert model.session.messages[0]["content"] == PROMPT


def end_by_close(stream) -> None:
    stream.close()
    stream.close()


def end_by_with(stream) -> None:
    with pytest.raises(KeyError), stream:
        raise KeyError


def end_by_error(stream) -> None:
    """As Ctrl-C arrives: an exception out of the middle of a token."""
    interrupted(stream, "run")


def end_by_late_error(stream) -> None:
    """As Ctrl-C arrives when a token was run and counted, before the next was chosen."""
    interrupted(stream, "compute_logits")


def interrupted(stream, name: str) -> None:
    executor = stream._turn._engine.executor
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, name, stop)
        with pytest.raises(KeyboardInterrupt):
            list(stream)


def stop(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("end", [end_by_close, end_by_with, end_by_error, end_by_late_error])
@pytest.mark.parametrize("pieces", [1, 4])
def test_a_turn_left_after_it_began_stays_with_its_text_so_far(model, end, pieces):
    session, fresh = model.new_session(), model.new_session()
    for one in (session, fresh):
        one.generate("Ana reports to Ben.", max_new_tokens=7, **FREE)
    stream = session.stream(PROMPT, max_new_tokens=30, **FREE)
    shown = "".join(next(stream) for _ in range(pieces))
    assert session.open_stream is stream
    new = len(session.token_ids) - len(fresh.token_ids)
    end(stream)
    assert session.open_stream is None
    assert session.messages[-2] == {"role": "user", "content": PROMPT}
    assert session.messages[-1]["content"].startswith(shown)
    assert list(stream) == []
    with pytest.raises(StreamError, match="not ended"):
        _ = stream.result
    # The same turn, ended by its length at the same token.
    prompt = len(
        fresh._desk.codec.encode(fresh._desk.codec.render([*fresh.messages, {"role": "user", "content": PROMPT}]))
    )
    fresh.generate(PROMPT, max_new_tokens=len(session.token_ids) - prompt, **FREE)
    assert new > 0
    assert look(session) == look(fresh)
    assert next_turn(session) == next_turn(fresh)


def cancel_and_go_on(stream, piece):
    stream.cancel()
    return piece + "".join(stream)


def cancel_and_break(stream, piece):
    with stream:
        stream.cancel()
    return piece


def cancel_from_a_thread(stream, piece):
    thread = threading.Thread(target=stream.cancel)
    thread.start()
    thread.join()
    return piece + "".join(stream)


def cancel_and_ask(stream, piece):
    stream.cancel()
    return piece if stream.result else ""


@pytest.mark.parametrize("cancel", [cancel_and_go_on, cancel_and_break, cancel_from_a_thread, cancel_and_ask])
@pytest.mark.parametrize("settings", [{}, {"decode": "wave", "temperature": 0.0}, {"loops": 1, "logprobs": 1}])
def test_a_cancelled_stream_has_what_came_of_it(model, cancel, settings):
    session, left = model.new_session(), model.new_session()
    for one in (session, left):
        one.generate("Ana reports to Ben.", max_new_tokens=7, **FREE)
    settings = {"max_new_tokens": 30, **FREE, **settings, "stop": ("never said",)}
    stream, other = session.stream(PROMPT, **settings), left.stream(PROMPT, **settings)
    text = cancel(stream, next(stream))
    next(other)
    other.close()
    result = stream.result
    assert result.finish_reason == "cancelled"
    assert len(result.token_ids) == len(result.loops_per_token) < 30
    assert result.logprobs is None or len(result.logprobs) == len(result.token_ids)
    assert result.text.startswith(text)
    assert cancel in (cancel_and_break, cancel_and_ask) or result.text == text
    assert session.messages[-1] == {"role": "assistant", "content": result.text}
    assert session.open_stream is None
    assert look(session) == look(left)
    assert next_turn(session) == next_turn(left)
    stream.cancel()
    assert stream.result is result
    assert list(stream) == []


def test_a_stream_that_is_cancelled_before_its_first_token_leaves_the_conversation(session):
    before, length = look(session), len(session.token_ids)
    stream = session.stream(PROMPT, max_new_tokens=5)
    stream.cancel()
    assert stream.result.finish_reason == "cancelled"
    assert (stream.result.token_ids, stream.result.text, stream.result.timings.prefill_tokens) == ((), "", 0)
    assert look(session) == before
    noted = []

    def meanwhile(done: int, total: int) -> None:
        noted.append((done, total))
        stream.cancel()

    stream = session.stream([7] * 40, max_new_tokens=5, progress=meanwhile, raw=False)
    assert list(stream) == []
    result, ((done, total),) = stream.result, noted
    assert (result.finish_reason, result.token_ids, result.timings.decode_tokens) == ("cancelled", (), 0)
    assert result.prompt_tokens == length + 40
    assert result.timings.prefill_tokens == done < total
    assert look(session) == before


def test_an_answer_that_has_ended_is_not_cancelled(session):
    stream = session.stream(PROMPT, max_new_tokens=3, **FREE)
    text = "".join(stream)
    stream.cancel()
    assert (stream.result.finish_reason, stream.result.text) == ("length", text)


def test_a_stream_that_nobody_holds_frees_its_session(session):
    for piece in session.stream(PROMPT, max_new_tokens=20, **FREE):
        assert piece
        break
    assert session.open_stream is None
    assert session.messages[-1]["role"] == "assistant"
    session.generate("Who?", max_new_tokens=2)
    stream = session.stream(PROMPT, max_new_tokens=20, **FREE)
    circle = [stream]
    circle.append(circle)
    next(stream)
    del stream, circle
    gc.collect()
    session.generate("Who?", max_new_tokens=2)


def fail_in_the_third_chunk(session: Session, kind: type[BaseException]):
    def fail(done: int, total: int) -> None:
        if done >= 17:
            raise kind

    return fail


@pytest.mark.parametrize("following", ["Who is Ben?", [9, 8, 7]], ids=["replaces", "continues"])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, KeyError])
@pytest.mark.parametrize(
    "prompt", [list(range(30, 60)), PROMPT * 3, [{"role": "user", "content": PROMPT * 3}]], ids=["ids", "text", "chat"]
)
def test_a_prompt_that_failed_leaves_the_conversation_as_it_was(model, kind, prompt, following):
    session, fresh = model.new_session(), model.new_session()
    for one in (session, fresh):
        one.generate("Ana reports to Ben. Ben reports to Cleo.", loops=2, max_new_tokens=7, **FREE)
        one.generate("Who is Cleo?", loops=3, max_new_tokens=5, **FREE)
    with pytest.raises(kind):
        session.generate(prompt, progress=fail_in_the_third_chunk(session, kind), max_new_tokens=3)
    assert (session.token_ids, session.messages) == (fresh.token_ids, fresh.messages)
    assert session.open_stream is None
    # Once more, now over a cache that has lost some of the conversation.
    with pytest.raises(kind):
        session.generate([{"role": "user", "content": "x" * 50}], progress=fail_in_the_third_chunk(session, kind))
    assert (session.token_ids, session.messages) == (fresh.token_ids, fresh.messages)
    assert next_turn(session, following) == next_turn(fresh, following)
    assert look(session) == look(fresh)


def test_a_model_that_fails_at_the_first_token_leaves_the_conversation_as_it_was(model, session, monkeypatch):
    fresh = model.new_session()
    fresh.generate("Ana reports to Ben.", max_new_tokens=7, **FREE)
    executor = session._engine.executor
    sick = np.full(executor.state.plan.shape.vocab_size, np.nan)
    monkeypatch.setattr(executor, "compute_logits", lambda spans: [sick for _ in spans])
    with pytest.raises(NumericalError, match="the model gave logits of nan"):
        session.generate(PROMPT)
    monkeypatch.undo()
    assert (session.token_ids, session.messages) == (fresh.token_ids, fresh.messages)
    assert next_turn(session) == next_turn(fresh)


def test_a_begun_stream_holds_its_session(model, session):
    stream = session.stream(PROMPT, max_new_tokens=20, **FREE)
    other = session.stream("Who?", max_new_tokens=2)
    next(stream)
    before = look(session)
    for call in (
        lambda: session.generate("Who?"),
        lambda: session.stream("Who?"),
        lambda: session.reset(),
        lambda: next(other),
    ):
        with pytest.raises(BusyError, match=r"close it \(session.open_stream.close\(\)\).*model.new_session\(\)"):
            call()
    assert look(session) == before
    session.open_stream.close()
    session.generate("Who?", max_new_tokens=2)
    stream = model.stream(PROMPT, max_new_tokens=20, **FREE)
    next(stream)
    for call in (lambda: model.generate("Who?"), lambda: model.stream("Who?"), model.reset):
        with pytest.raises(BusyError):
            call()
    with stream:
        assert next(stream)
    model.generate("Who?", max_new_tokens=2)


def test_a_refused_stream_can_be_asked_again(model):
    first, second = model.stream("Who?", max_new_tokens=5), model.stream(PROMPT, max_new_tokens=5)
    next(first)
    for _ in range(2):
        with pytest.raises(BusyError):
            next(second)
    first.close()
    assert "".join(second) == model.generate(PROMPT, max_new_tokens=5).text


def test_a_call_in_another_thread_is_refused_while_one_runs(model):
    """The second call comes while the first is inside a chunk of its prompt; both kinds of stream."""
    session, stream, refused = model.new_session(), None, []

    def meanwhile(done: int, total: int) -> None:
        if done == 16:
            thread = threading.Thread(target=ask)
            thread.start()
            thread.join()

    def ask() -> None:
        for call in (
            lambda: session.generate("Who?"),
            lambda: session.stream("Who?"),
            session.reset,
            lambda: next(stream),
            stream.close,
        ):
            try:
                call()
            except BusyError as error:
                refused.append(str(error))

    stream = session.stream(list(range(40)), max_new_tokens=5, progress=meanwhile, **FREE)
    assert "".join(stream) == model.generate(list(range(40)), max_new_tokens=5, **FREE).text
    assert len(refused) == 5
    assert sum("this stream is at work in another thread" in message for message in refused) == 2


def test_many_threads_on_one_session_answer_rightly_or_are_refused(model):
    session, outcomes = model.new_session(), []
    expected = model.generate([1, 2, 3], max_new_tokens=6, **FREE).token_ids
    model.reset()

    def work() -> None:
        for _ in range(12):
            try:
                outcomes.append(model.generate([1, 2, 3], max_new_tokens=6, **FREE).token_ids)
            except BusyError:
                outcomes.append("refused")

    in_threads([work] * 4)
    assert set(outcomes) <= {expected, "refused"}
    assert expected in outcomes
    assert len(outcomes) == 48
    assert session.generate([1, 2, 3], max_new_tokens=6, **FREE).token_ids == expected


def test_sessions_of_one_model_answer_side_by_side_as_they_do_alone(model):
    prompts = [[list(range(seed, seed + 11)), [seed, 7, 9]] for seed in range(20, 80, 15)]

    def answer(turns: list[list[int]]) -> list:
        session, found = model.new_session(), []
        for turn, loops in zip(turns, (4, 2), strict=True):
            settings = {"max_new_tokens": 20, "temperature": 0.9, "top_p": 0.9, "seed": turn[0], "loops": loops}
            found.append(session.generate(turn, **FREE | settings).token_ids)
        return [*found, session._engine.executor.state.logits.read()[0].tobytes()]

    serial = [answer(turns) for turns in prompts]
    found: list = [None] * len(prompts)

    def work(place: int) -> None:
        for _ in range(3):
            found[place] = answer(prompts[place])
            assert found[place] == serial[place]

    in_threads([lambda place=place: work(place) for place in range(len(prompts))])
    assert found == serial


def in_threads(tasks: list) -> None:
    """Runs them at once, switching often; fails where one does."""
    failures = []

    def guarded(task) -> None:
        try:
            task()
        except BaseException as error:
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=guarded, args=(task,)) for task in tasks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=HANG)
            assert not thread.is_alive()
    finally:
        sys.setswitchinterval(interval)
    assert failures == []


def test_a_prompt_reports_how_far_it_is(model):
    session, reports = model.new_session(), []
    note = lambda done, total: reports.append((done, total))  # noqa: E731
    session.generate(list(range(5, 24)), max_new_tokens=2, progress=note, **FREE)
    assert reports == [(8, 19), (16, 19), (19, 19)]
    reports.clear()
    list(session.stream([1] * 9, max_new_tokens=2, progress=note, **FREE))
    assert reports == [(8, 10), (10, 10)]  # the last token of the first answer was not run yet
