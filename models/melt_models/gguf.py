"""Makes a checkpoint out of a GGUF file of llama.cpp, its weights unpacked to float32: ``python -m melt_models.gguf``.

transformers reads the file; the checkpoint is then like any other. Needs the packages ``gguf`` and ``accelerate``
(``pip install 'melt-onnx[gguf]'``) and memory for the whole model in float32.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from melt_files import require_absent, staged
from melt_models.checkpoint import WEIGHTS_NAME
from melt_models.errors import CheckpointError
from melt_models.families import FAMILIES


def gguf_to_checkpoint(file: Path, out: Path) -> None:
    """Writes configuration, weights, tokenizer and chat template of a GGUF file as a checkpoint folder.

    Args:
        file: a GGUF file of a family that is known here.
        out: folder to make; it must not exist.

    Raises:
        CheckpointError: no such file, not GGUF, another family, packages that are missing, or ``out`` exists.
    """
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise CheckpointError(f"reading GGUF needs {' and '.join(missing)}: pip install 'melt-onnx[gguf]'")
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist: give a .gguf file")
    require_absent(out, CheckpointError)
    place = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(**place)
    except Exception as error:  # the reader has no error type of its own
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if config.model_type not in FAMILIES:
        raise CheckpointError(f"{file}: model_type must be one of {', '.join(FAMILIES)}, got {config.model_type!r}")
    try:
        model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**place)
    except Exception as error:  # a file that ends early, or a tokenizer that has no counterpart
        raise CheckpointError(f"{file} cannot be unpacked: {error}; fetch it again") from error
    tied = config.tie_word_embeddings
    tensors = {
        name: t.contiguous() for name, t in model.state_dict().items() if not (tied and name == "lm_head.weight")
    }
    values = {name: value for name, value in config.to_diff_dict().items() if name != "quantization_config"}
    with staged(out) as folder:
        (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        tokenizer.save_pretrained(folder)


def main(argv: list[str] | None = None) -> int:
    """Unpacks one file; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m melt_models.gguf", description=__doc__)
    parser.add_argument("file", type=Path, help="a .gguf file")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to make; it must not exist")
    args = parser.parse_args(argv)
    try:
        gguf_to_checkpoint(args.file, args.out)
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: a checkpoint in float32")
    return 0


if __name__ == "__main__":
    sys.exit(main())
