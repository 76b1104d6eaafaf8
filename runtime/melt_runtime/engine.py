"""The heart: choose the rows of the next pass, run it, give each request its token. Requests of any kind, one way."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from melt_runtime.execute.executor import Executor
from melt_runtime.execute.slots import Slot
from melt_runtime.memory.plan import Array
from melt_runtime.progress import Progress
from melt_runtime.request.request import Request
from melt_runtime.request.result import GenerationResult
from melt_runtime.schedule.batched import Batched
from melt_runtime.schedule.depth import Exit
from melt_runtime.schedule.span import Span
from melt_runtime.schedule.wave import NOTHING, Wave


@dataclass(eq=False)
class Job:
    """A request on its slot.

    Attributes:
        request: what is answered.
        slot: its sequence, which has begun with the prompt.
        progress: told of the prompt, chunk by chunk.
        cached: tokens of the prompt that were in the cache when the job began.
        span: what is to be run next, or is under way, where no wave is.
        draws: whether the device chooses its tokens.
        error: what ended it before its end.
        wave: the tokens of the answer that are under way, where several may be; None in plain decoding.
        passes: that were run with tokens of the answer.
        failures: of tokens of a wave, why they say nothing.
        is_cached: whether the cache holds the whole prompt, so that the first token is chosen without a pass.
    """

    request: Request
    slot: Slot
    progress: Progress | None = None
    draws: bool = False
    error: Exception | None = None
    wave: Wave | None = None
    passes: int = 0
    failures: dict[Span, Exception] = field(default_factory=dict)
    cached: int = field(init=False, default=0)
    span: Span = field(init=False)
    is_cached: bool = field(init=False)

    def __post_init__(self) -> None:
        """Begins with what the cache does not hold of the prompt."""
        self.find(self.slot.length)

    def find(self, tokens: int) -> None:
        """Counts ``tokens`` more of the prompt as found in the cache, and goes on behind them."""
        slot = self.slot
        self.cached += tokens
        self.is_cached = slot.length == len(slot.ids)
        if self.is_cached:
            loops = self.request.settings.loops
            self.span = Span(slot.number, slot.length - 1, slot.ids[-1:], loops, loop=loops)
        else:
            self.span = self._next_span()

    @property
    def waits(self) -> bool:
        """Whether the next chunk of its prompt has not begun."""
        return not (self.request.new_ids or self.span.loop or self.is_done)

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to run."""
        return self.request.is_finished or self.error is not None

    @property
    def spans(self) -> list[Span]:
        """What is to be run next, or is under way, oldest first."""
        return self.wave.spans if self.wave is not None and self.wave.spans else [self.span]

    @property
    def running(self) -> list[Span]:
        """Those of them that take another loop."""
        return self.wave.running if self.wave is not None and self.wave.spans else [self.span]

    @property
    def last_position(self) -> int:
        """Of the last token that can have to be run: the answer's last one never is."""
        return len(self.request.prompt) + self.request.settings.max_new_tokens - 2

    def advance(self) -> bool:
        """Counts the span that took all its loops as final; whether a token is to be chosen now."""
        self.slot.commit()
        done, total = self.slot.length - self.cached, len(self.request.prompt) - self.cached
        if self.progress is not None and not self.request.new_ids:
            self.progress(done, total)
        if self.slot.length < len(self.slot.ids):
            self.span = self._next_span()
            return False
        return True

    def accept(self, token: int, loops: int) -> None:
        """Takes the next token, which so many loops gave."""
        self.slot.ids.append(token)
        self.request.accept(token, loops)

    def go_on(self) -> None:
        """Begins with the token that was taken last, where nothing is under way behind it."""
        if self.request.is_finished:
            return
        if self.wave is None:
            self.span = self._next_span()
        elif not self.wave.spans:
            self.wave.start(self.slot.length, self.slot.ids[-1])

    def result(self, state_bytes: int) -> GenerationResult:
        """The whole answer, with the bytes of the whole state."""
        prefilled = min(self.slot.length, len(self.request.prompt)) - self.cached
        drafts = self.wave.drafts if self.wave else None
        return self.request.result(self.cached, prefilled, state_bytes, self.passes, drafts)

    def _next_span(self) -> Span:
        return self.slot.next_span(self.request.settings.depth)


