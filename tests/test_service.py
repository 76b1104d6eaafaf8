"""Requests from threads and event loops over one batch: each answered as alone, cancelled, refused, drained."""

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from contextlib import ExitStack

import numpy as np
import pytest
from conftest import HANG

from melt_runtime import (
    AsyncMeltModel,
    BusyError,
    CancelledError,
    GenerationConfig,
    MeltModel,
    QueueError,
    RunError,
    SavedError,
    StreamError,
    TokenError,
)
from melt_runtime.reply import Part, Submission

PROMPTS = [[(7 * place + start) % 650 for place in range(9 + start)] for start in range(12)]
SAID = GenerationConfig(max_new_tokens=8, temperature=0.0)
LONG = GenerationConfig(max_new_tokens=200, temperature=0.0)


@pytest.fixture(scope="module")
def model(random_bundle):
    return MeltModel.load(random_bundle("float32"), device="cpu", capacity=256, slots=3)


@pytest.fixture(scope="module")
def alone(model):
    """The answers, one at a time."""
    return [model.generate(prompt, SAID).token_ids for prompt in PROMPTS]


@pytest.fixture
def service(model, alone):
    with model.new_service(queue=16) as service:
        yield service


def test_every_answer_is_that_of_a_lone_request(service, alone):
    found: dict[int, list[Part]] = {number: [] for number in range(len(PROMPTS))}
    ended = []
    replies = [
        service.submit(prompt, SAID, on_part=found[number].append, on_end=ended.append)
        for number, prompt in enumerate(PROMPTS)
    ]
    assert [reply.wait().token_ids for reply in replies] == alone
    for reply, parts in zip(replies, found.values(), strict=True):
        assert sum((part.token_ids for part in parts), ()) == reply.result.token_ids
        assert "".join(part.text for part in parts) == reply.result.text
        assert reply.started_at >= reply.queued_at
    assert set(ended) == set(replies)
    # First come, first served: with as many tokens each, they end in their order.
    assert [replies.index(reply) for reply in ended] == list(range(len(PROMPTS)))


def test_threads_may_ask_at_once(service, alone):
    answers: dict[int, tuple[int, ...]] = {}

    def ask(number):
        answers[number] = service.submit(PROMPTS[number], SAID).wait().token_ids

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[number] for number in range(len(PROMPTS))] == alone


def wait_until(holds):
    while not holds():
        time.sleep(0.001)


def test_a_cancelled_request_frees_its_slot(service, alone):
    held = [service.submit(prompt, LONG) for prompt in PROMPTS[:3]]
    waiting = [service.submit(prompt, SAID) for prompt in PROMPTS[3:5]]
    wait_until(lambda: (service.load.running, service.load.waiting) == (3, 2))
    waiting[0].cancel()
    with pytest.raises(CancelledError):
        waiting[0].wait()
    held[1].cancel()
    with pytest.raises(CancelledError):
        held[1].wait()
    assert waiting[1].wait().token_ids == alone[4]
    held[1].cancel()  # nothing happens any more
    for reply in (held[0], held[2]):
        reply.cancel()
    wait_until(lambda: service.load.running == 0)
    assert service.submit(PROMPTS[0], SAID).wait().token_ids == alone[0]


def test_more_than_may_wait_are_refused(model, alone):
    with model.new_service(queue=2) as service:
        held = [service.submit(prompt, LONG) for prompt in PROMPTS[:3]]
        wait_until(lambda: service.load.running == 3)
        waiting = [service.submit(prompt, SAID) for prompt in PROMPTS[3:5]]
        with pytest.raises(QueueError, match=r"queue full \(2 requests waiting\)"):
            service.submit(PROMPTS[5], SAID)
        for reply in held:
            reply.cancel()
        assert [reply.wait().token_ids for reply in waiting] == alone[3:5]


