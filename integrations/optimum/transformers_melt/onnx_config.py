"""What optimum asks of a model that it exports, for MELT; and the folder as any decoder's."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnxruntime import InferenceSession
from optimum.exporters.onnx.config import TextDecoderWithPositionIdsOnnxConfig
from optimum.exporters.onnx.model_patcher import ModelPatcher
from optimum.exporters.tasks import TasksManager
from optimum.utils import DummyTextInputGenerator, MistralDummyPastKeyValuesGenerator, NormalizedTextConfig
from transformers import GemmaConfig, PreTrainedTokenizerFast
from transformers.utils import logging

from transformers_melt.modeling import MeltConfig, MeltForCausalLM

LOOPS_KEY = "melt.loops"
"""Key of the graph's metadata that says how many loops it runs."""


class MeltPatcher(ModelPatcher):
    """Takes the depth from ``--model-kwargs '{"loops": 2}'``.

    Raises:
        ValueError: another keyword, or a depth that the model cannot have.
    """

    def __init__(self, config: "MeltOnnxConfig", model: MeltForCausalLM, model_kwargs: dict[str, Any] | None = None):
        given = dict(model_kwargs or {})
        loops = given.pop("loops", model.config.total_ut_steps)
        if given:
            raise ValueError(f"--model-kwargs of a MELT model knows only loops, got {', '.join(map(repr, given))}")
        model.config.require_plain(loops)
        model.config.total_ut_steps = loops
        super().__init__(config, model)


@TasksManager.create_register("onnx")("melt", "text-generation", "text-generation-with-past")
class MeltOnnxConfig(TextDecoderWithPositionIdsOnnxConfig):
    """Inputs, outputs and caches of a plain decoder with grouped queries."""

    DUMMY_INPUT_GENERATOR_CLASSES = (DummyTextInputGenerator, MistralDummyPastKeyValuesGenerator)
    DUMMY_PKV_GENERATOR_CLASS = MistralDummyPastKeyValuesGenerator
    NORMALIZED_CONFIG_CLASS = NormalizedTextConfig
    ATOL_FOR_VALIDATION = 1e30  # optimum's is absolute: it checks names and shapes, `require_parity` the numbers
    _MODEL_PATCHER = MeltPatcher

    def post_process_exported_models(
        self,
        path: Path,
        models_and_onnx_configs: dict[str, tuple[MeltForCausalLM, "MeltOnnxConfig"]],
        onnx_files_subpaths: list[str],
    ) -> tuple[dict[str, tuple[MeltForCausalLM, "MeltOnnxConfig"]], list[str]]:
        """Describes the folder as a plain decoder's, so that it opens where MELT is not installed."""
        done = super().post_process_exported_models(path, models_and_onnx_configs, onnx_files_subpaths)
        model = next(iter(models_and_onnx_configs.values()))[0]
        config = model.config
        for name in done[1]:
            require_parity(Path(path) / name, model)
            write_loops(Path(path) / name, config.total_ut_steps)
        plain_config(config).save_pretrained(path)
        read_tokenizer(config._name_or_path).save_pretrained(path)
        return done


def require_parity(path: Path, model: MeltForCausalLM) -> None:
    """Holds what a graph computes of some tokens, one padded, against torch.

    Raises:
        ValueError: logits, keys or values differ by more than is allowed of their magnitude.
    """
    config = model.config
    ids = torch.arange(1, 18)[None] * 31 % config.vocab_size
    mask = torch.ones_like(ids)
    mask[:, 0] = 0
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    session = InferenceSession(path, providers=["CPUExecutionProvider"])
    empty = np.zeros((1, config.num_key_value_heads, 0, config.head_dim))
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": places}
    types = {tensor.name: _TYPES[tensor.type] for tensor in session.get_inputs()}
    feeds = {name: np.asarray(given.get(name, empty), dtype=dtype) for name, dtype in types.items()}
    with torch.no_grad():
        torchs = model(**{name: tensor.to(model.device) for name, tensor in given.items()})
    expected = {"logits": torchs.logits}
    for layer_idx, (keys, values) in enumerate(torchs.past_key_values.to_legacy_cache()):
        expected |= {f"present.{layer_idx}.key": keys, f"present.{layer_idx}.value": values}
    names = [tensor.name for tensor in session.get_outputs()]
    for name, actual in zip(names, session.run(names, feeds), strict=True):
        wanted = expected[name].cpu().float().numpy()
        error, allowed = np.abs(actual - wanted).max(), _TOLERANCES[actual.dtype.name] * np.abs(wanted).max()
        if not error <= allowed:  # written so that NaN fails too
            raise ValueError(f"{path.name} and torch differ in {name} by {error:.3g}, tolerance {allowed:.3g}")


_TYPES = {"tensor(int64)": "int64", "tensor(float)": "float32", "tensor(float16)": "float16"}
_TOLERANCES = {"float32": 1e-3, "float16": 4e-2}
"""Share of the largest magnitude that ONNX Runtime and torch may differ by, as in our own export."""


def plain_config(config: MeltConfig) -> GemmaConfig:
    """The configuration of a decoder with MELT's shape.

    ``gemma`` it is, since of the decoders that ``ORTModelForCausalLM`` knows it takes the head size and the number of
    key/value heads from the configuration. The equations are those of the graph.
    """
    same = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta"),
        *("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
    )
    values = {name: getattr(config, name) for name in same}
    melt = {"loops": config.total_ut_steps, "gate_kind": config.gate_kind}
    return GemmaConfig(**values, hidden_act="silu", melt=melt)


def write_loops(path: Path, loops: int) -> None:
    """Adds the number of loops to a graph's metadata; weights beside it are not touched."""
    model = onnx.load(path, load_external_data=False)
    onnx.helper.set_model_props(model, {LOOPS_KEY: str(loops)})
    onnx.save(model, path)


def read_tokenizer(checkpoint: str) -> PreTrainedTokenizerFast:
    """A checkpoint's tokenizer under the class name that transformers 4 has for it; 5 writes ``TokenizersBackend``."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # the warning that the two names differ
    try:
        return PreTrainedTokenizerFast.from_pretrained(checkpoint)
    finally:
        logging.set_verbosity(level)
