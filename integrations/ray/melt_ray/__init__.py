"""MELT models on a Ray cluster: ``melt_ray.serve`` answers over HTTP, ``batch`` answers files of prompts."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from melt_ray.job import Summary, batch
    from melt_ray.settings import BatchSettings

__all__ = ["BatchSettings", "Summary", "batch"]


def __getattr__(name: str) -> Any:
    """Imports what is asked for: a replica that serves needs none of Ray Data."""
    if name in ("Summary", "batch"):
        from melt_ray import job

        return getattr(job, name)
    if name == "BatchSettings":
        from melt_ray.settings import BatchSettings

        return BatchSettings
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