def test_requests_submitted_together_leave_slots_to_others(model, alone):
    """They enter one by one while others wait, never fill all slots, and count as one in the queue."""
    held, gate = threading.Event(), threading.Event()
    with model.new_service(queue=1) as service, ExitStack() as leaving:
        leaving.callback(gate.set)  # a failure ends the service, too
        # Holds the service's thread until all are there.
        service.submit(PROMPTS[0], LONG, on_part=lambda _: held.set() or gate.wait())
        wait_until(held.is_set)

        def together(count):
            requests = [service.prepare(service.encode(PROMPTS[number]), SAID) for number in range(count)]
            return service.submit_all([Submission(request) for request in requests])

        first, second = together(6), together(2)
        last = service.submit(PROMPTS[3], SAID)
        assert service.load.waiting == 9
        with pytest.raises(QueueError, match="queue full"):
            together(2)
        gate.set()
        replies = [*first, *second, last]
        assert [reply.wait().token_ids for reply in replies] == [*alone[:6], *alone[:2], alone[3]]
        begun = sorted(replies, key=lambda reply: reply.started_at)
        assert begun[:3] == [first[0], second[0], last]
    with model.new_service() as service:
        requests = [service.prepare(service.encode(PROMPTS[number]), LONG) for number in range(4)]
        held = service.submit_all([Submission(request) for request in requests])
        wait_until(lambda: service.load.running == 2)
        assert service.submit(PROMPTS[5], SAID).wait().token_ids == alone[5]
        assert (service.load.running, service.load.waiting) == (2, 2)
        held[2].cancel()  # it waits, and never had a slot
        with pytest.raises(CancelledError):
            held[2].wait()


@pytest.mark.parametrize("seconds", [float("nan"), -1, "1", [], True, np.datetime64("nat")])
def test_odd_seconds_are_refused(service, alone, seconds):
    reply = service.submit(PROMPTS[0], SAID)
    with pytest.raises(ValueError, match="seconds must be"):
        reply.wait(seconds)
    for long in (float("inf"), 1e300, 10**400, None, np.float32(60)):
        assert reply.wait(long).token_ids == alone[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda service: service.submit(PROMPTS[0], {"loops": 2}), "config must be a GenerationConfig"),
        (lambda service: service.submit(PROMPTS[0], None), "config must be a GenerationConfig"),
        (lambda service: service.submit(PROMPTS[0], SAID, raw=2), "raw must be True or False"),
        (lambda service: service.submit(PROMPTS[0], SAID, on_part=3), "on_part must be callable"),
        (lambda service: service.submit(PROMPTS[0], SAID, on_end="x"), "on_end must be callable"),
        (lambda service: service.submit(iter(PROMPTS[0]), SAID), "prompt must be"),
        (lambda service: service.save(PROMPTS[0], None), "path must be the path of a file"),
        (lambda service: service.save(PROMPTS[0], "\0"), "path must be a path without null"),
        (lambda service: service.save(PROMPTS[0], "/dev/null"), "path must be a file that may be replaced"),
        (lambda service: service.save(PROMPTS[0], "/nowhere/x"), "path must lie in a folder that exists"),
        (lambda service: service.prepare([5, 6], SAID), "prompt must be an EncodedPrompt"),
        (lambda service: service.prepare(service.encode([5]), SAID, 3), "defaults must be a GenerationConfig or None"),
        (lambda service: service.submit_all(5), "submissions must be a list of Submission"),
        (lambda service: service.submit_all([5]), "submissions must be a list of Submission"),
        (lambda service: Submission("Who?"), "request must be a Request"),
        (lambda service: service.restore(3), "path must be the path of a file"),
        (lambda service: service.close(float("nan")), "seconds must be"),
    ],
)
def test_odd_arguments_are_refused(service, call, message):
    with pytest.raises(ValueError, match=message):
        call(service)
    assert service.load.waiting == 0


