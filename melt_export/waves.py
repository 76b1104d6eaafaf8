"""What reading in waves changes: MELT's tokens see those before them at the loops that those have reached.

Every token is given, as if every draft held: what differs from plain decoding are the numbers alone. A LoopLM's wave
is plain decoding, and has nothing to measure.
"""

from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from melt_export.probe import Probe
from melt_export.progress import bar
from melt_runtime.bench.forced import fill, run_plain, run_wave
from melt_runtime.bundle.measured import WaveQuality
from melt_runtime.execute.executor import Executor
from melt_runtime.memory.plan import Array
from melt_runtime.schedule.span import Span


@dataclass
class _Reading:
    """What waves of one lag gave for each token that counts, over all passages.

    Attributes:
        drafts: first choices after ``lag`` loops, token ids.
        choices: first choices after the last loop.
        losses: cross entropy after the last loop, in nats.
    """

    drafts: list[int] = field(default_factory=list)
    choices: list[int] = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list)

    def result(self, plain: list[int]) -> WaveQuality:
        """Beside plain decoding's first choices of the same tokens."""
        return WaveQuality(
            agreement=_share_equal(self.choices, plain),
            held=_share_equal(self.drafts, self.choices),
            perplexity=float(torch.stack(self.losses).mean().exp()),
        )


def measure_waves(executor: Executor, probe: Probe, loops: int) -> dict[str, WaveQuality]:
    """Reads what counts of a probe plainly and in waves of every lag, from the same cached tokens.

    Args:
        executor: over an empty state of one sequence, in chunks of the trained size, with room for each passage.
        probe: passages; what stands before the tokens that count is read in chunks, the rest one token at a time.
        loops: depth T.

    Returns:
        By lag, from 1 to T - 1; empty where waves are refused, or are plain decoding.
    """
    readings = {lag: _Reading() for lag in range(1, loops)}
    if executor.wave_obstacle is not None or not executor.shares_cache:
        return {}
    plain: list[int] = []
    for passage in bar(probe.passages, "passage", "waves"):
        known, given = passage.ids[: passage.start - 1], passage.ids[passage.start - 1 :]
        fill(executor, known, loops)
        run_plain(executor, given[:-1], loops, lambda logits: plain.append(int(logits.argmax())))
        for lag, reading in readings.items():
            executor.slots[0].truncate(len(known))
            _read_wave(executor, given, loops, lag, reading)
    return {str(lag): reading.result(plain) for lag, reading in readings.items()}


def _read_wave(executor: Executor, given: list[int], loops: int, lag: int, reading: _Reading) -> None:
    """Reads all of ``given`` but its last token behind what the cache holds."""
    begin = executor.slots[0].length

    def predict(span: Span, logits: Array) -> int:
        following = given[span.start - begin + 1]
        if span.loop == lag:
            reading.drafts.append(int(logits.argmax()))
        if span.is_done:
            reading.choices.append(int(logits.argmax()))
            reading.losses.append(F.cross_entropy(torch.from_numpy(logits).double(), torch.tensor(following)))
        return following

    run_wave(executor, given[0], len(given) - 1, loops, lag, predict)


def _share_equal(some: list[int], others: list[int]) -> float:
    return sum(one == other for one, other in zip(some, others, strict=True)) / len(some)
