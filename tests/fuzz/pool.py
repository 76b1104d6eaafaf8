"""Runs numbered cases in worker processes. One that dies or takes too long is a finding; another takes its place."""

import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

REFUSED, ANSWERED, FINDING = "refused", "answered", "finding"


@dataclass(frozen=True)
class Outcome:
    """What one case came to.

    Attributes:
        kind: ``refused``, ``answered`` or ``finding``.
        what: of a finding, what happened; its first line tells findings of one cause together.
        number: of the case, which makes it again; -1 before it is known.
        damage: what was done.
    """

    kind: str
    what: str
    number: int = -1
    damage: str = ""


Tell = Callable[[str], None]
"""Told what a case is about to try, so that it is known when the process dies."""
Case = Callable[[int, Tell], Outcome]

_CONTEXT = multiprocessing.get_context("spawn")


@dataclass
class _Worker:
    """A process and the case that it works on."""

    make: Callable[..., Case]
    arguments: tuple[Any, ...]
    number: int = -1
    damage: str = ""
    deadline: float = 0.0
    process: BaseProcess = field(init=False)
    pipe: Connection = field(init=False)

    def __post_init__(self) -> None:
        self.pipe, theirs = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=_work, args=(theirs, self.make, self.arguments), daemon=True)
        self.process.start()
        theirs.close()
        assert self.pipe.recv() == "ready"  # what it imports is not the case's time

    def begin(self, number: int, seconds: float) -> None:
        self.number, self.damage, self.deadline = number, "", time.monotonic() + seconds
        self.pipe.send(number)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def run_cases(
    make: Callable[..., Case], arguments: tuple[Any, ...], numbers: Iterable[int], workers: int, seconds: float
) -> Iterator[Outcome]:
    """Runs every case; outcomes come as they are ready.

    Args:
        make: called in each worker with ``arguments``; gives the function that runs one case.
        arguments: of ``make``; they are pickled.
        numbers: of the cases.
        workers: processes.
        seconds: that a case may take.
    """
    waiting = iter(numbers)
    crew: list[_Worker] = []
    for number in waiting:
        crew.append(_Worker(make, arguments))
        crew[-1].begin(number, seconds)
        if len(crew) == workers:
            break
    try:
        while crew:
            soonest = min(worker.deadline for worker in crew)
            wait([worker.pipe for worker in crew], timeout=max(0.0, soonest - time.monotonic()))
            for worker in list(crew):
                if worker.pipe.poll():
                    received = _receive(worker)
                    if isinstance(received, str):
                        worker.damage = received
                        continue
                    outcome = received
                elif time.monotonic() > worker.deadline:
                    outcome = Outcome(FINDING, f"took more than {seconds:g} seconds")
                else:
                    continue
                yield replace(outcome, number=worker.number, damage=worker.damage)
                following = next(waiting, None)
                if outcome.kind == FINDING or following is None:
                    worker.end()
                    crew.remove(worker)
                    if following is not None:
                        worker = _Worker(make, arguments)
                        crew.append(worker)
                if following is not None:
                    worker.begin(following, seconds)
    finally:
        for worker in crew:
            worker.end()


def _receive(worker: _Worker) -> Outcome | str:
    try:
        received = worker.pipe.recv()
    except (EOFError, ConnectionResetError):
        worker.process.join()
        return Outcome(FINDING, f"the process ended with status {worker.process.exitcode}")
    assert isinstance(received, Outcome | str)
    return received


def _work(pipe: Connection, make: Callable[..., Case], arguments: tuple[Any, ...]) -> None:
    case = make(*arguments)
    pipe.send("ready")
    while True:
        number = pipe.recv()
        try:
            outcome = case(number, pipe.send)
        except BaseException as error:  # a panic of tokenizers is no Exception
            lines = traceback.format_exception(error)
            text = f"{type(error).__name__}: {str(error)[:200]}".replace("\n", " ")
            outcome = Outcome(FINDING, f"{text}\n{''.join(lines[-6:])[-2000:]}")
        pipe.send(outcome)