@pytest.mark.parametrize(
    ("tools", "message"), [(5, "tools must be a list"), ("x", "tools must be"), ([1], r"tools\[0\]")]
)
def test_odd_tools_are_refused(model, tools, message):
    with pytest.raises(TokenError, match=message):
        model.codec.render([{"role": "user", "content": "Who?"}], tools)


def test_a_forked_child_is_refused_and_never_waits(service, tmp_path):
    """The service's thread does not run in it, and its locks may be taken for ever."""
    reply = service.submit(PROMPTS[0], LONG)
    ended = service.submit(PROMPTS[1], SAID)
    ended.wait()
    calls = [
        lambda: service.submit(PROMPTS[0], SAID),
        lambda: service.save(PROMPTS[0], tmp_path / "x"),
        lambda: service.restore(tmp_path / "x"),
        lambda: service.load,
        reply.wait,
    ]
    with service._changed:  # as a pass of the service may hold it
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            refused = 0
            for call in calls:
                try:
                    call()
                except QueueError as error:
                    refused += "forked" in str(error)
            reply.cancel()
            service.close()
            os._exit(0 if (refused, len(ended.wait().token_ids), service.is_open) == (len(calls), 8, False) else 1)
    assert os.waitpid(child, 0)[1] == 0
    reply.cancel()


def test_a_callback_does_not_wait_for_its_own_service(service, tmp_path):
    errors = []

    def on_part(_):
        try:
            service.save(PROMPTS[0], tmp_path / "x")
        except BusyError as error:
            errors.append(str(error))

    service.submit(PROMPTS[0], SAID, on_part=on_part).wait()
    assert errors
    assert all("cannot wait for the service" in error for error in errors)


def test_work_that_panics_ends_no_service(service, tmp_path, monkeypatch):
    class PanicException(BaseException):
        pass

    def fails(*_):
        raise PanicException("of a library")

    monkeypatch.setattr("melt_runtime.execute.saved.load_slot", fails)
    with pytest.raises(RunError, match="PanicException: of a library"):
        service.restore(tmp_path / "x")
    assert service.is_open


def spelled(codec, text):
    """Tokens of a text, a character each: never those that the tokenizer would choose."""
    return [codec.tokenizer.token_to_id(letter.replace(" ", "\u0120")) for letter in f" {text}"]


@pytest.mark.parametrize("answer", ["Ana reports", "Ana", "Ana reports to Ben."])
def test_a_conversation_whose_answer_tokenizes_otherwise_is_saved(model, service, tmp_path, answer):
    drawn = spelled(model.codec, answer)

    def draw(ids, logits):
        return np.where(np.arange(len(logits)) == drawn[len(ids)], np.float32(0), np.float32(-np.inf))

    chat = [{"role": "user", "content": "Who reports to whom? " * 3}]
    asked = model.codec.encode(model.codec.render(chat))
    config = GenerationConfig(max_new_tokens=len(drawn), stop_ids=(), logits_processors=(draw,))
    result = service.submit(chat, config).wait()
    assert result.text == answer
    chat.append({"role": "assistant", "content": answer})
    again = model.codec.encode(model.codec.render([*chat, {"role": "user", "content": "Why?"}]))
    assert again[len(asked) :][: len(drawn)] != drawn
    for _ in range(2):
        saved = service.save(chat, tmp_path / "talk")
        assert len(asked) <= saved < len(asked) + len(drawn)
        assert service.restore(tmp_path / "talk") == saved
    other = [{"role": "user", "content": "Who reports to whom? " * 2}]
    for stranger in (other, [*other, chat[1]], [{"role": "user", "content": "Never asked"}]):
        with pytest.raises(SavedError, match="no slot that is free holds this conversation"):
            service.save(stranger, tmp_path / "talk")


def test_what_cannot_be_answered_is_refused_before_it_waits(service):
    for prompt, config, error in (
        ([], SAID, "must hold at least one"),
        ([700, 9999], SAID, r"token ids must be in \[0, 703\)"),
        (PROMPTS[0], GenerationConfig(max_new_tokens=1000), "capacity"),
    ):
        with pytest.raises(Exception, match=error):
            service.submit(prompt, config)
    assert service.load.waiting == 0


