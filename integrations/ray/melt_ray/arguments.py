"""What a deployment may be told, as the ``args`` of a configuration of Ray Serve."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from melt_runtime.memory.plan import MAX_BATCH

_DAY = 86400.0
Seconds = Annotated[float, Field(gt=0, le=_DAY)]


class ServeArgs(BaseModel):
    """Everything but the bundle and who may ask has a default; those of a replica are those of ``melt serve``.

    Where any of it changes in a file, ``serve deploy`` replaces the replicas, one after another; how many there are is
    better said in the file's ``deployments``, where a change replaces none.

    Attributes:
        bundle: folder written by ``melt-export``, by the same path on every node.
        name: of the model; default: the bundle's folder.
        api_key_file: on every node, with the key that requests must show.
        no_key: lets everybody ask who can reach the cluster's HTTP port.
        cors_origins: of web pages that may ask.
        sessions: folder that all nodes share, in which requests may keep conversations.
        device: ``cpu``, ``cuda`` or ``auto``.
        cpus: of a replica; Ray places by them.
        threads: of a replica on the CPU; default: ``cpus``.
        slots: sequences that a replica answers side by side.
        queue: requests that may wait in a replica for a slot; default: as many as slots. More wait before the replicas,
            whence they can go to any.
        capacity: tokens of a slot; default: as in ``melt serve``.
        kv_cache: how keys and values are stored.
        chunk: prompt tokens processed in parallel; default: as in training.
        most_loops: largest depth that a request may ask for; None: of a LoopLM as trained, of MELT any.
        most_bytes: of a body.
        answer_seconds: that an answer may take.
        fingerprint: of the bundle, where the node that builds the application has none; ``melt-ray fingerprint`` prints
            it.
        gpus: of a replica.
        resources: of a replica, by the names that the cluster's nodes have for them: which nodes may run it.
        most_waiting: requests that may wait before the replicas.
        drain_seconds: for answers under way where a replica is to end.
        router: ``conversation`` sends its turns to one replica, ``load`` each to the less busy of two.
        min_replicas: that there always are.
        max_replicas: that there may be.
        target_requests: of a replica, at which Ray adds or removes some; default: its slots.
        upscale_seconds: that more requests must last before a replica is added.
        downscale_seconds: that fewer must last before one is removed.
        health_seconds: between two questions whether a replica is well.
        ingress_replicas: processes that take requests; they only pass them on.
        ingress_cpus: of each.
        ingress_resources: of each, as above; best on nodes that stay.
    """

    model_config = ConfigDict(extra="forbid")

    bundle: Path
    name: str | None = None
    api_key_file: Path | None = None
    no_key: bool = False
    cors_origins: tuple[str, ...] = ()
    sessions: Path | None = None
    device: str = "auto"
    cpus: Annotated[float, Field(gt=0)] = 1.0
    threads: Annotated[int, Field(ge=1)] | None = None
    slots: Annotated[int, Field(ge=1, le=MAX_BATCH)] = 8
    queue: Annotated[int, Field(ge=1)] | None = None
    capacity: Annotated[int, Field(ge=1)] | None = None
    kv_cache: Literal["float", "int8", "int4"] = "float"
    chunk: Annotated[int, Field(ge=1)] | None = None
    most_loops: Annotated[int, Field(ge=1)] | None = None
    most_bytes: Annotated[int, Field(ge=1)] = 4 << 20
    answer_seconds: Seconds = 3600.0
    fingerprint: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    gpus: Annotated[float, Field(ge=0)] = 0.0
    resources: dict[str, float] = {}
    most_waiting: Annotated[int, Field(ge=1)] = 1024
    drain_seconds: Seconds = 300.0
    router: Literal["conversation", "load"] = "conversation"
    min_replicas: Annotated[int, Field(ge=1)] = 1
    max_replicas: Annotated[int, Field(ge=1)] = 1
    target_requests: Annotated[float, Field(gt=0)] | None = None
    upscale_seconds: Annotated[float, Field(ge=0, le=_DAY)] = 10.0
    downscale_seconds: Annotated[float, Field(ge=0, le=_DAY)] = 300.0
    health_seconds: Seconds = 10.0
    ingress_replicas: Annotated[int, Field(ge=1)] = 1
    ingress_cpus: Annotated[float, Field(ge=0)] = 1.0
    ingress_resources: dict[str, float] = {}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.api_key_file is not None) == self.no_key:
            raise ValueError(
                "api_key_file must be given, or no_key: true lets everybody ask who can reach the port: one of the two"
            )
        if self.min_replicas > self.max_replicas:
            least = self.min_replicas
            raise ValueError(f"max_replicas must be at least min_replicas ({least}), got {self.max_replicas}")
        return self

    @property
    def model_name(self) -> str:
        """By which requests may ask for the model."""
        return self.name or self.bundle.name

    @property
    def threads_of_replica(self) -> int:
        """On the CPU."""
        return self.threads or max(1, int(self.cpus))

    @property
    def queue_of_replica(self) -> int:
        """Requests that may wait in a replica for a slot."""
        return self.queue or self.slots

    @property
    def requests_of_replica(self) -> int:
        """Requests that a replica takes at once, running and waiting."""
        return self.slots + self.queue_of_replica
