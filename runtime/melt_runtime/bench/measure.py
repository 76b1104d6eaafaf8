"""Measures a bundle: load, first token, prefill and decode by loops, position, chunk and batch; memory of each.

Every case runs in a process of its own, so that its peak memory is its own. The cache is filled without computing it:
speed depends on how many rows attention reads, not on what they hold.
"""

import concurrent.futures
import itertools
import multiprocessing
import os
import platform
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from melt_runtime.bundle.contract import KVCacheKind
from melt_runtime.bundle.manifest import Manifest, read_manifest
from melt_runtime.device.integers import instructions
from melt_runtime.device.ort import ort
from melt_runtime.device.processor import cpuinfo
from melt_runtime.errors import RunError
from melt_runtime.memory.buffers import State
from melt_runtime.memory.process import resident_bytes
from melt_runtime.model import MeltModel
from melt_runtime.progress import Report
from melt_runtime.runner import LoopRunner

DECODE_STEPS = 12
PREFILL_TOKENS = 512
FIRST_TOKEN_PROMPT = 128
_READ_BYTES = 1 << 30
_FILL = 7  # any row that is not zero


@dataclass(frozen=True)
class BenchOptions:
    """What to measure.

    Attributes:
        loops: depths of decoding and prefill.
        positions: tokens in the cache when a token is decoded.
        chunks: tokens in parallel in prefill of 512 tokens.
        batches: sequences decoded together.
        threads: CPU threads inside an operator; None: one per physical core.
        kv_caches: kinds of KV cache.
    """

    loops: tuple[int, ...] = (1, 2, 4)
    positions: tuple[int, ...] = (100, 1000, 4000)
    chunks: tuple[int, ...] = (128, 512)
    batches: tuple[int, ...] = (1,)
    threads: int | None = None
    kv_caches: tuple[KVCacheKind, ...] = ("float",)

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            ValueError: an empty list or a number below 1.
        """
        for name in ("loops", "positions", "chunks", "batches", "kv_caches"):
            values = getattr(self, name)
            if not values or (name != "kv_caches" and min(values) < 1):
                raise ValueError(f"{name} must be numbers of at least 1, got {list(values)}")


@dataclass(frozen=True)
class Case:
    """One process: ``kind`` is ``decode``, ``prefill`` or ``first token``; the others as in ``BenchOptions``."""

    bundle: str
    kind: str
    kv_cache: KVCacheKind
    loops: tuple[int, ...]
    tokens: int
    batch: int
    threads: int | None


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        bundle: name of its folder.
        kind: ``decode``, ``prefill`` or ``first token``.
        kv_cache: kind of KV cache.
        loops: depth T.
        tokens: position of the decoded token, chunk of prefill, or length of the prompt.
        batch: sequences.
        seconds: median of a decoded step, or of the prompt.
        tokens_per_second: of all sequences together.
        loop_seconds: of one loop over all layers.
        bandwidth: matrices read per second by the loop, bytes, as the bundle stores them.
        state_bytes: of the state.
        per_loop_bytes: what it would be with a KV cache per loop.
        load_seconds: opening the bundle and allocating the state.
        peak_bytes: peak resident memory of the process.
    """

    bundle: str
    kind: str
    kv_cache: str
    loops: int
    tokens: int
    batch: int
    seconds: float
    tokens_per_second: float
    loop_seconds: float
    bandwidth: float
    state_bytes: int
    per_loop_bytes: int
    load_seconds: float
    peak_bytes: int


def run_bench(bundles: list[Path], options: BenchOptions, progress: Report | None = None) -> Iterator[Row]:
    """Measures bundle after bundle, case after case; rows come as they are measured.

    Args:
        bundles: their folders.
        options: what to measure.
        progress: told of each case as it begins.

    Raises:
        BundleError: a bundle that cannot be loaded.
        ValueError: a position beyond the model's, or a kind of KV cache that a bundle does not have.
        RunError: the process of a case died.
    """
    manifests = {bundle: read_manifest(bundle) for bundle in bundles}
    cases = [case for bundle in bundles for case in _cases(bundle, manifests[bundle], options)]
    with new_process() as pool:
        for number, case in enumerate(cases):
            if progress is not None:
                progress(f"{Path(case.bundle).name}, {case.kind}", number, len(cases))
            try:
                rows = pool.submit(_measure, case).result()
            except BrokenProcessPool as error:
                raise RunError(f"the process that measured {case} died, of too little memory perhaps") from error
            yield from rows


def read_bandwidth(threads: int | None = None) -> float:
    """Bytes a second that a plain loop reads from memory: the largest of a gigabyte of integers, on every thread."""
    with new_process() as pool:
        return pool.submit(_read_memory, threads).result()


def fill_cache(state: State, tokens: int) -> None:
    """Writes the rows of the first ``tokens`` tokens, so that they are resident and hold no zeros."""
    for cache in state.caches:
        for pair in cache:
            for buffer in pair:
                buffer.values()[:, :, :tokens] = _FILL


@contextmanager
def new_process() -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    """Runs each task in a new process, which an interrupted caller does not wait for."""
    others = set(multiprocessing.active_children())
    pool = concurrent.futures.ProcessPoolExecutor(
        1,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_end_when_interrupted,
        max_tasks_per_child=1,
    )
    with pool:
        try:
            yield pool
        except BaseException:
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()
            raise


