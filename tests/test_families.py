"""L3: published checkpoints of other families: Ouro against its equations, Llama against transformers; and faults."""

import json

import numpy as np
import pytest
import torch
from conftest import MELT_TINY
from published import OURO, ouro_forward, ouro_tensors, write_ouro
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tolerances import TORCH, assert_choices, assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from melt_export.bundle import ExportOptions, export_bundle
from melt_export.generation import read_generation
from melt_export.source import ExportError, checkpoint_source
from melt_models import CheckpointError, MeltConfig, load_checkpoint
from melt_models.checkpoint import Checkpoint, read_config
from melt_models.configuration_form import FIELDS
from melt_models.convert import looplm_to_melt
from melt_models.families import READERS, read_llama, read_ouro
from melt_models.model_types import KNOWN_TYPES
from melt_runtime import MeltModel

IDS = [5, 700, 3, 3, 250, 17, 42, 0, 99, 511, 8, 640]


@pytest.fixture(scope="module")
def ouro(tmp_path_factory):
    return write_ouro(tmp_path_factory.mktemp("ouro") / "checkpoint")


@pytest.fixture(scope="module")
def ouro_bundle(ouro):
    lines = []
    export_bundle(ouro, ouro.parent / "bundle", ExportOptions(report=lines.append))
    return ouro.parent / "bundle", lines


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kv_heads", [4, 2])
@torch.no_grad()
def test_ouro_follows_its_equations(tmp_path, shards, kv_heads):
    """Logits and exit gate after every loop, whatever the chunk: a LoopLM's chunks do not change its numbers."""
    values = {**OURO, "num_key_value_heads": kv_heads}
    tensors = ouro_tensors(values)
    model = load_checkpoint(write_ouro(tmp_path, shards, tensors, num_key_value_heads=kv_heads)).float()
    logits, exits = ouro_forward(tensors, values, IDS)
    for chunk in (len(IDS), 5, 1):
        out = model(torch.tensor([IDS]), chunk_size=chunk)
        for loop_idx, expected in enumerate(logits):
            assert_close(model.lm_head(out.loop_hidden_states[loop_idx])[0], expected, TORCH)
        assert_close(out.exit_logits[0].sigmoid(), torch.stack(exits, -1), TORCH)


def test_an_ouro_bundle_follows_its_equations(ouro_bundle):
    """The exported graphs, driven in chunks and token by token: a cache for every loop."""
    folder, _ = ouro_bundle
    logits, exits = ouro_forward(ouro_tensors(OURO), OURO, IDS)
    model = MeltModel.load(folder, device="cpu", capacity=64, chunk=4)
    assert model.manifest.model.cache_kind == "per_loop"
    runner = model.new_runner()
    given: list[float] = []
    actual = runner.prefill(IDS[:8], 4)
    assert_close(actual, logits[-1][7])
    for position in range(8, len(IDS)):
        given.clear()
        observe = lambda _: given.append(runner.flight.exit_logits[0])  # noqa: E731
        actual = runner.decode([IDS[position]], 4, observe=observe)[0]
        assert_close(actual, logits[-1][position])
        lambdas = 1 / (1 + np.exp(-np.array(given)))
        assert_close(lambdas, [float(gate[position]) for gate in exits])


def test_ouros_wrong_token_ids_are_corrected_and_said(ouro_bundle):
    folder, lines = ouro_bundle
    assert [line for line in lines if line.startswith("note: the special token ids")]
    assert json.loads((folder / "generation_config.json").read_text())["stop_ids"] == [2]
    config = Checkpoint(folder.parent / "checkpoint").config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)


def test_right_token_ids_are_left_alone(tmp_path):
    checkpoint = Checkpoint(write_ouro(tmp_path, bos_token_id=7, eos_token_id=8, pad_token_id=0))
    assert checkpoint.notes == ()
    assert (checkpoint.config.bos_token_id, checkpoint.config.eos_token_id) == (7, 8)