def test_the_model_s_own_session_is_at_work_meanwhile(model, service):
    with pytest.raises(BusyError):
        model.generate(PROMPTS[0], SAID)
    with pytest.raises(BusyError):
        model.new_service()
    assert len(model.new_session().generate(PROMPTS[0], SAID).token_ids) == 8


def test_a_service_that_closes_ends_what_it_has_or_cancels_it(model, alone):
    service = model.new_service()
    replies = [service.submit(prompt, SAID) for prompt in PROMPTS[:5]]
    service.close(seconds=600)
    assert [reply.wait().token_ids for reply in replies] == alone[:5]
    service = model.new_service()
    replies = [service.submit(prompt, LONG) for prompt in PROMPTS[:5]]
    service.close()
    for reply in replies:
        with pytest.raises(CancelledError):
            reply.wait()
    with pytest.raises(QueueError, match="closing"):
        service.submit(PROMPTS[0], SAID)
    service.close()
    assert model.generate(PROMPTS[0], SAID).token_ids == alone[0]


def test_a_failed_pass_ends_those_that_were_in_it(service, alone, monkeypatch):
    run = service._engine.executor.run
    fails = threading.Event()

    def once(spans):
        if fails.is_set():
            fails.clear()
            raise RunError("no memory left")
        run(spans)

    monkeypatch.setattr(service._engine.executor, "run", once)
    begun = threading.Event()
    reply = service.submit(PROMPTS[0], LONG, on_part=lambda _: begun.set())
    begun.wait()
    fails.set()
    with pytest.raises(RunError):
        reply.wait()
    assert service.submit(PROMPTS[1], SAID).wait().token_ids == alone[1]


def test_a_caller_s_own_failure_is_its_own(service, alone, monkeypatch):
    seen = []
    monkeypatch.setattr(threading, "excepthook", seen.append)

    def fails(_):
        raise ZeroDivisionError("of the caller's own")

    failing, other = service.submit(PROMPTS[0], SAID, on_part=fails), service.submit(PROMPTS[1], SAID, on_end=fails)
    with pytest.raises(ZeroDivisionError):
        failing.wait()
    assert other.wait().token_ids == alone[1]
    assert service.submit(PROMPTS[2], SAID).wait().token_ids == alone[2]
    assert [found.exc_type for found in seen] == [ZeroDivisionError]


def test_a_panic_of_a_library_ends_its_own_pass(service, alone):
    """Of Rust, as tokenizers and llguidance are: not even an Exception."""

    class PanicException(BaseException):
        pass

    def fails(ids, logits):
        raise PanicException("index out of bounds")

    reply = service.submit(PROMPTS[0], GenerationConfig(max_new_tokens=8, logits_processors=[fails]))
    with pytest.raises(RunError, match="PanicException: index out of bounds"):
        reply.wait(60)
    assert service.submit(PROMPTS[1], SAID).wait(60).token_ids == alone[1]
    assert service.is_open


def test_nothing_is_restored_into_slots_that_are_at_work(service, tmp_path):
    held = [service.submit(prompt, LONG) for prompt in PROMPTS[:3]]
    wait_until(lambda: service.load.running == 3)
    with pytest.raises(QueueError, match="every slot is at work"):
        service.restore(tmp_path / "any")
    for reply in held:
        reply.cancel()


