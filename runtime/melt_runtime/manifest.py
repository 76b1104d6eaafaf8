"""``manifest.json``: everything a reader knows about a bundle, checked against the files before anything is loaded.

Exporter and runtime share this module. It knows nothing of ONNX Runtime.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any, get_type_hints

from pydantic import TypeAdapter

from melt_runtime.contract import (
    ACTIVATIONS,
    KV_CACHES,
    PRECISIONS,
    PROVIDERS,
    SCHEMA_VERSION,
    GraphSpec,
    KVCacheKind,
    ModelShape,
    TensorSpec,
    graph_specs,
    loop_graph,
)
from melt_runtime.errors import BundleError
from melt_runtime.measured import Parity, Quality

MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"
CHAT_TEMPLATE_NAME = "chat_template.jinja"
GENERATION_CONFIG_NAME = "generation_config.json"
WEIGHTS_NAME = "weights.data"
GENAI_CONFIG_NAME = "genai_config.json"
"""Of a model for ONNX Runtime GenAI, which is no bundle."""

_OTHERS = {
    GENAI_CONFIG_NAME: ("ONNX Runtime GenAI", "onnxruntime-genai"),
    "model.onnx": ("optimum", "ORTModelForCausalLM"),
}
"""Files of folders that other runtimes read, the surest mark first; whose they are, and what loads them."""

_REMAKE = "make it again with: python export.py CHECKPOINT --out BUNDLE"
_HASH_BLOCK = 1 << 20


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and sha256 (hexadecimal) of one file of the bundle."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``.

    Attributes:
        model: shape of the model.
        precision: of the weights, one of ``PRECISIONS``.
        activations: type of hidden states, latent states and the unquantized KV cache, one of ``ACTIVATIONS``.
        providers: devices that the bundle was made for, the best one first.
        quantization: how they were rounded: layers by format, precision by pattern of layer name, rounding.
        graphs: inputs and outputs of ``embed``, ``loop``, ``head``, and of the loops over quantized KV caches; the file
            is ``{name}.onnx``. All graphs share one file of weights.
        files: every file of the bundle but the manifest, by its name relative to the folder.
        weight_bytes: bytes of weights that stay in memory while the model runs.
        streamed_bytes: bytes of matrices that one run of ``loop`` and of ``head`` reads whole: what decoding on a CPU
            costs.
        producer: what made the bundle: names and versions.
        parity: how far ONNX Runtime was from torch with the same weights when the bundle was made; None where that was
            not checked.
        quality: how far the bundle was from the float32 checkpoint, by kind of KV cache; None where not measured.
    """

    model: ModelShape
    precision: str
    activations: str
    providers: tuple[str, ...]
    quantization: dict[str, Any]
    graphs: dict[str, GraphSpec]
    files: dict[str, FileEntry]
    weight_bytes: int
    streamed_bytes: dict[str, int]
    producer: dict[str, str]
    parity: Parity | None
    quality: Quality | None

    @property
    def kv_caches(self) -> tuple[KVCacheKind, ...]:
        """Kinds of KV cache that the bundle has a loop for."""
        return tuple(kind for kind in KV_CACHES if loop_graph(kind) in self.graphs)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes ``manifest.json`` into ``folder``."""
    values = {"schema_version": SCHEMA_VERSION, **asdict(manifest)}
    (folder / MANIFEST_NAME).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def file_entry(path: Path) -> FileEntry:
    """Size and sha256 of a file, read block by block."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_HASH_BLOCK):
            digest.update(block)
    return FileEntry(path.stat().st_size, digest.hexdigest())