class Engine:
    """Runs jobs over the slots of one executor, pass by pass.

    Attributes:
        executor: runs the passes.
        jobs: those that are not done, in the order in which they came.
        passes: number of runs of the loop graph so far.
    """

    def __init__(self, executor: Executor):
        self.executor = executor
        self.jobs: list[Job] = []
        self.passes = 0
        self._schedule = Batched(executor.mixes_loops, executor.shares_cache)

    @property
    def state_bytes(self) -> int:
        """Bytes of the whole state."""
        return self.executor.state.nbytes + self.executor.slots.nbytes

    def start(self, request: Request, slot: Slot, progress: Progress | None = None) -> Job:
        """Adds a request whose prompt has begun on ``slot``, less what the cache holds of it."""
        sampler = self.executor.sampler
        draws = sampler is not None and sampler.can_draw(request.settings)
        if sampler is not None and draws:
            sampler.start(request.settings)
        job = Job(request, slot, progress, draws)
        settings = request.settings
        if settings.lag is not None:
            most = self.executor.state.plan.most_in_flight
            job.wave = Wave(slot.number, settings.depth, settings.lag, most, not self.executor.shares_cache)
        self.jobs.append(job)
        return job

    def admit(self, request: Request, slot: Slot) -> Job:
        """Starts a request on ``slot``, which has just been acquired, with what any slot holds of its prompt.

        Where that fails, the slot is free again.
        """
        slots = self.executor.slots
        try:
            slots.begin(slot, request.prompt, request.settings.depth)
            return self.start(request, slot)
        except BaseException:
            slots.release(slot)
            raise

    def drop(self, job: Job) -> None:
        """Forgets a job, wherever it stands; its slot is the caller's to use."""
        if job in self.jobs:
            self.jobs.remove(job)
            job.slot.flight = []

    def run_pass(self) -> list[Job]:
        """One pass over at least one job; the jobs that are done with it, with a result or an error.

        Where the cache holds whole prompts, their first tokens are chosen instead.

        Raises:
            RunError: ONNX Runtime could not.
        """
        began = time.perf_counter()
        cached = [job for job in self.jobs if job.is_cached]
        if cached:
            self._answer_cached(cached)
        else:
            for job in self.jobs:
                job.slot.flight = job.spans
            spans = self._schedule.next([job.running for job in self.jobs])
            self.executor.run(spans)
            self.passes += 1
            self._read(spans)
        seconds = time.perf_counter() - began
        for job in self.jobs:
            job.request.count_seconds(seconds)
        done = [job for job in self.jobs if job.is_done]
        for job in done:
            self.drop(job)
        return done

    def _answer_cached(self, jobs: Sequence[Job]) -> None:
        """Chooses the first tokens of answers to prompts that the cache holds whole."""
        for job in jobs:
            self.executor.recall_end(job.span)
            job.is_cached = False
        self._choose([(job.span, job) for job in jobs], {})

    def _read(self, spans: Sequence[Span]) -> None:
        """Reads what a pass left: which spans leave the loop, and which tokens come next."""
        parts = [(job, [span for span in spans if span.slot == job.slot.number]) for job in self.jobs]
        parts = [(job, own) for job, own in parts if own]
        for job, _ in parts:
            job.passes += bool(job.request.new_ids)
        seen = [span for span in spans if span.is_wave or ((rule := _asked(span)) and rule.reads == "logits")]
        logits = dict(zip(seen, self.executor.compute_logits(seen), strict=True)) if seen else {}
        ready: list[tuple[Span, Job]] = []
        for job, own in parts:
            if own[0].is_wave:
                self._advance_wave(job, own, logits)
                continue
            span = own[0]
            finish_loop(self.executor, span, logits.__getitem__)
            if span.is_done and job.advance():
                ready.append((span, job))
        ends = [span for span, job in ready if not job.request.new_ids]
        for span in ends:
            if span.exit is None:
                self.executor.keep_end(span)
        self._choose(ready, logits)
        if ends:
            self._share_prompts()

    def _share_prompts(self) -> None:
        """Gives prompts that wait what those that have just been run left in the cache: often it is the same prompt."""
        for job in self.jobs:
            if job.waits:
                known = job.slot.length
                self.executor.slots.begin(job.slot, job.request.prompt, job.request.settings.depth)
                job.find(job.slot.length - known)

    def _advance_wave(self, job: Job, running: Sequence[Span], logits: dict[Span, Array]) -> None:
        """Reads what a pass left of a job's wave."""
        request, slot, wave = job.request, job.slot, job.wave
        assert wave is not None

        def predict(span: Span, drafts: list[int]) -> int:
            # Few settings look at what stands before.
            context = [*slot.ids, *drafts] if request.settings.reads_answer else slot.ids
            try:
                return request.choose(logits[span], context, len(drafts))
            except Exception as error:  # a processor's own may be any
                job.failures[span] = error  # of a draft, or before the last loop, it is nobody's
                return NOTHING

        try:
            leaves = partial(_leaves, self.executor, logits=logits.__getitem__)
            final = wave.advance(predict, leaves, job.last_position)
            _fill_caches(self.executor, running)
            for span, token in final:
                slot.commit()
                if token == NOTHING:
                    raise job.failures[span]
                job.accept(token, span.depth)
                if job.is_done:
                    break
            job.go_on()
        except Exception as error:
            job.error = error

    def _choose(self, ready: list[tuple[Span, Job]], logits: dict[Span, Array]) -> None:
        """Chooses the next token of each job whose last token took all its loops.

        Args:
            ready: the jobs, each with what it ran.
            logits: those that were computed already; used before more are.
        """
        rest = [(span, job) for span, job in ready if span not in logits]
        self._choose_from(logits, [(span, job) for span, job in ready if span in logits])
        if rest and not rest[0][1].draws:
            spans = [span for span, _ in rest]
            logits = dict(zip(spans, self.executor.compute_logits(spans), strict=True))
        self._choose_from(logits, rest)

    def _choose_from(self, logits: dict[Span, Array], ready: list[tuple[Span, Job]]) -> None:
        for span, job in ready:
            try:
                draw = self.executor.draw
                token = draw(span) if job.draws else job.request.choose(logits[span], job.slot.ids)
                job.accept(token, span.depth)
                job.go_on()
            except Exception as error:  # a processor's own may be any: it ends this request alone
                job.error = error


