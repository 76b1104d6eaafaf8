"""Which rounding, and which layers at 8 bits? Weight rounding alone, in torch, beside the float32 checkpoint.

    python benchmarks/quantization.py models/melt-tiny

Activations stay float32 here, so that methods differ by their weights only. GPTQ and k-quant are ONNX Runtime's own
(``onnxruntime.quantization``); GPTQ sees the inputs that each matrix gets over the whole evaluation, loop after loop.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before the next import
from onnxruntime.quantization.neural_compressor.weight_only import gptq, quant_tensor_k_quant_cpu
from torch import Tensor, nn

from melt_export.bundle import write_text_files
from melt_export.formats import weight_formats
from melt_export.probe import Probe, choose_probe
from melt_export.quality import compare, trace_reference
from melt_export.quantize import dequantize_blocks, quantize_blocks
from melt_export.reference import reference_model
from melt_export.source import Source, checkpoint_source
from melt_models.checkpoint import empty_model

Method = Callable[[str, Tensor, int, int], Tensor]
"""Name, weight [N, K], bits, block -> the weight as rounded."""

LAYERS = {
    "all 4 bit": {},
    "gates 8 bit": {"*.gate.*": "int8"},
    "attention 8 bit": {"*.self_attn.*": "int8"},
    "keys and values 8 bit": {"*.k_proj": "int8", "*.v_proj": "int8"},
    "MLP 8 bit": {"*.mlp.*": "int8"},
    "down_proj 8 bit": {"*.down_proj": "int8"},
    "first layer 8 bit": {"model.layers.0.*": "int8"},
    "last layer 8 bit": {"model.layers.{last}.*": "int8"},
    "embedding and head 8 bit": {"model.embed_tokens": "int8", "lm_head": "int8"},
    "all 8 bit": {"*": "int8"},
}


def main() -> int:
    """Prints two tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--eval-text", type=Path, help="default: the checkpoint's own evaluation")
    args = parser.parse_args()
    source = checkpoint_source(args.checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        write_text_files(source, Path(folder))
        probe = choose_probe(source, Path(folder), args.eval_text and args.eval_text.read_text(encoding="utf-8"))
    study = Study(source, probe)
    loops = range(1, source.config.total_ut_steps + 1)
    header = (
        f"bits a weight | {' | '.join(f'error after loop {loop}, %' for loop in loops)} | KL | first choice equal, % |"
    )
    print(f"{args.checkpoint}, {probe.scored} tokens of {probe.name}\n")
    print(f"| rounding | {header}\n{'|---' * (len(loops) + 4)}|")
    hessians = study.collect_hessians()
    methods: dict[str, Method] = {
        "nearest": lambda _, weight, bits, block: _ours(weight, bits, block, "nearest"),
        "search (ours)": lambda _, weight, bits, block: _ours(weight, bits, block, "search"),
        "k-quant": lambda _, weight, bits, block: _k_quant(weight, bits, block),
        "GPTQ": lambda name, weight, bits, block: _gptq(weight, bits, block, hessians.get(name), mse=False),
        "GPTQ, mse": lambda name, weight, bits, block: _gptq(weight, bits, block, hessians.get(name), mse=True),
    }
    for label, method in methods.items():
        print(study.row(label, method, {}), flush=True)
    print(f"\n| layers | {header}\n{'|---' * (len(loops) + 4)}|")
    for label, layers in LAYERS.items():
        last = str(source.config.num_hidden_layers - 1)
        chosen = {pattern.replace("{last}", last): precision for pattern, precision in layers.items()}
        print(study.row(label, methods["search (ours)"], chosen), flush=True)
    return 0


class Study:
    """A checkpoint, and what it gives in float32."""

    def __init__(self, source: Source, probe: Probe):
        self.source, self.probe = source, probe
        self.reference = trace_reference(reference_model(source.config, source.read), probe)

    def row(self, label: str, method: Method, layers: dict[str, str]) -> str:
        """Rounds the model one way and compares."""
        formats = weight_formats(empty_model(self.source.config), "int4", layers)
        bits = weights = 0

        def read(name: str) -> Tensor:
            nonlocal bits, weights
            tensor, form = self.source.read(name).float(), formats.get(name.removesuffix(".weight"))
            if form is None or not form.bits or not name.endswith(".weight"):
                return tensor
            bits += tensor.numel() * (form.bits + (36 if form.bits == 4 else 32) / form.block)
            weights += tensor.numel()
            return method(name, tensor, form.bits, form.block)

        found = compare(
            self.reference, trace_reference(reference_model(self.source.config, read), self.probe), self.probe
        )
        cells = [label, f"{bits / weights:.2f}"]
        cells += [f"{100 * error:.2f}" for error in found.hidden_error_by_loop.values()]
        cells += [f"{found.kl:.2g}", f"{100 * found.greedy_agreement:.1f}"]
        return f"| {' | '.join(cells)} |"

    def collect_hessians(self) -> dict[str, np.ndarray]:
        """Sums of outer products of every linear layer's inputs, [K, K], over all tokens and loops."""
        model = reference_model(self.source.config, self.source.read)
        sums: dict[str, np.ndarray] = {}

        def record(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
            def hook(module: nn.Module, inputs: tuple[Tensor]) -> None:
                x = inputs[0].flatten(0, -2).double()
                sums[name] = sums.get(name, 0) + (x.T @ x).numpy()

            return hook

        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(record(f"{name}.weight"))
        trace_reference(model, self.probe)
        return sums


def _ours(weight: Tensor, bits: int, block: int, rounding: str) -> Tensor:
    rounded = quantize_blocks(weight, bits, block, rounding)
    return dequantize_blocks(rounded["packed"], rounded["scales"], rounded.get("zeros"))


def _k_quant(weight: Tensor, bits: int, block: int) -> Tensor:
    codes, scales, zeros = quant_tensor_k_quant_cpu(weight.numpy(), bits, block)
    return torch.from_numpy(((codes - zeros) * scales).astype(np.float32)).view_as(weight)


def _gptq(weight: Tensor, bits: int, block: int, hessian: np.ndarray | None, mse: bool) -> Tensor:
    if hessian is None:  # an embedding has no inputs
        return _ours(weight, bits, block, "search")
    rounded = gptq(
        weight.T.numpy().astype(np.float64), hessian.copy(), bits, block, scheme="sym", blocksize=block, mse=mse
    )
    return torch.from_numpy(rounded.T.astype(np.float32))


if __name__ == "__main__":
    sys.exit(main())