def test_a_conversation_that_comes_back_finds_its_slot(service):
    first = [service.submit([*range(start, start + 70)], SAID).wait() for start in (0, 100, 200)]
    again = [
        service.submit([*range(start, start + 70), *one.token_ids, 1, 2], SAID).wait()
        for start, one in reversed([*zip((0, 100, 200), first, strict=True)])
    ]
    chunk = service.desk.plan.chunk
    assert [one.cached_tokens for one in again] == [70 // chunk * chunk] * 3
    assert chunk <= 70


def test_nothing_stays_of_a_request(service):
    reply = service.submit(PROMPTS[0], SAID)
    reply.wait()
    gone = weakref.ref(reply)
    del reply
    wait_until(lambda: service.load.running == 0)
    gc.collect()
    assert gone() is None


def test_tasks_of_an_event_loop(model, alone):
    async def run():
        async with AsyncMeltModel(model) as asynchronous:
            results = await asyncio.gather(*(asynchronous.generate(prompt, SAID) for prompt in PROMPTS))
            whole = asynchronous.stream(PROMPTS[0], max_new_tokens=8)
            with pytest.raises(StreamError, match="not ended"):
                _ = whole.result
            parts = [part async for part in whole]
            stream = asynchronous.stream(PROMPTS[1], LONG)
            await anext(stream)
            await stream.aclose()
            asked = asyncio.create_task(asynchronous.generate(PROMPTS[2], LONG))
            while asynchronous.service.load.running < 1:
                await asyncio.sleep(0.001)
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked
            early = asyncio.create_task(asynchronous.generate(PROMPTS[3], LONG))
            await asyncio.sleep(0)
            early.cancel()
            with pytest.raises(asyncio.CancelledError):
                await early
            while asynchronous.service.load.running or asynchronous.service.load.waiting:
                await asyncio.sleep(0.001)
            with pytest.raises(ValueError, match="unknown generation options"):
                await asynchronous.generate(PROMPTS[0], loopz=3)
            return results, parts, whole.result

    results, parts, whole = asyncio.run(run())
    assert [one.token_ids for one in results] == alone
    assert whole.token_ids == alone[0] == sum((part.token_ids for part in parts), ())
    assert whole.text == "".join(part.text for part in parts)
    assert {type(part) for part in parts} == {Part}


@pytest.mark.parametrize("way", ["goes on", "leaves", "from a thread", "before its first part"])
def test_a_cancelled_stream_of_an_event_loop_has_what_came_of_it(model, way):
    """Its fourth token waits until the stream was cancelled, however late the event loop gets its turn."""
    is_cancelled = threading.Event()

    def wait(ids, logits):
        assert len(ids) < 3 or is_cancelled.wait(HANG)
        return logits

    async def run():
        async with AsyncMeltModel(model) as asynchronous:
            stream, parts = asynchronous.stream(PROMPTS[1], LONG, logits_processors=[wait]), []
            if way == "before its first part":
                stream.cancel()
            async for part in stream:
                parts.append(part)
                await (asyncio.to_thread(stream.cancel) if way == "from a thread" else asyncio.sleep(0))
                stream.cancel()
                is_cancelled.set()
                if way == "leaves":
                    break
            await stream.aclose()
            while asynchronous.service.load.running or asynchronous.service.load.waiting:
                await asyncio.sleep(0.001)
            return stream.result, parts

    result, parts = asyncio.run(run())
    assert result.finish_reason == "cancelled"
    assert result.text.startswith("".join(part.text for part in parts))
    assert way == "leaves" or result.token_ids == sum((part.token_ids for part in parts), ())
    assert (len(result.token_ids) == 0) == (way == "before its first part")
    assert len(result.token_ids) == len(result.loops_per_token)


def test_a_stream_that_nobody_holds_frees_its_slot(model):
    async def run():
        async with AsyncMeltModel(model) as asynchronous:
            async for _ in asynchronous.stream(PROMPTS[1], LONG):
                break
            gc.collect()
            while asynchronous.service.load.running:
                await asyncio.sleep(0.001)

    asyncio.run(run())


def test_the_runtime_is_imported_without_an_event_loop():
    """Which takes longer than most of it; until ``AsyncMeltModel`` is asked for."""
    code = "import sys, melt_runtime; print('asyncio' in sys.modules, melt_runtime.AsyncMeltModel.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "AsyncMeltModel"]
