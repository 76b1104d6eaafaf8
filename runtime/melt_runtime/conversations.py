"""Conversations that free slots hold, written to files and read into slots. Called between two passes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from melt_runtime.engine import Engine, Job
from melt_runtime.errors import QueueError, SavedError
from melt_runtime.execute.slots import Slot
from melt_runtime.schedule.depth import Depth


class Conversations:
    """What the slots of an engine hold of the requests that they answered last."""

    def __init__(self, engine: Engine, identity: str):
        self._engine, self._identity, self._slots = engine, identity, engine.executor.slots
        self._prompts: dict[int, int] = {}  # tokens of the prompt that each slot answered last, by its number

    def note(self, job: Job) -> None:
        """Notes what a slot was asked, when its request ends."""
        self._prompts[job.slot.number] = len(job.request.prompt)

    def save(self, conversations: Sequence[Sequence[int]], path: Path) -> int:
        """Writes what a free slot holds of one of several spellings of a conversation, and returns its cached tokens.

        Raises:
            SavedError: no free slot holds it.
            OSError: the file cannot be written.
        """
        free = [slot for slot in self._slots if self._slots.is_free(slot)]
        held = [(self._shared(slot, ids), slot) for slot in free for ids in conversations]
        tokens, slot = max(held, key=lambda pair: pair[0], default=(0, self._slots[0]))
        if not tokens:
            raise SavedError("no slot that is free holds this conversation: let it be answered first")
        from melt_runtime.execute.saved import save_slot  # here: what reads it takes longer to import than all else

        save_slot(path, self._engine.executor.state, slot, self._identity, {}, tokens)
        return tokens

    def restore(self, path: Path) -> int:
        """Reads a file into a free slot, and returns its cached tokens.

        Raises:
            SavedError: no such file, one of another model or KV cache, or a damaged one.
            CapacityError: more tokens than a slot has room for.
            QueueError: every slot is at work.
        """
        from melt_runtime.execute.saved import load_slot

        if not self._slots.free:
            raise QueueError("every slot is at work: retry later")
        slot = self._slots.acquire_for((), Depth.fixed(1))
        try:
            load_slot(path, self._engine.executor.state, slot, self._identity, dict[str, Any])
            self._prompts.pop(slot.number, None)
            return slot.length
        finally:
            self._slots.release(slot)

    def _shared(self, slot: Slot, ids: Sequence[int]) -> int:
        """Cached tokens that a conversation begins with; 0 where it lacks part of the prompt answered last."""
        shared = slot.shared(ids)
        return 0 if shared < min(slot.length, self._prompts.get(slot.number, slot.length)) else shared