def read_manifest(folder: str | Path) -> Manifest:
    """Reads the manifest and checks its own rules, not yet the files.

    Raises:
        BundleError: no such folder or manifest, another schema version, unknown or missing keys, bad values, or a path
            that leaves the bundle.
    """
    path = Path(folder) / MANIFEST_NAME
    if not path.is_file():
        for name, (owner, loader) in _OTHERS.items():
            if (Path(folder) / name).is_file():
                raise BundleError(
                    f"{folder} is a model for {owner}, whose number of loops is fixed: load it with {loader}, "
                    f"or for this runtime {_REMAKE}"
                )
        raise BundleError(f"{path} does not exist: a bundle is a folder with {MANIFEST_NAME}; {_REMAKE}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BundleError(f"{path} is not JSON ({error}); {_REMAKE}") from error
    if not isinstance(values, dict):
        raise BundleError(f"{path} must hold a JSON object; {_REMAKE}")
    version = values.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise BundleError(f"{path}: schema_version must be {SCHEMA_VERSION}, got {version!r}; {_REMAKE}")
    faults: list[str] = []
    manifest = _parse_manifest(values, faults)
    if manifest is not None:
        faults += _check_values(manifest)
    if manifest is None or faults:
        raise BundleError(f"{path}:\n  " + "\n  ".join(faults) + f"\n{_REMAKE}")
    return manifest


def check_files(folder: str | Path, manifest: Manifest, unchanged: frozenset[str] = frozenset()) -> None:
    """Compares size and sha256 of every file with the manifest.

    Args:
        folder: the bundle.
        manifest: what it should hold.
        unchanged: files that were compared before and have not changed since; only their size is compared again.

    Raises:
        BundleError: lists every file that is missing, truncated, longer or altered.
    """
    faults = []
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
        elif name not in unchanged and file_entry(path).sha256 != entry.sha256:
            faults.append(f"{name} was altered: its sha256 differs from the manifest's")
    if faults:
        raise BundleError(f"{folder} is damaged:\n  " + "\n  ".join(faults) + f"\n{_REMAKE}")


def _parse_manifest(values: dict[str, Any], faults: list[str]) -> Manifest | None:
    parsed = _parse_object(Manifest, values, "", faults)
    if parsed is None:
        return None
    model = _parse_object(ModelShape, parsed["model"], "model.", faults)
    graphs = {name: _parse_graph(name, graph, faults) for name, graph in parsed["graphs"].items()}
    files = {
        name: _parse_object(FileEntry, entry, f"files[{name!r}].", faults) for name, entry in parsed["files"].items()
    }
    if faults or model is None:
        return None
    return Manifest(
        model=ModelShape(**model),
        precision=parsed["precision"],
        activations=parsed["activations"],
        providers=tuple(parsed["providers"]),
        quantization=parsed["quantization"],
        graphs={name: graph for name, graph in graphs.items() if graph},
        files={name: FileEntry(**entry) for name, entry in files.items() if entry},
        weight_bytes=parsed["weight_bytes"],
        streamed_bytes=parsed["streamed_bytes"],
        producer=parsed["producer"],
        parity=TypeAdapter(Parity | None).validate_python(parsed["parity"]),
        quality=TypeAdapter(Quality | None).validate_python(parsed["quality"]),
    )


def _parse_object(kind: type, values: Any, where: str, faults: list[str]) -> dict[str, Any] | None:
    """Checks that ``values`` has exactly the fields of a dataclass, each of its plain type."""
    if not isinstance(values, dict):
        faults.append(f"{where.rstrip('.')} must be an object, got {values!r}")
        return None
    expected = {field.name for field in fields(kind)}
    problems = [f"{where}{key} is unknown" for key in sorted(values.keys() - expected)]
    problems += [f"{where}{key} is missing" for key in sorted(expected - values.keys())]
    hints = get_type_hints(kind)
    for key in sorted(expected & values.keys()):
        hint = hints[key]
        plain = hint if hint in (int, str, bool) else dict if getattr(hint, "__origin__", None) is dict else None
        if plain is not None and type(values[key]) is not plain:
            problems.append(f"{where}{key} must be {plain.__name__}, got {values[key]!r}")
    faults += problems
    return None if problems else values


def _parse_graph(name: str, graph: Any, faults: list[str]) -> GraphSpec | None:
    try:
        return GraphSpec(
            *(
                tuple(TensorSpec(t["name"], t["dtype"], tuple(t["shape"])) for t in graph[side])
                for side in ("inputs", "outputs")
            )
        )
    except (KeyError, TypeError) as error:
        faults.append(f"graphs[{name!r}] is not a list of inputs and outputs: {error!r}")
        return None


def _check_values(manifest: Manifest) -> list[str]:
    faults = []
    shape = manifest.model
    for field in fields(shape):
        value = getattr(shape, field.name)
        if type(value) is int and value < 1:
            faults.append(f"model.{field.name} must be at least 1, got {value}")
    if shape.cache_kind not in ("shared", "per_loop"):
        faults.append(f"model.cache_kind must be 'shared' or 'per_loop', got {shape.cache_kind!r}")
    if manifest.precision not in PRECISIONS:
        faults.append(f"precision must be one of {', '.join(PRECISIONS)}, got {manifest.precision!r}")
    if manifest.activations not in ACTIVATIONS:
        faults.append(f"activations must be one of {', '.join(ACTIVATIONS)}, got {manifest.activations!r}")
    elif manifest.providers != PROVIDERS[manifest.activations]:
        faults.append(
            f"providers must be {list(PROVIDERS[manifest.activations])} for {manifest.activations} activations, got "
            f"{list(manifest.providers)}"
        )
    if not faults:
        expected = graph_specs(shape, manifest.activations, manifest.kv_caches)
        faults += [
            f"graphs: {name} does not follow the contract"
            for name in sorted(expected.keys() | manifest.graphs.keys() | {"loop"})
            if name not in expected or manifest.graphs.get(name) != expected[name]
        ]
    for name in manifest.files:
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or "\\" in name or ":" in name or name != str(pure):
            faults.append(f"files: the path {name!r} leaves the bundle")
    needed = [f"{name}.onnx" for name in manifest.graphs]
    needed += [WEIGHTS_NAME, TOKENIZER_NAME, CHAT_TEMPLATE_NAME, GENERATION_CONFIG_NAME]
    faults += [f"files: {name} is not listed" for name in needed if name not in manifest.files]
    return faults
