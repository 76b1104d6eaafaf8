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
    """

    request: Request
    slot: Slot
    progress: Progress | None = None
    draws: bool = False
    error: MeltError | None = None
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
        if not self.request.is_finished:
            self.span = self._next_span()

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
        began, jobs = time.perf_counter(), {job.slot.number: job for job in self.jobs}
        spans = self._schedule.next([job.span for job in self.jobs])
        self.executor.run(spans)
        seen = self._let_leave(spans)
        ready = [span for span in spans if span.is_done and jobs[span.slot].advance()]
        if ready:
            self._choose([(span, jobs[span.slot]) for span in ready], seen)
        seconds = time.perf_counter() - began
        for job in self.jobs:
            job.request.count_seconds(seconds)
        done = [job for job in self.jobs if job.is_done]
        for job in done:
            self.jobs.remove(job)
        return done

    def _let_leave(self, spans: Sequence[Span]) -> list[Span]:
        """Asks what decides on each span whether it takes more loops; those whose logits were computed for that."""
        asked = [(span, span.exit) for span in spans if span.exit is not None and span.exit.wants(span.loop)]
        seen = [span for span, leave in asked if leave.reads == "logits"]
        if seen:
            self.executor.compute_logits(seen)
        for span, leave in asked:
            reads = self.executor.logits(span.slot) if leave.reads == "logits" else self.executor.exit_logits(span)
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