@pytest.mark.parametrize("stored", [{"bos_token_id": 0, "eos_token_id": 0}, {"eos_token_id": [0]}])
def test_the_same_error_beside_the_configuration_is_corrected(tmp_path, stored):
    """transformers wrote Ouro's generation_config.json from its config.json; a MELT made of it inherits the file."""
    folder = write_ouro(tmp_path / "ouro")
    (folder / "generation_config.json").write_text(json.dumps(stored))
    looplm_to_melt(Checkpoint(folder), tmp_path / "melt")
    for made in (folder, tmp_path / "melt"):
        source = checkpoint_source(made)
        assert source.generation.stop_ids == (2,)
        assert "eos 0 of Ouro's published generation_config.json is corrected to 2 (<|im_end|>)" in source.notes
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    assert checkpoint_source(folder).generation.stop_ids == (2, 0)


def test_an_exit_threshold_is_the_bundles(tmp_path):
    folder = write_ouro(tmp_path, early_exit_threshold=0.5, bos_token_id=1)
    checkpoint = Checkpoint(folder)
    assert not checkpoint.notes
    assert read_generation(folder, checkpoint.config, [])[0].exit_threshold == 0.5


def test_every_known_type_has_its_reader():
    assert tuple(READERS) == KNOWN_TYPES


def test_the_chat_template_gets_the_corrected_tokens(tmp_path):
    """Ouro's tokenizer_config.json names <|endoftext|> as its end of text, as its config.json does."""
    folder = write_ouro(tmp_path)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}{{ eos_token }}")
    end = Tokenizer.from_file(str(MELT_TINY / "tokenizer.json")).id_to_token(2)
    assert checkpoint_source(folder).chat_template.startswith(f'{{% set eos_token = "{end}" %}}')


