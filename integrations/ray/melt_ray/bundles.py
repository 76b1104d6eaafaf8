"""Every process of a cluster must run the same bundle with the same runtime: checked on its node, before it starts."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import ray

from melt_runtime.bundle.manifest import read_manifest
from melt_runtime.errors import BundleError, MeltError
from melt_runtime.version import __version__


@dataclass(frozen=True)
class BundleIdentity:
    """A bundle as whoever started the work saw it.

    Attributes:
        path: the folder, by the same name on every node.
        fingerprint: tells its files from all others, tokenizer and template included.
        version: of melt-onnx.
    """

    path: str
    fingerprint: str
    version: str = __version__

    @classmethod
    def of(cls, path: str | Path) -> "BundleIdentity":
        """The identity of a bundle on this node.

        Raises:
            BundleError: there is none.
        """
        return cls(str(path), fingerprint_of(path))

    def require_here(self) -> None:
        """Refuses to go on where this node would answer differently.

        Raises:
            BundleError: no bundle on this node, or another one.
            MeltError: another melt-onnx.
        """
        node = node_name()
        if self.version != __version__:
            raise MeltError(
                f"melt-onnx on {node} must be {self.version}, as where the work was started, got {__version__}: "
                f"install melt-onnx=={self.version} there"
            )
        try:
            found = fingerprint_of(self.path)
        except BundleError as error:
            raise BundleError(
                f"bundle {self.path} must be on every node that may run it, {node} has none: copy the folder there, "
                f"or keep it on a disk that all nodes share ({error})"
            ) from error
        if found != self.fingerprint:
            raise BundleError(
                f"bundle {self.path} on {node} must have the fingerprint {self.fingerprint}, as where the work was "
                f"started, got {found}: copy that bundle there again"
            )


def fingerprint_of(path: str | Path) -> str:
    """Sha256 over the names and hashes of a bundle's files, as its manifest lists them.

    Raises:
        BundleError: no bundle there.
    """
    files = read_manifest(path).files
    return hashlib.sha256(repr(sorted((name, entry.sha256) for name, entry in files.items())).encode()).hexdigest()


def node_name() -> str:
    """This node, as messages name it: its address and what Ray calls it."""
    return f"node {ray.util.get_node_ip_address()} ({ray.get_runtime_context().get_node_id()[:12]})"
