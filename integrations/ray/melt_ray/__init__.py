"""MELT models on a Ray cluster: ``melt_ray.serve`` answers over HTTP, ``batch`` answers files of prompts."""

from melt_ray.batch import BatchSettings, Summary, batch

__all__ = ["BatchSettings", "Summary", "batch"]