def _end_when_interrupted() -> None:
    """Without a word: Ctrl-C reaches every process of a terminal, and its caller says what there is to say."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _read_memory(threads: int | None) -> float:
    count = threads or os.cpu_count() or 1
    values = np.ones(_READ_BYTES // 8, dtype=np.int64)
    parts = np.array_split(values, count)
    seconds = []
    for _ in range(5):
        workers = [threading.Thread(target=part.max) for part in parts]
        begin = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        seconds.append(time.perf_counter() - begin)
    return values.nbytes / statistics.median(seconds)


def machine() -> dict[str, str]:
    """What a reader must know to compare figures."""
    named = [line.split(":", 1)[1].strip() for line in cpuinfo("model name")]
    processor = named[0] if named else platform.processor() or platform.machine()
    known = instructions()
    if known:
        processor += f" ({', '.join(known)})"
    return {
        "processor": processor,
        "cores": str(os.cpu_count()),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "onnxruntime": ort.__version__,
    }


def as_json(rows: list[Row], options: BenchOptions, bandwidth: float) -> dict[str, Any]:
    """Everything, for a file."""
    return {
        "machine": machine(),
        "read_bandwidth": bandwidth,
        "options": asdict(options),
        "rows": [asdict(row) for row in rows],
    }


def _cases(bundle: Path, manifest: Manifest, options: BenchOptions) -> list[Case]:
    most = manifest.model.max_positions
    beyond = [position for position in options.positions if position + DECODE_STEPS * len(options.loops) >= most]
    if beyond:
        raise ValueError(f"positions must stay below the model's {most}, got {beyond}: choose others with --positions")
    missing = [kind for kind in options.kv_caches if kind not in manifest.kv_caches]
    if missing:
        raise ValueError(f"kv_caches must be of {', '.join(manifest.kv_caches)}, which {bundle} has, got {missing}")

    def case(kind: str, kv_cache: KVCacheKind, tokens: int, batch: int = 1) -> Case:
        return Case(str(bundle), kind, kv_cache, options.loops, tokens, batch, options.threads)

    cases = []
    for kv_cache in options.kv_caches:
        cases.append(case("first token", kv_cache, min(FIRST_TOKEN_PROMPT, most)))
        for batch in options.batches:
            cases += [case("decode", kv_cache, position, batch) for position in options.positions]
        cases += [case("prefill", kv_cache, chunk) for chunk in options.chunks if chunk <= most]
    return cases


def _measure(case: Case) -> list[Row]:
    """Runs one case; in a process of its own."""
    manifest = read_manifest(case.bundle)
    most = manifest.model.max_positions
    length = {"decode": case.tokens + DECODE_STEPS * len(case.loops) + 1, "prefill": max(PREFILL_TOKENS, case.tokens)}
    begin = time.perf_counter()
    model = MeltModel.load(
        case.bundle,
        device="cpu",
        capacity=min(length.get(case.kind, case.tokens + 1), most),
        chunk=case.tokens if case.kind == "prefill" else None,
        loops=max(case.loops),
        threads=case.threads,
        kv_cache=case.kv_cache,
    )
    runner = model.new_runner(case.batch)
    load_seconds = time.perf_counter() - begin
    rows = []
    for loops in case.loops:
        if case.kind == "decode":
            seconds, loop_seconds = _time_decode(runner, case.tokens, loops)
            tokens = case.batch
        else:
            tokens = min(PREFILL_TOKENS, most) if case.kind == "prefill" else case.tokens
            seconds, loop_seconds = _time_prompt(runner, tokens, loops)
        plan = runner.state.plan
        rows.append(
            Row(
                bundle=Path(case.bundle).name,
                kind=case.kind,
                kv_cache=case.kv_cache,
                loops=loops,
                tokens=case.tokens,
                batch=case.batch,
                seconds=seconds,
                tokens_per_second=tokens / seconds,
                loop_seconds=loop_seconds,
                bandwidth=manifest.streamed_bytes["loop"] / loop_seconds,
                state_bytes=runner.state_bytes,
                per_loop_bytes=plan.as_per_loop(loops).total_bytes,
                load_seconds=load_seconds,
                peak_bytes=resident_bytes(),
            )
        )
    return rows


class _Clock:
    """Notes when each loop ended; the first loop's time includes the embedding."""

    def __init__(self) -> None:
        self._stamps = [time.perf_counter()]

    def __call__(self, loop_idx: int) -> None:
        self._stamps.append(time.perf_counter())

    def elapsed(self) -> float:
        return time.perf_counter() - self._stamps[0]

    def loops(self) -> list[float]:
        return [later - earlier for earlier, later in itertools.pairwise(self._stamps)]


def _time_decode(runner: LoopRunner, position: int, loops: int) -> tuple[float, float]:
    """Median seconds of a step and of a loop, at ``position``."""
    runner.reset()
    fill_cache(runner.state, position)
    for slot in runner.slots:
        slot.advance(position, loops)
    steps, inner = [], []
    for _ in range(DECODE_STEPS):
        clock = _Clock()
        runner.decode([1] * len(runner.slots), loops, observe=clock)
        steps.append(clock.elapsed())
        inner += clock.loops()
    return statistics.median(steps[1:]), statistics.median(inner[loops:])


def _time_prompt(runner: LoopRunner, tokens: int, loops: int) -> tuple[float, float]:
    """Seconds of the prompt up to its logits, and of a loop over one full chunk; the faster of two runs."""
    ids = [token % runner.state.plan.shape.vocab_size for token in range(tokens)]
    best, inner = float("inf"), float("inf")
    for _ in range(2):
        runner.reset()
        clock = _Clock()
        runner.prefill(ids, loops, observe=clock)
        seconds = clock.elapsed()
        if seconds < best:
            best, inner = seconds, statistics.median(clock.loops())
    return best, inner
