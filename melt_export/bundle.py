"""Writes a bundle: trace, pack the weights, calibrate, verify, measure, and only then give it its name.

Everything happens in a temporary sibling of the output folder, which is renamed when the bundle is complete and
verified and removed when anything goes wrong: an interrupted export leaves no bundle. Weights pass through memory one
tensor at a time.
"""

import importlib.metadata
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx_ir as ir
import torch
from torch import nn

from melt_export.calibrate import collect_rows, key_scales, value_scales
from melt_export.choices import PROMPTS
from melt_export.formats import BLOCKS, FormatError, WeightFormat, prompt_formats, weight_formats
from melt_export.limits import LossError, describe_loss, describe_prompt_loss
from melt_export.probe import Probe, choose_probe
from melt_export.progress import bar
from melt_export.quality import compare_prompts, measure_quality, trace_reference
from melt_export.quantize import ROUNDINGS, Rounding
from melt_export.readback import read_back
from melt_export.record import open_runner
from melt_export.reference import bundle_reader, fits_whole, reference_model
from melt_export.smooth import give_peaks, observed_peaks
from melt_export.source import ExportError, Source, checkpoint_source
from melt_export.trace import graph_modules, model_shape, sampling_modules, trace_graph
from melt_export.variants import scale_keys, write_quantized_loop
from melt_export.verify import verify_bundle
from melt_export.weights import WeightFile, owners
from melt_files import partial_folder, require_absent, staged
from melt_models.checkpoint import empty_model
from melt_models.hub import checkpoint_folder
from melt_runtime.arguments import one_of
from melt_runtime.bundle.contract import (
    ACTIVATIONS,
    INTEGERS,
    KV_CACHES,
    METADATA_KEY,
    PRECISIONS,
    PROMPT_GRAPHS,
    PROVIDERS,
    GraphSpec,
    KVCacheKind,
    activation_dtype,
    graph_metadata,
    graph_specs,
    loop_graph,
    offered_kv_caches,
    prompt_graph,
)
from melt_runtime.bundle.manifest import (
    CHAT_TEMPLATE_NAME,
    GENERATION_CONFIG_NAME,
    PROMPT_WEIGHTS_NAME,
    TOKENIZER_NAME,
    WEIGHTS_NAME,
    Manifest,
    Prompts,
    Quantization,
    file_entry,
    write_manifest,
)
from melt_runtime.bundle.measured import Parity
from melt_runtime.request.generation_files import write_generation_config

_PROMPT_ROWS = {"int8": 6, "int4": 12}
"""Rows of a pass from which the loops for prompts are the faster ones, by precision of the bundle's own. Measured at
hidden sizes 576 and 2048 with AVX-512 VNNI (docs/performance.md); without it they gain from fewer rows on."""

Report = Callable[[str], None]
"""Told of each stage as it begins."""


