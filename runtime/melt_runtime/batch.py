"""Many prompts over the slots of one state: each answered as it would be alone, several in every pass."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from melt_runtime.arguments import function_or_none, instance, shown
from melt_runtime.engine import Engine, Job
from melt_runtime.errors import BatchError, MeltError, without_frames
from melt_runtime.progress import Progress
from melt_runtime.request.generation_config import GenerationChanges, GenerationConfig
from melt_runtime.request.prompts import Desk, Prompt, say
from melt_runtime.request.request import Request
from melt_runtime.request.result import GenerationResult
from melt_runtime.session import DepthNotice
from melt_runtime.stream import Held, Ticket


class BatchStream(Held[tuple[int, GenerationResult]]):
    """(number of the prompt, its answer) as they finish, in any order.

    Nothing moves before the first is asked for. With it the stream takes the model's own session, until it ends, is
    closed or nobody holds it any more. Left before its end it drops what was under way. Where prompts could not be
    answered, ``BatchError`` comes after the last answer.
    """


@dataclass(frozen=True)
class BatchAsk:
    """Prompts and how to continue them, checked as far as can be before the first prompt is read.

    Attributes:
        prompts: any number of them; read one by one, as slots become free.
        configs: one for all, or one for each.
        raw: give strings to the model as they are.
        progress: called after each prompt with those done and all of them, 0 where nobody knows.
    """

    prompts: Iterable[Prompt]
    configs: GenerationConfig | list[GenerationConfig]
    raw: bool
    progress: Progress | None

    @classmethod
    def make(
        cls,
        prompts: Iterable[Prompt],
        config: GenerationConfig | Sequence[GenerationConfig] | None,
        raw: bool,
        progress: Progress | None,
        changes: GenerationChanges,
        desk: Desk,
    ) -> "BatchAsk":
        """Checks what a caller gives.

        Raises:
            ValueError: an argument outside its rule, another number of configs than of prompts, or a depth for all that
                the state cannot run.
        """
        instance("raw", raw, bool, "True or False")
        function_or_none("progress", progress)
        try:
            iter(prompts)
            several = not isinstance(prompts, str | bytes | bytearray)
        except TypeError:  # an array of no dimension, too, though it calls itself iterable
            several = False
        if not several:
            raise ValueError(f"prompts must be several prompts, one after another, got {shown(prompts)}")
        if config is None or isinstance(config, GenerationConfig):
            said = say(config, changes)
            desk.settle(replace(said, max_new_tokens=None), 1)
            return cls(prompts, said, raw, progress)
        instance("config", config, Sequence, "a GenerationConfig, or a sequence of them, one for each prompt")
        more = say(None, changes)  # once: what can be iterated once is iterated here
        rule = "a GenerationConfig"
        configs = [more.over(instance("config", one, GenerationConfig, rule)) for one in config]
        if isinstance(prompts, Sized) and len(prompts) != len(configs):
            raise ValueError(f"config must be one, or one for each of {len(prompts)} prompts, got {len(configs)}")
        return cls(prompts, configs, raw, progress)

    def config(self, number: int) -> GenerationConfig:
        """What is said of a prompt.

        Raises:
            ValueError: nothing is.
        """
        if isinstance(self.configs, GenerationConfig):
            return self.configs
        if number >= len(self.configs):
            raise ValueError(f"config must be one for each prompt: there are {len(self.configs)}")
        return self.configs[number]


class Batch:
    """Answers one ask over all slots of an engine."""

    def __init__(
        self,
        engine: Engine,
        desk: Desk,
        notice: DepthNotice,
        lent: Callable[[Ticket], AbstractContextManager[None]],
        ask: BatchAsk,
    ):
        self._engine, self._desk, self._notice, self._lent, self._ask = engine, desk, notice, lent, ask
        self._slots = engine.executor.slots
        self._finished = 0

    def run(self, owner: Ticket) -> Generator[tuple[int, GenerationResult], None, None]:
        """(number, answer) as they finish, while ``owner`` holds the slots.

        Raises:
            BusyError: somebody else is at work on them.
            BatchError: after the last answer, where prompts could not be answered.
        """
        with self._lent(owner):
            running: dict[Job, int] = {}
            try:
                yield from self._answers(running)
            finally:
                for job in running:
                    self._engine.drop(job)
                    self._slots.release(job.slot)

    def _answers(self, running: dict[Job, int]) -> Iterator[tuple[int, GenerationResult]]:
        """Lets prompts in as slots become free; ``running`` holds those that are under way."""
        prompts = enumerate(self._ask.prompts)
        errors: dict[int, Exception] = {}
        more = True
        while more or running:
            while more and self._slots.free:
                number, prompt = next(prompts, (-1, ""))
                more = number >= 0
                if more:
                    try:
                        running[self._admit(number, prompt)] = number
                    except (MeltError, ValueError) as error:
                        errors[number] = without_frames(error)
                        self._count_one()
            for job in self._engine.run_pass() if running else ():
                number = running.pop(job)
                self._slots.release(job.slot)
                self._count_one()
                if job.error is None:
                    yield number, job.result(self._engine.state_bytes)
                else:
                    errors[number] = without_frames(job.error)
        if errors:
            raise BatchError(errors)

    def _count_one(self) -> None:
        self._finished += 1
        if self._ask.progress is not None:
            prompts = self._ask.prompts
            self._ask.progress(self._finished, len(prompts) if isinstance(prompts, Sized) else 0)

    def _admit(self, number: int, prompt: Prompt) -> Job:
        """Gives a prompt the lowest free slot, and what any slot holds of it already.

        Raises:
            MeltError, ValueError: the prompt or its settings cannot be taken; no slot was.
        """
        ask, desk = self._ask, self._desk
        encoded = desk.read(prompt, ask.raw)
        settings = desk.settle(ask.config(number), len(encoded.ids))
        self._notice(settings.loops)
        return self._engine.admit(Request(encoded, settings, desk.codec), self._slots.acquire())
