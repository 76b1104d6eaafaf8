"""The heart: choose the rows of the next pass, run it, give each request its token. Requests of any kind, one way."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from melt_runtime.errors import MeltError
from melt_runtime.execute.executor import Executor
from melt_runtime.execute.slots import Slot
from melt_runtime.progress import Progress
from melt_runtime.request.request import Request
from melt_runtime.schedule.batched import Batched
from melt_runtime.schedule.span import Span
from melt_runtime.schedule.wave import Wave


@dataclass(eq=False)
class Job:
    """A request on its slot.

    Attributes:
        request: what is answered.
        slot: its sequence, which has begun with the prompt.
        progress: told of the prompt, chunk by chunk.
        cached: tokens of the prompt that were in the cache when the job began.
        span: what is to be run next, or is under way.
        draws: whether the device chooses its tokens.
        error: what ended it before its end.
        wave: the tokens that are under way, where several may be.
        passes: that were run with tokens of the answer.
    """

    request: Request
    slot: Slot
    progress: Progress | None = None
    draws: bool = False
    error: MeltError | None = None
    wave: Wave | None = None
    passes: int = 0
    cached: int = field(init=False)
    span: Span = field(init=False)

    def __post_init__(self) -> None:
        """Begins with what the cache does not hold of the prompt."""
        self.cached = self.slot.length
        self.span = self._next_span()

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to run."""
        return self.request.is_finished or self.error is not None

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
        if self.request.is_finished:
            return
        if self.wave is None:
            self.span = self._next_span()
        elif not self.wave.spans:
            self.wave.start(self.slot.length, token)

    def _next_span(self) -> Span:
        return self.slot.next_span(self.request.settings.depth)


class Engine:
    """Runs jobs over the slots of one executor, pass by pass.

    Attributes:
        executor: runs the passes.
        jobs: those that are not done, in the order in which they came.
    """

    def __init__(self, executor: Executor):
        self.executor = executor
        self.jobs: list[Job] = []
        self._schedule = Batched(executor.mixes_loops)

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
            job.wave = Wave(slot.number, settings.loops, settings.lag, self.executor.state.plan.wave_rows)
        self.jobs.append(job)
        return job

    def drop(self, job: Job) -> None:
        """Forgets a job, wherever it stands; its slot is the caller's to use."""
        if job in self.jobs:
            self.jobs.remove(job)

    def run_pass(self) -> list[Job]:
        """One pass over at least one job; the jobs that are done with it, with a result or an error.

        Raises:
            RunError: ONNX Runtime could not.
        """
        began = time.perf_counter()
        wave = self.jobs[0].wave
        if wave is not None and wave.spans:
            self._run_wave(self.jobs[0], wave)
        else:
            self._run_shared()
        seconds = time.perf_counter() - began
        for job in self.jobs:
            job.request.count_seconds(seconds)
        done = [job for job in self.jobs if job.is_done]
        for job in done:
            self.jobs.remove(job)
        return done

    def _run_shared(self) -> None:
        """A pass in which every job may have a part."""
        jobs = {job.slot.number: job for job in self.jobs}
        spans = self._schedule.next([job.span for job in self.jobs])
        for span in spans:
            jobs[span.slot].passes += bool(jobs[span.slot].request.new_ids)
        self.executor.run(spans)
        seen = self._let_leave(spans)
        ready = [span for span in spans if span.is_done and jobs[span.slot].advance()]
        if ready:
            self._choose([(span, jobs[span.slot]) for span in ready], seen)

    def _run_wave(self, job: Job, wave: Wave) -> None:
        """A pass over consecutive tokens of one job, which is alone."""
        request, slot = job.request, job.slot
        self.executor.run_wave(wave.spans)
        self.executor.compute_wave_logits(wave.spans)
        job.passes += 1

        def predict(place: int, drafts: list[int]) -> int:
            # Only a penalty looks at what stands before.
            context = slot.ids if request.settings.repetition_penalty == 1 else [*slot.ids, *drafts]
            return request.choose(self.executor.logits(place), context, len(drafts))

        # The answer's last token is never run.
        room = len(request.prompt) + request.settings.max_new_tokens - 2 - slot.length
        try:
            token = wave.advance(predict, room)
            if token is not None:
                slot.advance(1, request.settings.loops)
                job.accept(token, request.settings.loops)
        except MeltError as error:
            job.error = error

    def _let_leave(self, spans: Sequence[Span]) -> list[Span]:
        """Asks what decides on each span whether it takes more loops; those whose logits were computed for that."""
        asked = [(span, span.exit) for span in spans if span.exit is not None and span.exit.wants(span.loop)]
        seen = [span for span, leave in asked if leave.reads == "logits"]
        if seen:
            self.executor.compute_logits(seen)
        for span, leave in asked:
            reads = self.executor.logits(span.slot) if leave.reads == "logits" else self.executor.exit_logit(span)
            if leave.leaves(span.loop, reads):
                span.leave()
        for span in spans:
            if span.is_done and span.caches > span.depth and not self.executor.shares_cache:
                self.executor.fill_caches(span)
        return seen

    def _choose(self, ready: list[tuple[Span, Job]], seen: list[Span]) -> None:
        """Chooses the next token of each job whose last token took all its loops; ``seen`` have their logits."""
        draws = ready[0][1].draws
        rest = [span for span, _ in ready if span not in seen]
        if not draws and rest:
            self.executor.compute_logits(rest)
        for span, job in ready:
            try:
                if draws:
                    token = self.executor.draw(span)
                else:
                    token = job.request.choose(self.executor.logits(span.slot), job.slot.ids)
                job.accept(token, span.depth)
            except MeltError as error:
                job.error = error