def save_llama(folder, tied=True, **changes) -> LlamaForCausalLM:
    """A random Llama, as transformers saves it, with melt-tiny's tokenizer."""
    torch.manual_seed(0)
    shape = {
        **{"vocab_size": 703, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "head_dim": 16},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
        **{"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}, "initializer_range": 0.1},
    }
    model = LlamaForCausalLM(LlamaConfig(**{**shape, "tie_word_embeddings": tied, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes((MELT_TINY / "tokenizer.json").read_bytes())
    return model


@pytest.mark.parametrize("tied", [True, False, "another head is stored"])
@torch.no_grad()
def test_a_llama_is_a_model_with_one_loop(tmp_path, tied):
    theirs = save_llama(tmp_path / "llama", tied is not False)
    if tied == "another head is stored":
        tensors = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
        tensors["lm_head.weight"] += 0.1 * torch.randn(703, 64)
        save_file(tensors, tmp_path / "llama" / "model.safetensors", metadata={"format": "pt"})
        theirs = LlamaForCausalLM.from_pretrained(tmp_path / "llama").eval()
    ours = load_checkpoint(tmp_path / "llama")
    assert (ours.config.total_ut_steps, ours.config.norm_placement, ours.config.exit_gate) == (1, "pre", False)
    ids = torch.tensor([IDS])
    expected = theirs(ids).logits
    out = ours(ids, chunk_size=5)
    assert_close(out.logits, expected, TORCH)
    assert out.exit_logits is None
    manifest = export_bundle(tmp_path / "llama", tmp_path / "bundle")
    assert "exit_logit" not in {tensor.name for tensor in manifest.graphs["loop"].outputs}
    model = MeltModel.load(tmp_path / "bundle", device="cpu", capacity=96, chunk=7)
    runner = model.new_runner()
    assert model.state_bytes == runner.state.plan.total_bytes
    assert_close(runner.prefill(IDS, 1), expected[0, -1])
    tokens = [int(runner.state.logits.read().argmax())]
    while len(tokens) < 40:
        tokens.append(int(runner.decode([tokens[-1]], 1)[0].argmax()))
    # One pass of theirs over the whole text shows what it would choose after every token of it.
    chosen = theirs(torch.tensor([IDS + tokens])).logits[0, len(IDS) - 1 : -1]
    assert_choices(chosen, tokens)


def test_older_files_of_llama_load(tmp_path):
    """``rope_theta`` outside ``rope_parameters``, a tied head stored once more, rotary frequencies as weights."""
    model = save_llama(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values |= {"rope_theta": 5000.0, "rope_scaling": None, "rope_parameters": None, "trained_by": "someone"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.config.rope_theta == 5000.0
    assert checkpoint.notes == (
        "keys of config.json that mean nothing here are passed over: trained_by",
        "tensors that the model does not use are passed over: lm_head.weight, "
        "model.layers.0.self_attn.rotary_emb.inv_freq",
    )


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    ("change", "tied", "fault"),
    [
        (lambda head: head, True, None),
        (lambda head: head.float(), True, None),
        (lambda head: head * 1.25, False, None),
        (lambda head: torch.where(torch.arange(703)[:, None] == 702, -head, head), False, None),
        (lambda head: head[:-1].clone(), False, r"lm_head.weight has shape \[702, 64\], expected \[703, 64\]"),
    ],
)
def test_a_stored_head_counts_where_it_is_not_the_embedding(tmp_path, shards, change, tied, fault):
    tensors = ouro_tensors(OURO)
    tensors["lm_head.weight"] = change(tensors["model.embed_tokens.weight"].clone())
    folder = write_ouro(tmp_path / "ouro", shards, tensors, tie_word_embeddings=True)
    if fault:
        with pytest.raises(CheckpointError, match=fault):
            Checkpoint(folder)
        return
    checkpoint = Checkpoint(folder)
    assert checkpoint.config.tie_word_embeddings is tied
    assert any("config.json ties the head to the embedding, but" in note for note in checkpoint.notes) is not tied
    assert torch.equal(checkpoint.read("lm_head.weight").float(), tensors["lm_head.weight"].float())
    assert torch.equal(load_checkpoint(folder).lm_head.weight.float(), tensors["lm_head.weight"].float())
    looplm_to_melt(checkpoint, tmp_path / "melt")
    assert torch.equal(Checkpoint(tmp_path / "melt").read("lm_head.weight").float(), tensors["lm_head.weight"].float())


@pytest.mark.parametrize(
    ("changes", "left_out", "message"),
    [
        ({"tie_word_embeddings": True}, "model.embed_tokens.weight", "missing model.embed_tokens.weight"),
        ({"tie_word_embeddings": False}, "lm_head.weight", "missing lm_head.weight"),
        ({}, None, "unexpected model.layers.0.self_attn.q_proj.bias"),
    ],
)
def test_tensors_that_contradict_the_configuration_are_named(tmp_path, changes, left_out, message):
    tensors = ouro_tensors(OURO)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    tensors.pop(left_out, None)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(write_ouro(tmp_path, tensors=tensors, **changes))


def test_weights_that_transformers_would_read_in_their_place_are_named(tmp_path):
    """A file beside shards that do not name it, which transformers prefers; an adapter, which it applies."""
    folder = write_ouro(tmp_path, 2)
    save_file(ouro_tensors(OURO, seed=1), folder / "model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="adapters are not applied") as raised:
        Checkpoint(folder)
    assert "model.safetensors stands beside model.safetensors.index.json, which does not name it" in str(raised.value)


@pytest.mark.parametrize("model_type", ["llama", "ouro"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("num_loops", 3), ("n_loops", 2), ("mean_recurrence", 32), ("num_recurrent_layers", 1), ("loop_window", 64)),
        *(("recurrent_depth", 8.0), ("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0)),
        *(("logit_scale", 0.0625), ("embedding_multiplier", 12.0), ("residual_multiplier", 0.22), ("qk_norm", True)),
        *(("partial_rotary_factor", 0.5), ("pretraining_tp", 2), ("num_experts", 8), ("hidden_activation", "gelu")),
        *(
            ("norm_type", "layernorm"),
            ("use_rope", False),
            ("num_loops", True),
            ("alibi", 1),
            ("compression", {"a": 1}),
            ("_num_loops", 4),
            ("_remove_final_layer_norm", True),
            ("scale_attn_weights", False),
        ),
    ],
)
def test_no_key_that_may_change_what_is_computed_is_passed_over(model_type, key, value):
    faults: list[str] = []
    READERS[model_type]({**OURO, "model_type": model_type, key: value}, "config.json", faults)
    assert [fault for fault in faults if fault.startswith(f"config.json: {key} ") and f"got {value!r}" in fault]


def test_loops_under_a_type_without_loops_are_refused():
    for number, faults in ((1, []), (4, ["config.json: total_ut_steps must be 1, got 4"])):
        found: list[str] = []
        read_llama({**OURO, "model_type": "llama", "total_ut_steps": number}, "config.json", found)
        assert [fault.split(":")[0] + ":" + fault.split(":")[1] for fault in found] == faults


@pytest.mark.parametrize("name", ["num_loops", "n_loops", "recurrent_depth"])
def test_another_name_of_the_loops_contradicts_nothing(name):
    for model_type, loops in (("ouro", OURO["total_ut_steps"]), ("llama", 1)):
        for number in (1, loops, loops + 1):
            values, faults = {**OURO, "model_type": model_type, "total_ut_steps": loops, name: number}, []
            READERS[model_type](values, "config.json", faults)
            wrong = f"config.json: {name} must be {loops}, got {number}"
            assert [fault.split(":")[0] + ":" + fault.split(":")[1] for fault in faults] == [wrong] * (number != loops)


def test_no_private_key_of_our_own_files_is_passed_over():
    faults: list[str] = []
    READERS["melt"](
        {"model_type": "melt", "_name_or_path": "x", "_model_name_or_path": "y", "_num_loops": 4}, "config.json", faults
    )
    assert faults == ["config.json: unknown configuration keys ['_num_loops']: remove them or correct their spelling"]


@pytest.mark.parametrize("model_type", ["llama", "ouro"])
def test_keys_that_ask_for_nothing_pass(model_type):
    nothing = {
        **{
            "recurrent_depth": OURO["total_ut_steps"] if model_type == "ouro" else 1,
            "num_loops": None,
            "attn_logit_softcapping": None,
            "qk_norm": False,
            "stop_layers": [],
            "note": "",
        },
        **{"logit_scale": 1, "num_experts": 0, "pretraining_tp": 1, "early_exit_threshold": 1.0},
        **{"return_dict": True, "id2label": {"0": "A"}, "temperature": 0.7, "unsloth_version": "2024.9"},
        **{"_attn_implementation": "eager", "classifier_dropout": 0.1, "is_causal": True},
    }
    values = {**OURO, **nothing, "model_type": model_type, "auto_map": None}
    faults: list[str] = []
    if model_type == "llama":
        del values["total_ut_steps"]
    _, notes = READERS[model_type](values, "config.json", faults)
    assert faults == []
    passed = "attn_logit_softcapping, note, qk_norm, stop_layers, temperature, unsloth_version"
    assert f"keys of config.json that mean nothing here are passed over: {passed}" in notes


@pytest.mark.parametrize(
    "values", [{}, {"eos_token_id": None, "head_dim": 64, "num_key_value_heads": None}, {"rope_scaling": None}]
)
def test_absent_keys_have_the_defaults_of_transformers(values):
    """Read from the library that is installed, so that both change together."""
    faults: list[str] = []
    read, _ = read_llama({"model_type": "llama", **values}, "config.json", faults)
    assert faults == []
    ours, theirs = MeltConfig(**read), LlamaConfig(**values)
    for name in ("rope_parameters", *(name for name in FIELDS if hasattr(theirs, name))):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.rope_theta == 10000.0


@pytest.mark.parametrize("name", ["rms_norm_eps", "max_position_embeddings", "vocab_size", "hidden_act"])
def test_null_where_transformers_takes_none_is_a_fault(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", name: None}))
    with pytest.raises(CheckpointError, match=f"{name} .*got None"):
        read_config(tmp_path)


@pytest.mark.parametrize("model_type", ["llama", "ouro", "melt"])
@pytest.mark.parametrize("places", [("rope_scaling",), ("rope_parameters",), ("rope_scaling", "rope_parameters")])
def test_a_scaling_that_is_not_implemented_is_one_fault(model_type, places):
    scaling = {
        **{"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "original_max_position_embeddings": 128,
    }
    values = {name: value for name, value in OURO.items() if not name.startswith("rope") and name != "total_ut_steps"}
    values |= {"model_type": model_type, "total_ut_steps": 1, **dict.fromkeys(places, scaling)}
    faults: list[str] = []
    READERS[model_type](values, "config.json", faults)
    rope = [fault for fault in faults if "rope" in fault]
    assert rope == [f"config.json: {places[0]} must be none or 'default', got 'llama3': this kind is not implemented"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type must be one of melt, ouro, llama, got 'mamba'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling must be none or 'default', got 'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "got 'llama3': this kind is not implemented"),
        (
            {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor must be 1, got",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1.0, got 0.5"),
        ({"rope_theta": None}, "rope_theta is missing"),
        ({"sliding_window": 4096, "use_sliding_window": True}, "sliding_window must be none, got 4096"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "must all be 'full_attention', got 'sliding_attention' too",
        ),
        ({"total_ut_steps": None}, "total_ut_steps is missing"),
        ({"hidden_size": None, "vocab_size": None}, "vocab_size is missing\n  config.json: hidden_size is missing"),
        ({"attention_bias": True}, "attention_bias must be False, got True"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"the weights are quantized \('gptq'\)"),
        ({"total_ut_steps": 0}, "total_ut_steps must be at least 1, got 0"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"intermediate_size": 97}, r"mlp.gate_proj.weight has shape \[96, 64\], expected \[97, 64\]"),
    ],
)
def test_what_is_not_implemented_is_refused(tmp_path, changes, message):
    folder = write_ouro(tmp_path / "checkpoint", **changes)
    with pytest.raises(CheckpointError, match=message):
        export_bundle(folder, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


DEFAULT = {"rope_type": "default", "rope_theta": 1e6}
PER_LAYER = {"full_attention": DEFAULT, "sliding_attention": DEFAULT}


@pytest.mark.parametrize("model_type", ["llama", "ouro", "melt"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": DEFAULT},
            "rope_scaling must be none or 'default', got 'linear': this kind is not implemented",
        ),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": DEFAULT},
            "rope_scaling must be none or 'default', got 'linear': this kind is not implemented",
        ),
        (
            {"rope_scaling": {"rope_type": "default", "type": "yarn"}},
            "rope_scaling must be none or 'default', got 'yarn': this kind is not implemented",
        ),
        (
            {"rope_scaling": {"type": "default"}, "rope_parameters": {**DEFAULT, "type": "dynamic"}},
            "rope_parameters must be none or 'default', got 'dynamic': this kind is not implemented",
        ),
        ({"rope_parameters": PER_LAYER}, "rope_parameters must have no 'full_attention', got {'rope_theta'"),
        ({"rope_parameters": {**DEFAULT, "factor": 8.0}}, "rope_parameters must have no 'factor', got 8.0"),
        ({"rope_parameters": {**DEFAULT, "theta": {"a": 1}}}, "rope_parameters must have no 'theta', got {'a': 1}"),
        (
            {"rope_theta": 1e4, "rope_parameters": DEFAULT},
            "rope_theta must be the same wherever it stands, got 10000.0, 1000000.0",
        ),
    ],
)
def test_no_word_on_positions_is_dropped(model_type, changes, message):
    """Older files and newer ones say it in other places; where both stand, neither hides the other."""
    faults: list[str] = []
    READERS[model_type]({**OURO, "rope_theta": 1e6, **changes}, "config.json", faults)
    assert [fault for fault in faults if f"config.json: {message}" in fault]


@pytest.mark.parametrize(
    "changes", [{"rope_scaling": {"type": "default"}, "rope_theta": 1e6}, {"rope_scaling": DEFAULT}]
)
@pytest.mark.parametrize("model_type", ["llama", "ouro", "melt"])
def test_the_same_word_on_positions_may_stand_twice(model_type, changes):
    values = {name: value for name, value in OURO.items() if name != "rope_theta"}
    parameters = {**DEFAULT, "type": "default", "partial_rotary_factor": 1.0}
    faults: list[str] = []
    read, _ = READERS[model_type]({**values, "rope_parameters": parameters, **changes}, "config.json", faults)
    assert read["rope_parameters"] == DEFAULT
    assert [fault for fault in faults if "rope" in fault] == []


def test_a_configuration_made_in_code_drops_no_word_either():
    with pytest.raises(ValueError, match="rope_parameters.full_attention must not be there"):
        MeltConfig(rope_parameters=PER_LAYER)
    assert MeltConfig(rope_scaling={"type": "default"}, rope_theta=5000.0).rope_theta == 5000.0


def test_a_window_that_is_switched_off_is_none(tmp_path):
    assert Checkpoint(write_ouro(tmp_path, sliding_window=4096, use_sliding_window=False)).config.total_ut_steps == 4


def test_damaged_weights_are_found_before_anything_is_made(tmp_path):
    tensors = ouro_tensors(OURO)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4:6] = torch.nan
    tensors["lm_head.weight"][0, 0] = -torch.inf
    folder = write_ouro(tmp_path / "checkpoint", 2, tensors)
    with pytest.raises(CheckpointError, match="is damaged, fetch it again") as error:
        export_bundle(folder, tmp_path / "out")
    assert "model.layers.1.mlp.up_proj.weight: 2 of 6144 weights are infinite or not a number" in str(error.value)
    assert "lm_head.weight: 1 of 44992 weights" in str(error.value)
    assert not list(tmp_path.glob("*out*"))


def test_quantized_tensors_are_refused(tmp_path):
    tensors = ouro_tensors(OURO)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
    with pytest.raises(CheckpointError, match="lm_head.weight has type F8_E4M3, expected one of F32, BF16, F16"):
        Checkpoint(write_ouro(tmp_path, tensors=tensors))


def test_missing_shards_are_named(tmp_path):
    folder = write_ouro(tmp_path, 3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing weight file model-00002-of-00003.safetensors"):
        Checkpoint(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(CheckpointError, match="is not an index of shards"):
        Checkpoint(folder)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    tensors = ouro_tensors({**OURO, "vocab_size": 300})
    folder = write_ouro(tmp_path / "checkpoint", tensors=tensors, vocab_size=300)
    with pytest.raises(ExportError, match="tokenizer.json has token id [0-9]+, but vocab_size is 300"):
        export_bundle(folder, tmp_path / "out")


@pytest.mark.parametrize("read", [read_ouro, read_llama])
def test_readers_report_all_faults_at_once(read):
    faults: list[str] = []
    read({"sliding_window": 8, "rope_scaling": {"type": "linear"}, "rope_theta": "4"}, "config.json", faults)
    assert "config.json: rope_theta must be a valid number, got '4'" in faults
    # Ouro's file has no defaults here; that rope_theta is missing would be a false fault more.
    assert len(faults) == 3 + (8 if read is read_ouro else 0)


def test_placement_and_exit_gate_are_part_of_the_configuration():
    with pytest.raises(ValueError, match="norm_placement must be 'sandwich' or 'pre', got 'post'"):
        MeltConfig(norm_placement="post")
