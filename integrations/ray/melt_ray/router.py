"""Sends the turns of a conversation to the replica that holds it. Ray Serve calls it, for every request.

Each conversation prefers one replica, found by rendezvous hashing: where a replica comes or goes, only those
conversations move that it gains or loses, and every router finds the same without asking.
"""

import hashlib
import random
from collections.abc import Sequence
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica


class ConversationRouter(RequestRouter):
    """Ranks replicas for a request by the ``session_id`` that its handle was given."""

    _most_ahead: int

    def initialize_state(self, **kwargs: Any) -> None:
        """Takes ``most_ahead``: how many more requests than the least busy replica the preferred one may have."""
        self._most_ahead = int(kwargs["most_ahead"])

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks; Ray takes the first rank in which a replica has room, and of several the least busy."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # else Ray asks again without a pause
        loads = [self.replica_queue_len_cache.get(replica.replica_id) or 0 for replica in candidate_replicas]
        names = [replica.replica_id.unique_id for replica in candidate_replicas]
        ranks = rank(pending_request.metadata.session_id, names, loads, self._most_ahead)
        return [[candidate_replicas[place] for place in places] for places in ranks]


def rank(key: str, replicas: Sequence[str], loads: Sequence[int], most_ahead: int) -> list[list[int]]:
    """Places in ``replicas``, the ones to be tried first before the others.

    Args:
        key: of the conversation; empty: none, then it is the less busy of two.
        replicas: their names.
        loads: requests that each has, as far as is known.
        most_ahead: how many more than the least busy one the preferred one may have.
    """
    places = range(len(replicas))
    if not replicas:
        return []
    if not key:
        two = random.sample(places, min(2, len(replicas)))
        return [two, [place for place in places if place not in two]]
    preferred = max(places, key=lambda place: _score(key, replicas[place]))
    others = [place for place in places if place != preferred]
    is_busy = loads[preferred] - min(loads) > most_ahead
    return [others, [preferred]] if is_busy else [[preferred], others]


def _score(key: str, replica: str) -> bytes:
    return hashlib.blake2b(f"{key} {replica}".encode(), digest_size=8).digest()