@dataclass(frozen=True)
class ExportOptions:
    """How to make a bundle.

    Attributes:
        precision: of the weights, one of ``PRECISIONS``; a float type is that of activations and KV cache too.
        layers: precision by pattern of layer name, for layers that shall have another.
        block: most weights that share a scale, one of ``BLOCKS``: fewer cost less quality, more bytes and time.
        rounding: how 4-bit scales are found, ``search`` or ``nearest``.
        text: what calibration and quality are measured on; default: the model's own evaluation, or random tokens.
        activations: type of activations and KV cache, one of ``ACTIVATIONS``; default: as the precision asks, float32
            for integers. ``float16`` and ``bfloat16`` are for CUDA.
        verified: compare with torch and measure the quality; left out for random weights, which have none.
        allow_loss: write the bundle, with every KV cache, even where rounding costs more than ``limits`` allows.
        prompts: one of ``PROMPTS``: ``int8`` adds a copy of the layers' weights for passes of several rows, at 8 bits
            by column, and refuses one that costs too much; default: for ``int8`` weights on the CPU, where it does not.
        quantized_caches: whether to offer int8 and int4 KV caches beside that of the activations, where these allow it.
        report: told of each stage.

    Raises:
        ValueError: an unknown precision, rounding or copy for prompts, or one that the graphs could not use.
    """

    precision: str = "float32"
    layers: Mapping[str, str] = field(default_factory=dict)
    block: int = BLOCKS[0]
    rounding: Rounding = "search"
    text: str | None = None
    activations: str | None = None
    verified: bool = True
    allow_loss: bool = False
    prompts: str | None = None
    quantized_caches: bool = True
    report: Report = field(default=lambda _: None)

    def __post_init__(self) -> None:
        """Checks the names."""
        for name, known in (("precision", PRECISIONS), ("rounding", ROUNDINGS)):
            one_of(name, getattr(self, name), known)
        if self.prompts is not None:
            one_of("prompts", self.prompts, PROMPTS)
        if self.prompts == "int8" and not self._integer_on_cpu:
            raise ValueError(
                f"prompts must be 'none' for {self.precision} weights and {self.dtype} activations, got 'int8': a copy "
                "for prompts is of int8 or int4 weights on the CPU, whose activations are float32"
            )

    @property
    def on_cpu(self) -> bool:
        """Whether a CPU can run the graphs."""
        return "cpu" in PROVIDERS[self.dtype]

    @property
    def _integer_on_cpu(self) -> bool:
        return self.precision in INTEGERS and self.dtype == "float32"

    @property
    def has_prompts(self) -> bool:
        """Whether to make loops for passes of several rows."""
        default = "int8" if self.precision == "int8" and self._integer_on_cpu else "none"
        return (self.prompts or default) == "int8"

    @property
    def dtype(self) -> str:
        """Type of activations."""
        return activation_dtype(self.precision) if self.activations is None else self.activations

    @property
    def kv_caches(self) -> tuple[KVCacheKind, ...]:
        """Kinds of KV cache to make a loop for."""
        return offered_kv_caches(self.dtype) if self.quantized_caches else ("float",)


def export_bundle(checkpoint: str | Path, out: Path, options: ExportOptions | None = None) -> Manifest:
    """Exports a checkpoint to a bundle.

    Args:
        checkpoint: folder with ``config.json``, safetensors weights and ``tokenizer.json``, or the name of one on the
            hub; with ``evaluation.jsonl`` the manifest also says how many of its examples the bundle answers, by loops.
        out: folder to make; it must not exist.
        options: default: ``float32``.

    Raises:
        ExportError: the output exists, the checkpoint has what the graphs cannot express, or a text is too short.
        FormatError: the precision does not fit the model.
        CheckpointError: the checkpoint cannot be found, is incomplete, damaged or does not fit its configuration.
        ParityError: the graphs do not compute what torch does.
        LossError: rounding the weights costs more than is allowed; a KV cache that does is left out.
        BundleError: the runtime cannot load what was written.
    """
    require_absent(out, ExportError)
    return export_source(checkpoint_source(checkpoint_folder(str(checkpoint))), out, options or ExportOptions())


