"""Writes one random-weight Llama in the peers' own formats; runs in their environment.

    build/peers/venv/bin/python benchmarks/peers/make_models.py SHAPE.json OUT

SHAPE.json has the keys of a Hugging Face Llama configuration. Made are OUT/hf (safetensors, bfloat16), OUT/q4_0.gguf
and OUT/q8_0.gguf (all matrices of one kind) and OUT/genai (the int4 that its own builder makes for the CPU).
"""

import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def main() -> int:
    """Makes what is not there yet."""
    shape, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(**shape, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    if not (out / "hf" / "tokenizer.json").is_file():
        torch.manual_seed(0)
        LlamaForCausalLM(config).bfloat16().save_pretrained(out / "hf")
        tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(config.vocab_size)}, unk_token="t0"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t1").save_pretrained(out / "hf")
    for kind in ("Q4_0", "Q8_0"):
        path = out / f"{kind.lower()}.gguf"
        if not path.is_file():
            write_gguf(config, LlamaForCausalLM.from_pretrained(out / "hf", dtype=torch.float32), path, kind)
    if not (out / "genai" / "genai_config.json").is_file():
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(out / "hf"), "-e", "cpu"]
        builder += ["-o", str(out / "genai"), "-p", "int4", "-c", str(out / "cache")]
        subprocess.run([*builder, "--extra_options", "int4_accuracy_level=4"], check=True, stdout=sys.stderr)
    return 0


def write_gguf(config: LlamaConfig, model: LlamaForCausalLM, path: Path, kind: str) -> None:
    """Writes the model with every matrix, embedding and head included, of one kind."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float().numpy().astype(np.float32)
        place = names.get_name(name, try_suffixes=(".weight",))
        if values.ndim == 1:
            writer.add_tensor(place, values)
        else:
            raw = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(place, gguf.quants.quantize(values, raw), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    sys.exit(main())
