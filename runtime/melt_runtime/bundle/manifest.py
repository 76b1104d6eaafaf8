"""``manifest.json``: everything a reader knows about a bundle, checked against the files before anything is loaded.

Exporter and runtime share this module. It knows nothing of ONNX Runtime.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Interval, Len

from melt_runtime.arguments import path_of, shown
from melt_runtime.bundle.contract import (
    INTEGERS,
    KV_CACHES,
    PROVIDERS,
    SCHEMA_VERSION,
    Activations,
    GraphSpec,
    KVCacheKind,
    ModelShape,
    Name,
    Precision,
    graph_specs,
    loop_graph,
)
from melt_runtime.bundle.measured import Parity, PromptQuality, Quality
from melt_runtime.errors import BundleError
from melt_runtime.progress import Report

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from pydantic_core import ErrorDetails

MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"
CHAT_TEMPLATE_NAME = "chat_template.jinja"
GENERATION_CONFIG_NAME = "generation_config.json"
WEIGHTS_NAME = "weights.data"
PROMPT_WEIGHTS_NAME = "prompts.data"
GENAI_CONFIG_NAME = "genai_config.json"
"""Of a model for ONNX Runtime GenAI, which is no bundle."""

_OTHERS = {
    GENAI_CONFIG_NAME: ("ONNX Runtime GenAI", "onnxruntime-genai"),
    "model.onnx": ("optimum", "ORTModelForCausalLM"),
}
"""Files of folders that other runtimes read, the surest mark first; whose they are, and what loads them."""

REMAKE = "make it again with: melt-export CHECKPOINT --out BUNDLE"
"""What every error about a damaged bundle ends with."""

_HASH_BLOCK = 1 << 20
_MOST_BYTES = 8 << 20  # the most layers that a model may have come to 4 MB
_MOST_FAULTS = 40
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")

Bytes = Annotated[int, Interval(ge=0, le=1 << 50)]


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and sha256 (hexadecimal) of one file of the bundle."""

    size: Bytes
    sha256: Annotated[str, Len(64, 64)]


@dataclass(frozen=True)
class Quantization:
    """How the weights were rounded.

    Attributes:
        formats: every format that a layer has.
        layers: another precision than the bundle's, by pattern of layer name.
        rounding: how 4-bit scales were found.
    """

    formats: tuple[Name, ...]
    layers: dict[Name, Name]
    rounding: Name


@dataclass(frozen=True)
class Prompts:
    """A copy of the layers' weights for passes of several rows.

    Attributes:
        precision: of it.
        rows: of a pass from which its loops are the faster ones.
        weight_bytes: size of its file, which is mapped into memory.
        parity: as the bundle's, of these graphs; None where that was not checked.
        quality: how far they are from float32 and from the bundle's own; None where not measured.
    """

    precision: Literal["int8"]
    rows: Annotated[int, Interval(ge=2, le=1 << 20)]
    weight_bytes: Bytes
    parity: Parity | None
    quality: PromptQuality | None

    def describe_quality(self) -> list[str]:
        """How far these graphs are from float32 and from the bundle's own, in a line; none where not measured."""
        found = self.quality
        if found is None:
            return []
        return [
            f"prompts (passes of {self.rows} rows and more): perplexity {found.loss.perplexity:.4g}, KL divergence "
            f"{found.loss.kl:.2g}, first choice equal for {100 * found.loss.greedy_agreement:.1f} %; beside the "
            f"bundle's own loop {found.kl:.2g} and {100 * found.greedy_agreement:.1f} %"
        ]


@dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``.

    Attributes:
        model: shape of the model.
        precision: of the weights, one of ``PRECISIONS``.
        activations: type of hidden states, latent states and the unquantized KV cache, one of ``ACTIVATIONS``.
        providers: devices that the bundle was made for, the best one first.
        quantization: how they were rounded.
        graphs: inputs and outputs of ``embed``, ``loop``, ``head``, and of the loops over quantized KV caches; the file
            is ``{name}.onnx``. All graphs share one file of weights, to which those for prompts add one of their own.
        files: every file of the bundle but the manifest, by its name relative to the folder.
        weight_bytes: bytes of weights that stay in memory while the model runs.
        streamed_bytes: bytes of matrices that one run of ``loop`` and of ``head`` reads whole: what decoding on a CPU
            costs.
        producer: what made the bundle: names and versions.
        parity: how far ONNX Runtime was from torch with the same weights when the bundle was made; None where that was
            not checked.
        quality: how far the bundle was from the float32 checkpoint, by kind of KV cache; None where not measured.
        prompts: its copy for passes of several rows; None: it has none.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"strict": True, "extra": "forbid", "allow_inf_nan": False}

    model: ModelShape
    precision: Precision
    activations: Activations
    providers: tuple[Name, ...]
    quantization: Quantization
    graphs: dict[Name, GraphSpec]
    files: Annotated[dict[Name, FileEntry], Len(0, 100)]
    weight_bytes: Bytes
    streamed_bytes: dict[Name, Bytes]
    producer: dict[Name, Name]
    parity: Parity | None
    quality: Quality | None
    prompts: Prompts | None

    @property
    def kv_caches(self) -> tuple[KVCacheKind, ...]:
        """Kinds of KV cache that the bundle has a loop for."""
        return tuple(kind for kind in KV_CACHES if loop_graph(kind) in self.graphs)

    @property
    def identity(self) -> str:
        """Tells the bundle's graphs and weights from all others: what a saved cache is good for."""
        made = sorted((name, entry.sha256) for name, entry in self.files.items() if name.endswith((".onnx", ".data")))
        return hashlib.sha256(repr(made).encode()).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes ``manifest.json`` into ``folder``.

    Raises:
        BundleError: a number in it is not finite.
    """
    values = {"schema_version": SCHEMA_VERSION, **asdict(manifest)}
    try:
        text = json.dumps(values, indent=2, allow_nan=False)
    except ValueError as error:
        raise BundleError(f"what was measured is not finite, the model computes no numbers: {error}") from error
    (folder / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")


def file_entry(path: Path, read: Callable[[int], None] = lambda _: None) -> FileEntry:
    """Size and sha256 of a file, read block by block; ``read`` is told of the bytes of each."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_HASH_BLOCK):
            digest.update(block)
            read(len(block))
    return FileEntry(path.stat().st_size, digest.hexdigest())


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Reads the manifest and checks its own rules, not yet the files.

    Raises:
        BundleError: no such folder or manifest, another schema version, unknown or missing keys, bad values, or a path
            that leaves the bundle.
        ValueError: ``folder`` is no path.
    """
    folder = path_of("folder", folder)
    path = folder / MANIFEST_NAME
    try:
        found = path.is_file()
    except OSError as error:
        raise BundleError(f"{shown(str(folder))} cannot be read: {error.strerror}") from error
    if not found:
        for name, (owner, loader) in _OTHERS.items():
            if (folder / name).is_file():
                raise BundleError(
                    f"{folder} is a model for {owner}, whose number of loops is fixed: load it with {loader}, "
                    f"or for this runtime {REMAKE}"
                )
        raise BundleError(f"{path} does not exist: a bundle is a folder with {MANIFEST_NAME}; {REMAKE}")
    faults: list[str] = []
    manifest = _parse(path, faults)
    if manifest is not None:
        faults += _check_values(manifest)
    if manifest is None or faults:
        hidden = len(faults) - _MOST_FAULTS
        listed = faults[:_MOST_FAULTS] + ([f"and {hidden} more"] if hidden > 0 else [])
        raise BundleError(f"{path}:\n  " + "\n  ".join(listed) + f"\n{REMAKE}")
    return manifest


def check_files(
    folder: str | Path,
    manifest: Manifest,
    unchanged: frozenset[str] = frozenset(),
    progress: Report | None = None,
) -> None:
    """Compares size and sha256 of every file with the manifest.

    Args:
        folder: the bundle.
        manifest: what it should hold.
        unchanged: files that were compared before and have not changed since; only their size is compared again.
        progress: told of the bytes that were read.

    Raises:
        BundleError: lists every file that is missing, truncated, longer or altered.
    """
    faults = []
    done, total = 0, sum(entry.size for name, entry in manifest.files.items() if name not in unchanged)

    def read(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress("checking files", done, total)

    for name, entry in manifest.files.items():
        path = Path(folder) / name
        if not path.is_file():
            faults.append(f"{name} is missing")
            continue
        size = path.stat().st_size
        if size < entry.size:
            faults.append(f"{name} is truncated: {size} bytes, expected {entry.size}")
        elif size > entry.size:
            faults.append(f"{name} is too large: {size} bytes, expected {entry.size}")
        elif name not in unchanged and file_entry(path, read).sha256 != entry.sha256:
            faults.append(f"{name} was altered: its sha256 differs from the manifest's")
    if faults:
        raise BundleError(f"{folder} is damaged:\n  " + "\n  ".join(faults) + f"\n{REMAKE}")


def _parse(path: Path, faults: list[str]) -> Manifest | None:
    """The manifest as it stands in a file, or None and every fault."""
    from pydantic import ValidationError  # here: it takes longer to import than all else together

    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"more than {_MOST_BYTES} bytes, which no manifest has")
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_doubles)
        if not isinstance(values, dict):
            raise ValueError("not an object")
        version = values.pop("schema_version", None)
        if version != SCHEMA_VERSION or type(version) is not int:
            faults.append(f"schema_version must be {SCHEMA_VERSION}, got {shown(version)}")
            return None
        return _reader().validate_json(json.dumps(values))
    except ValidationError as error:
        faults += [_describe(fault) for fault in error.errors(include_url=False, include_context=False)]
    except RecursionError:
        faults.append("it is not JSON that can be read: nested too deep")
    except (OSError, ValueError) as error:
        faults.append(f"it is not JSON that can be read: {error}")
    return None


@cache
def _reader() -> "TypeAdapter[Manifest]":
    from pydantic import TypeAdapter

    return TypeAdapter(Manifest)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of two equal keys one would hide the other."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("an object has the same key twice")
    return values


def _describe(fault: "ErrorDetails") -> str:
    """One fault: field, rule, value."""
    place = ".".join(shown(part).strip("'") for part in fault["loc"]) or "the manifest"
    if fault["type"] == "missing":
        return f"{place} is missing"
    if fault["type"] == "unexpected_keyword_argument":
        return f"{place} is unknown"
    rule = fault["msg"].replace(" should ", " must ").removeprefix("Input ")
    rule = rule if rule.startswith("must") else f"is wrong: {rule}"
    return f"{place} {rule}, got {shown(fault['input'])}"


def _check_values(manifest: Manifest) -> list[str]:
    """What the types do not say: rules between fields."""
    faults = []
    shape = manifest.model
    if shape.heads % shape.kv_heads:
        faults.append(f"model.heads must be a multiple of model.kv_heads ({shape.kv_heads}), got {shape.heads}")
    if manifest.providers != PROVIDERS[manifest.activations]:
        faults.append(
            f"providers must be {list(PROVIDERS[manifest.activations])} for {manifest.activations} activations, got "
            f"{list(manifest.providers)}"
        )
    expected = graph_specs(shape, manifest.activations, manifest.kv_caches, manifest.prompts is not None)
    faults += [
        f"graphs.{name} does not follow the contract"
        for name in sorted(expected.keys() | manifest.graphs.keys() | {"loop"})
        if name not in expected or manifest.graphs.get(name) != expected[name]
    ]
    for name in manifest.files:
        if not _FILE_NAME.fullmatch(name):
            faults.append(f"files: a name must be of letters, digits, '.', '_' and '-', got {shown(name)}")
    strangers = [name for name in manifest.files if name.endswith(".onnx") and name[:-5] not in manifest.graphs]
    faults += [f"files.{name} must belong to one of graphs" for name in strangers]
    if manifest.prompts is None and PROMPT_WEIGHTS_NAME in manifest.files:
        faults.append(f"files.{PROMPT_WEIGHTS_NAME} must be absent where prompts is null")
    needed = [f"{name}.onnx" for name in expected]
    needed += [WEIGHTS_NAME, TOKENIZER_NAME, CHAT_TEMPLATE_NAME, GENERATION_CONFIG_NAME]
    sizes = {"weight_bytes": (WEIGHTS_NAME, manifest.weight_bytes)}
    if manifest.prompts is not None:
        needed.append(PROMPT_WEIGHTS_NAME)
        sizes["prompts.weight_bytes"] = (PROMPT_WEIGHTS_NAME, manifest.prompts.weight_bytes)
        if manifest.precision not in INTEGERS or manifest.activations != "float32":
            faults.append(
                f"prompts must be null for {manifest.precision} weights and {manifest.activations} activations: "
                "only integers on the CPU have such a copy"
            )
    faults += [f"files.{name} is missing" for name in needed if name not in manifest.files]
    faults += [
        f"{field} must be the size of {name} ({manifest.files[name].size}), got {size}"
        for field, (name, size) in sizes.items()
        if name in manifest.files and size != manifest.files[name].size
    ]
    if manifest.quality is not None:
        tables = {kind: found.exact_match for kind, found in manifest.quality.kv_cache.items()}
        groups = {kind: {loops: set(table[loops]) for loops in table} for kind, table in tables.items()}
        faults += [
            f"quality.kv_cache.{kind}.exact_match must have the loops and groups of quality.kv_cache.float"
            for kind in groups
            if groups[kind] != groups.get("float")
        ]
    if manifest.streamed_bytes.keys() != {"loop", "head"}:
        faults.append(f"streamed_bytes must have loop and head, got {sorted(manifest.streamed_bytes)}")
    return faults