def export_source(source: Source, out: Path, options: ExportOptions) -> Manifest:
    """As ``export_bundle``, from an opened source."""
    require_absent(out, ExportError)
    config, precision, report = source.config, options.precision, options.report
    for note in source.notes:
        report(f"note: {note}")
    formats = weight_formats(empty_model(config), precision, options.layers, options.block, options.activations)
    shape, dtype = model_shape(config), options.dtype
    prompts = prompt_formats(formats) if options.has_prompts else formats
    if options.prompts == "int8" and prompts == formats:
        raise FormatError("--prompts int8 copies the integer matrices of model.layers, which has none: leave it out")
    with staged(out) as folder:
        write_text_files(source, folder)
        probe = choose_probe(source, folder, options.text)
        specs = graph_specs(shape, dtype, options.kv_caches, prompts != formats)
        weights = WeightFile(folder)
        modules = graph_modules(config, formats, dtype, options.rounding)
        described = {METADATA_KEY: json.dumps(graph_metadata(shape, precision, dtype))}

        def write(name: str, module: nn.Module, owns_weights: bool = True) -> int:
            """Writes a graph and its weights; returns the bytes of its matrices."""
            report(f"tracing {name}.onnx")
            graph = trace_graph(name, module, specs[name])
            graph.metadata_props.update(described)
            matrices = 0
            if owns_weights:
                report(f"packing the weights of {name}.onnx")
                matrices = _pack(graph, module, source, weights)
            ir.save(graph, folder / f"{name}.onnx")
            return matrices

        streamed = {name: write(name, module) for name, module in modules.items()}
        if options.verified and options.on_cpu:
            report(f"running float32 over {probe.name}")
            exact = reference_model(config, source.read)
            with observed_peaks(exact) as peaks:
                unrounded = trace_reference(exact, probe)
            del exact
        if "prompts" in specs:
            several = modules | {"loop": graph_modules(config, prompts, dtype)["loop"]}
            if options.verified:
                give_peaks(several["loop"], peaks)
            with weights.beside(PROMPT_WEIGHTS_NAME):
                write("prompts", several["loop"])
        for name, module in sampling_modules(config).items() if "greedy" in specs else ():
            write(name, module, owns_weights=False)
        manifest = Manifest(
            model=shape,
            precision=precision,
            activations=dtype,
            providers=PROVIDERS[dtype],
            quantization=_describe(formats, options),
            graphs={name: spec for name, spec in specs.items() if (folder / f"{name}.onnx").is_file()},
            files={},
            weight_bytes=0,
            streamed_bytes={name: streamed[name] for name in ("loop", "head")},
            producer=_producer(),
            parity=None,
            quality=None,
            prompts=None,
        )
        if len(options.kv_caches) > 1:
            report("calibrating the quantized KV caches")
            _write_quantized_loops(folder, manifest, specs, weights, probe)
        report("describing the files")
        files = {path.name: file_entry(path) for path in sorted(folder.iterdir())}
        manifest = replace(manifest, graphs=specs, files=files, weight_bytes=files[WEIGHTS_NAME].size)
        if "prompts" in specs:
            size = files[PROMPT_WEIGHTS_NAME].size
            manifest = replace(manifest, prompts=Prompts("int8", _PROMPT_ROWS[precision], size, None, None))
        write_manifest(folder, manifest)
        if options.verified and not options.on_cpu:
            report("verifying the same graphs in float32: this machine's processor cannot run them as they are")
            manifest = replace(manifest, parity=_verify_twin(source, out, options))
            write_manifest(folder, manifest)
        elif options.verified:
            report("verifying against torch, loop by loop")
            brief = not fits_whole(empty_model(config))
            rounded = reference_model(config, bundle_reader(weights, modules))
            manifest = replace(manifest, parity=verify_bundle(folder, manifest, rounded, brief=brief))
            if manifest.prompts is not None:
                report("verifying the loops for prompts")
                rounded = reference_model(config, bundle_reader(weights, several))
                parity = verify_bundle(folder, manifest, rounded, brief=brief, prompts=True)
                manifest = replace(manifest, prompts=replace(manifest.prompts, parity=parity))
            del rounded
            report(f"measuring what {precision} costs on {probe.name}")
            if manifest.prompts is not None:
                found = compare_prompts(folder, manifest, unrounded, probe)
                manifest = replace(manifest, prompts=replace(manifest.prompts, quality=found))
                manifest = _judge_prompts(folder, manifest, probe, options)
                write_manifest(folder, manifest)  # the answers are those of what is left
            quality = measure_quality(folder, manifest, source.examples, unrounded, probe)
            manifest = replace(manifest, quality=quality)
            manifest = _judge(folder, manifest, options)
            write_manifest(folder, manifest)
        report("reading the bundle back")
        read_back(folder)
    report(f"wrote {out}")
    return manifest


def _pack(graph: ir.Model, module: nn.Module, source: Source, weights: WeightFile) -> int:
    """Writes the weights of one graph and points its initializers at them; returns the bytes of its matrices."""
    keys = {}
    matrices = 0
    for name, owner in bar(list(owners(module)), "module"):
        for tensor, key in weights.add_module(owner, f"{module.prefix}{name}".strip("."), source.read).items():
            keys[f"{name}.{tensor}".strip(".")] = key
            matrices += weights.entries[key].nbytes if name else 0  # a graph's own tensors are rotary tables
    weights.attach(graph.graph, keys)
    return matrices