def finish_loop(executor: Executor, span: Span, logits: Callable[[Span], Array]) -> None:
    """Reads what a pass left of a span that is no wave's: whether it leaves the loop, and then its later caches.

    Whatever runs tokens without an engine calls this after each of their passes.

    Args:
        executor: has just run one loop of the span.
        span: a chunk, or one token.
        logits: gives those after this loop, [V] float32; called where the span's rule reads them.
    """
    if _leaves(executor, span, logits):
        span.leave()
    _fill_caches(executor, [span])


def _leaves(executor: Executor, span: Span, logits: Callable[[Span], Array]) -> bool:
    """Whether a rule lets a span leave the loop now."""
    rule = _asked(span)
    if rule is None:
        return False
    return rule.leaves(span.loop, logits(span) if rule.reads == "logits" else executor.exit_logit(span))


def _fill_caches(executor: Executor, spans: Sequence[Span]) -> None:
    """Gives a LoopLM's later caches what a span that left early had."""
    for span in spans:
        if span.is_done and span.caches > span.depth and not executor.shares_cache:
            executor.fill_caches(span)


def _asked(span: Span) -> Exit | None:
    """What decides whether a span leaves now; None where nothing does."""
    return span.exit if span.exit is not None and span.exit.wants(span.loop) else None
