"""Offline inference: files of prompts over the actors of a Ray cluster, every row answered once."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.exceptions import RayError

from melt_files.locks import lock
from melt_ray.bundles import BundleIdentity
from melt_ray.parts import begin_run, part_path
from melt_ray.rows import RowRange, SourceFile, count_rows, files_of
from melt_ray.settings import BatchSettings
from melt_ray.worker import Tally, Worker
from melt_runtime import BusyError, MeltError, plan_state, read_manifest

_MOST_BLOCKS = 10_000
_LOCK = ".lock"
_SHOWN_FAULTS = 8


@dataclass(frozen=True)
class Summary:
    """What a run did.

    Attributes:
        rows: of all files.
        before: of them were there from a run before.
        now: were written by this one.
        errors: of those could not be answered: their column ``error`` says why.
        tokens: of answers.
        prompt_tokens: of prompts.
        passes: runs of the loop graph, each counted for every answer that it belonged to.
        seconds: from the first task to the last part, models' loading included.
    """

    rows: int
    before: int
    now: int
    errors: int
    tokens: int
    prompt_tokens: int
    passes: int
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens of answers a second."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def describe(self) -> str:
        """In a sentence."""
        return (
            f"{self.before + self.now} of {self.rows} rows are written, {self.now} of them now ({self.errors} with an "
            f"error): {self.tokens} tokens of answers, {self.prompt_tokens} of prompts, {self.passes} passes in "
            f"{self.seconds:.1f} s, {self.rate:.1f} tokens/s, {self.now / max(self.seconds, 1e-9):.2f} rows/s"
        )


def batch(
    source: str | Path | Sequence[str | Path],
    bundle: str | Path,
    out: str | Path,
    settings: BatchSettings | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Summary:
    """Answers every row of files that is not answered yet. Ray is started, or connected to, where it is not.

    Args:
        source: files that end in .jsonl or .parquet, or folders of them, on a disk that all nodes share.
        bundle: folder written by ``melt-export``, by the same path on every node.
        out: folder of the answers, on a disk that all nodes share; one of the same run is gone on with.
        settings: how; default: ``BatchSettings()``.
        progress: called with the rows that are done, all of them, and the speed.

    Raises:
        ValueError: files that cannot be read or have no such column; sizes that the bundle cannot have; an ``out`` of
            another run. Nothing was done.
        BundleError: no bundle here.
        BusyError: another process is at work in ``out``.
        MeltError: a task failed, and why; what is written stays, the same call goes on.
        OSError: ``out`` cannot be written.
    """
    settings = BatchSettings() if settings is None else settings
    sources = [source] if isinstance(source, str | Path) else list(source)
    paths, folder = files_of(sources), Path(out).resolve()
    expected = BundleIdentity.of(Path(bundle).resolve())
    sizes = (settings.capacity, settings.slots, settings.chunk, settings.most_loops, settings.kv_cache)
    plan_state(read_manifest(expected.path), *sizes)
    if not ray.is_initialized():
        connect(include_dashboard=False)
    files = _count(paths, settings)
    described = [{"path": file.path, "bytes": file.bytes, "rows": file.rows} for file in files]
    run = {"fingerprint": expected.fingerprint, "version": expected.version, **settings.of_answers, "files": described}
    begin_run(folder, run)
    ranges = [one for number, file in enumerate(files) for one in file.ranges(number)]
    with _locked(folder):
        left = [one for one in ranges if not part_path(folder, one, settings.format).is_file()]
        return _answer(left, sum(file.rows for file in files), expected, folder, settings, progress)


def connect(**options: Any) -> None:
    """Joins a cluster, or starts one of this machine, whose usage statistics Ray then does not send.

    ``RAY_USAGE_STATS_ENABLED=1`` keeps them. A cluster that runs already was told when it was started.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(logging_level=logging.WARNING, **options)


def _count(paths: Sequence[Path], settings: BatchSettings) -> list[SourceFile]:
    """Every file, counted on the nodes of the cluster.

    Raises:
        ValueError: lists those that cannot be used.
    """
    count = ray.remote(num_cpus=1)(_try_count)
    found = ray.get([count.remote(path, settings.column, settings.part_rows) for path in paths])
    faults = [fault for fault in found if isinstance(fault, str)]
    if faults:
        more = [f"and {len(faults) - _SHOWN_FAULTS} more"] if len(faults) > _SHOWN_FAULTS else []
        raise ValueError("\n  ".join(["source has files that cannot be used", *faults[:_SHOWN_FAULTS], *more]))
    return [file for file in found if isinstance(file, SourceFile)]


def _try_count(path: Path, column: str, size: int) -> SourceFile | str:
    try:
        return count_rows(path, column, size)
    except ValueError as error:
        return str(error)


def _answer(
    left: list[RowRange],
    total: int,
    expected: BundleIdentity,
    out: Path,
    settings: BatchSettings,
    progress: Callable[[int, int, str], None] | None,
    worker: type[Worker] = Worker,
) -> Summary:
    """Has the ranges answered that are left."""
    began, now = time.perf_counter(), 0
    before = total - sum(rows.stop - rows.start for rows in left)
    sums = dict.fromkeys(("errors", "tokens", "prompt_tokens", "passes"), 0)

    def summary() -> Summary:
        return Summary(rows=total, before=before, now=now, seconds=time.perf_counter() - began, **sums)

    try:
        for row in _tasks(left, expected, out, settings, worker).iter_rows() if left else ():
            tally = Tally(**row)
            if tally.fault:
                raise MeltError(
                    f"the batch stopped after {before + now} of {total} rows, the same call goes on; on {tally.node}: "
                    f"{tally.fault}"
                )
            if not Path(tally.part).is_file():
                raise MeltError(
                    f"out must be on a disk that all nodes share: {tally.node} wrote {tally.part}, which is not here"
                )
            for name in sums:
                sums[name] += getattr(tally, name)
            now += tally.rows
            if progress is not None:
                progress(before + now, total, f"{summary().rate:.0f} tokens/s")
    except RayError as error:
        raise MeltError(
            f"Ray stopped the batch after {before + now} of {total} rows, the same call goes on: {error}"
        ) from error
    return summary()


def _tasks(
    left: list[RowRange], expected: BundleIdentity, out: Path, settings: BatchSettings, worker: type[Worker]
) -> Dataset:
    """A task for each range. Ray starts actors again that are lost, and gives their tasks to others."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    ranges = ray.data.from_items([vars(one) for one in left], override_num_blocks=min(len(left), _MOST_BLOCKS))
    options: dict[str, Any] = {"num_gpus": settings.gpus} if settings.gpus else {}
    return ranges.map(
        worker,
        fn_constructor_kwargs={"expected": expected, "out": str(out), "settings": settings},
        compute=ActorPoolStrategy(min_size=1, max_size=min(settings.actors, len(left))),
        num_cpus=settings.cpus,
        **options,
    )


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keeps other drivers out of a folder as long as this process lives.

    Raises:
        BusyError: one is there.
    """
    with (out / _LOCK).open("w") as file:
        if lock(file.fileno(), wait=False) is False:
            raise BusyError(f"another process is at work in {out}: wait for it, end it, or name another folder")
        yield