def _write_quantized_loops(
    folder: Path, manifest: Manifest, specs: dict[str, GraphSpec], weights: WeightFile, probe: Probe
) -> None:
    longest = max(len(passage.ids) for passage in probe.passages)
    rows = collect_rows(open_runner(folder, manifest, longest), probe, manifest.model.trained_loops)
    for kind in KV_CACHES[1:]:
        for layer_idx, (keys, values) in enumerate(rows):
            scales = key_scales(keys, kind), value_scales(values, kind)
            for key, scale in zip(scale_keys(kind, layer_idx), scales, strict=True):
                weights.add(key, torch.from_numpy(scale))
        for graph in (loop_graph, prompt_graph):
            name = graph(kind)
            if name in specs:
                write_quantized_loop(
                    folder / f"{graph('float')}.onnx", folder / f"{name}.onnx", kind, specs[name], weights
                )


def _verify_twin(source: Source, out: Path, options: ExportOptions) -> Parity | None:
    """Parity of the same graphs in float32, from weights rounded as the bundle's are; in a folder that disappears."""
    dtype = getattr(torch, options.dtype)
    rounded = replace(source, read=lambda name: source.read(name).to(dtype).float(), notes=())
    precision = "float32" if options.precision in ACTIVATIONS else options.precision
    with partial_folder(out.parent, out.name) as place:
        options = replace(options, precision=precision, activations=None, prompts="none", report=lambda _: None)
        twin = export_source(rounded, place / "twin", options)
    return twin.parity


def _judge(folder: Path, manifest: Manifest, options: ExportOptions) -> Manifest:
    """The manifest without the quantized KV caches that cost more than is allowed, which leave the folder too.

    Raises:
        LossError: the weights alone cost more.
    """
    assert manifest.quality is not None
    beyond = [kind for kind, found in manifest.quality.kv_cache.items() if not found.within_limit]
    if "float" in beyond and not options.allow_loss:
        raise LossError(describe_loss(manifest, "float"))
    for kind in beyond:
        if options.allow_loss:
            options.report(f"note: {describe_loss(manifest, kind)}")
            continue
        options.report(f"note: left out: {describe_loss(manifest, kind)}")
        manifest = _without(folder, manifest, {f"{graph(kind)}.onnx" for graph in (loop_graph, prompt_graph)})
    return manifest


def _judge_prompts(folder: Path, manifest: Manifest, probe: Probe, options: ExportOptions) -> Manifest:
    """The manifest without a copy for prompts that costs more than is allowed, unless the copy was asked for.

    Raises:
        LossError: it was.
    """
    prompts = manifest.prompts
    if prompts is None or prompts.quality is None or prompts.quality.loss.within_limit:
        return manifest
    said = describe_prompt_loss(prompts.quality.loss, probe.scored, probe.name)
    if options.allow_loss:
        options.report(f"note: {said}")
        return manifest
    if options.prompts == "int8":
        raise LossError(said)
    options.report(f"note: left out: {said}")
    copies = {f"{name}.onnx" for name in PROMPT_GRAPHS} | {PROMPT_WEIGHTS_NAME}
    return replace(_without(folder, manifest, copies), prompts=None)


def _without(folder: Path, manifest: Manifest, names: set[str]) -> Manifest:
    """The manifest without some files, which leave the folder, and the graphs among them."""
    left = names & manifest.files.keys()
    for name in left:
        (folder / name).unlink()
    graphs = {name: spec for name, spec in manifest.graphs.items() if f"{name}.onnx" not in left}
    files = {name: entry for name, entry in manifest.files.items() if name not in left}
    return replace(manifest, graphs=graphs, files=files)


def _describe(formats: dict[str, WeightFormat], options: ExportOptions) -> Quantization:
    """What the manifest says of the rounding."""
    kinds = sorted(
        {f"{form.precision} block {form.block}" if form.bits else form.precision for form in formats.values()}
    )
    return Quantization(tuple(kinds), dict(options.layers), options.rounding)


def write_text_files(source: Source, folder: Path) -> None:
    """Writes tokenizer, chat template and generation defaults; an empty template says that there is none."""
    (folder / TOKENIZER_NAME).write_text(source.tokenizer, encoding="utf-8")
    (folder / CHAT_TEMPLATE_NAME).write_text(source.chat_template, encoding="utf-8")
    write_generation_config(folder / GENERATION_CONFIG_NAME, source.generation)


def _producer() -> dict[str, str]:
    names = ("melt-onnx", "torch", "onnx", "onnxscript", "transformers")
    return {name: importlib.metadata.version(name) for name in names}
