"""Opens a finished bundle as the runtime will: what was written is what can be loaded."""

import sys
from pathlib import Path

from melt_runtime.bundle.contract import PROVIDERS
from melt_runtime.bundle.manifest import check_files, read_manifest
from melt_runtime.device.providers import choose_provider
from melt_runtime.loading.load_cache import LoadCache
from melt_runtime.loading.opening import check_vocabulary, open_sessions
from melt_runtime.model import MeltModel
from melt_runtime.request.generation_files import read_defaults
from melt_runtime.text.codec import TextCodec

CAPACITY = 64
"""Tokens of the state that is allocated for it, which every exported model has positions for."""


def read_back(folder: Path) -> None:
    """Loads a bundle by the runtime's own door, and every other loop of it.

    Graphs that a CPU cannot run are not opened: then manifest, hashes and texts alone are read.

    Raises:
        MeltError: what a reader would get: a value that the runtime does not know, a graph that does not fit.
    """
    manifest = read_manifest(folder)
    if "cpu" not in PROVIDERS[manifest.activations]:
        check_files(folder, manifest)
        check_vocabulary(TextCodec.read(folder), manifest.model)
        read_defaults(folder, manifest.model)
        return
    MeltModel.load(folder, device="cpu", capacity=CAPACITY, cache=LoadCache(min_bytes=sys.maxsize))
    for kv_cache in manifest.kv_caches[1:]:
        open_sessions(folder, manifest, choose_provider("cpu", manifest.activations), kv_cache=kv_cache)
