"""Writes a bundle: trace, describe, verify, and only then give it its name.

Everything happens in a temporary sibling of the output folder, which is renamed when the bundle is complete and
verified and removed when anything goes wrong: an interrupted export leaves no bundle.
"""

import copy
import importlib.metadata
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from melt_export.trace import model_shape, trace_graph
from melt_export.verify import verify_bundle
from melt_models.checkpoint import load_checkpoint, read_config
from melt_models.configuration import MeltConfig
from melt_runtime.contract import GRAPHS, graph_specs
from melt_runtime.errors import MeltError
from melt_runtime.generation_config import GenerationConfig, write_generation_config
from melt_runtime.manifest import (
    CHAT_TEMPLATE_NAME,
    GENERATION_CONFIG_NAME,
    PRECISIONS,
    TOKENIZER_NAME,
    Manifest,
    file_entry,
    write_manifest,
)

HEAD_DIM_MULTIPLE = 16
"""GroupQueryAttention rotates heads of this multiple only."""


class ExportError(MeltError):
    """A checkpoint that cannot be exported, or an output folder that cannot be written."""


Report = Callable[[str], None]
"""Told of each stage as it begins."""


def export_bundle(checkpoint: Path, out: Path, precision: str = "float32", report: Report = lambda _: None) -> Manifest:
    """Exports a checkpoint folder to a bundle.

    Args:
        checkpoint: folder with ``config.json``, safetensors weights and ``tokenizer.json``.
        out: folder to make; it must not exist.
        precision: ``float32`` or ``float16``, of weights, state and cache.
        report: told of each stage.

    Raises:
        ExportError: the output exists, or the checkpoint has what the graphs cannot express.
        CheckpointError: the checkpoint is incomplete or does not fit its configuration.
        ParityError: the graphs do not compute what torch does.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if out.exists():
        raise ExportError(f"{out} exists: choose another --out, or remove it first")
    _check_exportable(checkpoint, read_config(checkpoint))
    report(f"loading {checkpoint}")
    model = load_checkpoint(checkpoint).to(getattr(torch, precision))
    with _staged(out) as folder:
        shape = model_shape(model)
        specs = graph_specs(shape, precision)
        for name in GRAPHS:
            report(f"tracing {name}.onnx")
            trace_graph(name, model, specs[name], folder)
        _write_text_files(checkpoint, folder, model.config)
        report("describing the files")
        manifest = Manifest(
            model=shape,
            precision=precision,
            graphs=specs,
            files={path.name: file_entry(path) for path in sorted(folder.iterdir())},
            weight_bytes=sum(path.stat().st_size for path in folder.glob("*.data")),
            producer=_producer(),
            parity={},
        )
        write_manifest(folder, manifest)
        report("verifying against torch, loop by loop")
        reference = copy.deepcopy(model).float()
        manifest = replace(manifest, parity=verify_bundle(folder, reference, _probe_prompt(model.config)))
        write_manifest(folder, manifest)
    report(f"wrote {out}")
    return manifest


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """A temporary sibling that becomes ``out`` at the end, or disappears."""
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        yield staging
        staging.chmod(0o755)
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _check_exportable(checkpoint: Path, config: MeltConfig) -> None:
    """Finds what would fail late, before any long work begins."""
    faults = []
    if config.head_dim % HEAD_DIM_MULTIPLE:
        faults.append(f"head_dim must be a multiple of {HEAD_DIM_MULTIPLE}, got {config.head_dim}")
    tokenizer = checkpoint / TOKENIZER_NAME
    if not tokenizer.is_file():
        faults.append(f"{TOKENIZER_NAME} is missing")
    else:
        highest = max(_token_ids(tokenizer), default=-1)
        if highest >= config.vocab_size:
            faults.append(f"{TOKENIZER_NAME} has token id {highest}, but vocab_size is {config.vocab_size}")
    if faults:
        raise ExportError(f"{checkpoint} cannot be exported:\n  " + "\n  ".join(faults))


def _token_ids(tokenizer: Path) -> list[int]:
    content = json.loads(tokenizer.read_text(encoding="utf-8"))
    ids = [token["id"] for token in content.get("added_tokens", [])]
    vocabulary = content["model"]["vocab"]
    return ids + (list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1])


def _write_text_files(checkpoint: Path, folder: Path, config: MeltConfig) -> None:
    """Writes tokenizer, chat template and generation defaults; an empty template says that there is none."""
    shutil.copyfile(checkpoint / TOKENIZER_NAME, folder / TOKENIZER_NAME)
    (folder / CHAT_TEMPLATE_NAME).write_text(chat_template(checkpoint), encoding="utf-8")
    eos = config.eos_token_id
    stop_ids = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    write_generation_config(folder / GENERATION_CONFIG_NAME, GenerationConfig(stop_ids=stop_ids))


def chat_template(checkpoint: Path) -> str:
    """The checkpoint's chat template, self-contained: the special tokens that it names are set at its top."""
    settings_path, template_path = checkpoint / "tokenizer_config.json", checkpoint / CHAT_TEMPLATE_NAME
    settings = json.loads(settings_path.read_text(encoding="utf-8")) if settings_path.is_file() else {}
    stored = settings.get("chat_template") or ""
    text = template_path.read_text(encoding="utf-8") if template_path.is_file() else stored
    named = [name for name in ("bos_token", "eos_token", "pad_token", "unk_token") if name in text]
    values = {name: settings.get(name) or "" for name in named}
    values = {name: value["content"] if isinstance(value, dict) else value for name, value in values.items()}
    return "".join(f"{{%- set {name} = {json.dumps(value)} -%}}" for name, value in values.items()) + text


def _producer() -> dict[str, str]:
    names = ("melt-onnx", "torch", "onnx", "onnxscript", "transformers")
    return {name: importlib.metadata.version(name) for name in names}


def _probe_prompt(config: MeltConfig) -> list[int]:
    """Token ids of one chunk and a half: every branch of prefill, whatever the model knows."""
    length = min(config.chunk_size + config.chunk_size // 2 + 1, config.max_position_embeddings // 2)
    draw = random.Random(0)
    return [draw.randrange(config.vocab_size) for _ in range(length)]
