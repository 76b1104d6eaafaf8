"""The loops for passes of several rows: which passes run them, what they compute, what is refused."""

import json
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from conftest import MELT_TINY, random_model, save_checkpoint
from tolerances import assert_close

from melt_export.bundle import ExportOptions, export_bundle
from melt_export.cli import main as export_main
from melt_export.formats import FormatError, WeightFormat, prompt_formats, weight_formats
from melt_export.limits import LossError
from melt_export.quantize import dequantize_columns, quantize_columns
from melt_export.stored import ColumnLinear, Matrix
from melt_export.tolerances import PARITY
from melt_models import load_checkpoint
from melt_models.checkpoint import CheckpointError
from melt_models.evaluation import EVALUATION_NAME
from melt_models.modeling import KVCache
from melt_runtime import BundleError, MeltModel, read_manifest
from melt_runtime.bundle.contract import KV_CACHES, prompt_graph
from melt_runtime.cli.main import main
from melt_runtime.device import integers
from melt_runtime.device.integers import EXACT_PRODUCTS, extreme_weights
from melt_runtime.device.providers import choose_provider, session_options
from melt_runtime.loading.load_cache import LoadCache
from melt_runtime.loading.opening import open_sessions
from melt_runtime.memory.estimate import format_plan, plan_memory

PROMPT = [(7 * place) % 650 for place in range(50)]


def sessions_of(bundle):
    return open_sessions(bundle, read_manifest(bundle), choose_provider("cpu", "float32"))


def test_a_column_of_weights_shares_a_scale():
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(0))
    weight[7] = 0  # an output that is always zero
    codes, scales = quantize_columns(weight)
    assert codes.dtype == torch.int8
    assert codes.shape == (96, 40)
    assert int(codes.abs().max()) == 127
    assert scales[7] == 0
    assert not codes[:, 7].any()
    step = weight.abs().amax(1, keepdim=True) / 127
    assert bool(((dequantize_columns(codes, scales) - weight).abs() <= step / 2 * (1 + 1e-5)).all())


@pytest.mark.parametrize("kind", KV_CACHES)
def test_rows_are_rounded_once_for_all_that_reads_them(random_bundle, kind):
    """Six products a gated layer, of six different rows; norms, attention and the gate stay as they are."""
    graph = onnx.load(random_bundle("int4", prompts="int8") / f"{prompt_graph(kind)}.onnx", load_external_data=False)
    count = Counter(node.op_type for node in graph.graph.node)
    assert count["MatMulIntegerToFloat"] == count["QuantizeLinear"] == count["ReduceMax"] == 6 * 3
    assert count["MatMulNBits"] == 0
    assert count["GroupQueryAttention"] == 3


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_passes_of_many_rows_run_it(random_bundle, precision):
    sessions = sessions_of(random_bundle(precision, prompts="int8"))
    first = sessions.prompt_rows
    assert 2 <= first <= 16
    assert sessions.loop_for(1) is sessions.loop_for(first - 1) is sessions.loop
    assert sessions.loop_for(first) is sessions.loop_for(512) is sessions.prompts
    without = sessions_of(random_bundle(precision, prompts="none"))
    assert without.prompts is None
    assert without.loop_for(512) is without.loop


def test_int8_bundles_have_it_unless_told_otherwise(random_bundle):
    assert read_manifest(random_bundle("int8")).prompts is not None
    assert read_manifest(random_bundle("int8", prompts="none")).prompts is None
    assert read_manifest(random_bundle("int4")).prompts is None
    assert read_manifest(random_bundle("float32")).prompts is None
    assert read_manifest(random_bundle("int8", activations="float16")).prompts is None


@pytest.mark.parametrize("changes", [{}, {"gate_kind": "none"}])
def test_a_prompt_is_what_the_copy_of_the_weights_says(random_bundle, changes):
    """A prompt of few rows is the very one of a bundle without the copy; one of many is near it, and another."""
    bundle = random_bundle("int8", prompts="int8", **changes)
    own = random_bundle("int8", prompts="none", **changes)
    both, one = (MeltModel.load(folder, device="cpu", capacity=128) for folder in (bundle, own))
    short, long = PROMPT[:5], PROMPT[:48]
    np.testing.assert_array_equal(both.new_runner().prefill(short, 4), one.new_runner().prefill(short, 4))
    ours, theirs = both.new_runner().prefill(long, 4), one.new_runner().prefill(long, 4)
    assert not np.array_equal(ours, theirs)
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.98  # two roundings of the same weights


@torch.no_grad()
def test_activations_are_rounded_row_by_row(tmp_path):
    """Torch with the same rounding of weights and rows is far nearer than torch with that of the weights alone."""
    model = random_model(norm_placement="pre")
    bundle = tmp_path / "bundle"
    export_bundle(save_checkpoint(model, tmp_path / "checkpoint"), bundle, ExportOptions("int8", verified=False))
    linears = [layer for layer in model.model.layers.modules() if isinstance(layer, torch.nn.Linear)]
    for linear in linears:
        linear.weight.copy_(dequantize_columns(*quantize_columns(linear.weight)))
    sessions = sessions_of(bundle)
    model.model.embed_tokens.weight.copy_(  # as the bundle's own blocks of 8 bits have them
        torch.from_numpy(sessions.embed.run(["hidden"], {"ids": np.arange(703)[None]})[0][0])
    )
    found = MeltModel.load(bundle, device="cpu", capacity=64).new_runner()
    found.prefill(PROMPT[:8], 1)
    hidden = found.flight.hidden

    def distance() -> float:
        states = model.model.forward_chunk(torch.tensor([PROMPT[:8]]), 1, KVCache(model.config))
        return float(np.linalg.norm(states[0][0].numpy() - hidden) / np.linalg.norm(hidden))

    weights_alone = distance()
    for linear in linears:
        linear.register_forward_pre_hook(lambda _, inputs: rounded(*inputs))
    assert distance() < 0.2 * weights_alone


def rounded(rows: torch.Tensor) -> torch.Tensor:
    """As the graph rounds activations: to 8 bits, with a scale for each row."""
    scale = rows.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    return (rows / scale).round() * scale


@pytest.mark.parametrize("decode", ["plain", "wave"])
def test_waves_batches_and_sessions_work_with_it(random_bundle, decode):
    model = MeltModel.load(random_bundle("int8", prompts="int8"), device="cpu", capacity=96, slots=8)
    settings = {"max_new_tokens": 6, "temperature": 0.0, "decode": decode}
    prompts = [PROMPT[place : place + 12 + place] for place in range(8)]
    together = [answer.token_ids for answer in model.generate_batch(prompts, **settings)]
    assert [len(ids) for ids in together] == [6] * 8
    session = model.new_session()
    assert len(session.generate(PROMPT[:20], **settings).token_ids) == 6


def test_a_copy_for_the_next_load_holds_it_too(random_bundle, tmp_path):
    bundle, cache = random_bundle("int4", prompts="int8"), LoadCache(tmp_path / "cache", min_bytes=0)
    fresh = MeltModel.load(bundle, device="cpu", capacity=64).new_runner().prefill(PROMPT, 4)
    for _ in range(2):
        loaded = MeltModel.load(bundle, device="cpu", capacity=64, cache=cache).new_runner().prefill(PROMPT, 4)
        np.testing.assert_array_equal(loaded, fresh)
    assert len(cache.entries()) == 3  # loop, prompts, head


def test_the_exact_kernels_give_the_same_numbers(random_bundle, tmp_path, monkeypatch):
    """As on a processor whose fast ones overflow: the weights are rewritten at load, and in the copy."""
    bundle = random_bundle("int4", prompts="int8")
    expected = MeltModel.load(bundle, device="cpu", capacity=64).new_runner().prefill(PROMPT, 4)
    monkeypatch.setattr("melt_runtime.device.providers.overflows", lambda: True)
    assert session_options().get_session_config_entry(EXACT_PRODUCTS[0]) == "1"
    cache = LoadCache(tmp_path / "cache", min_bytes=0)
    for _ in range(2):
        loaded = MeltModel.load(bundle, device="cpu", capacity=64, cache=cache).new_runner().prefill(PROMPT, 4)
        assert_close(loaded, expected, PARITY["quantized"])


def test_extreme_values_are_multiplied_exactly(tmp_path):
    """Through the graph as it ships, on the machine that runs this: rows of 255 and 1, weights of 127 and -127."""
    model = random_model(gate_kind="none", num_hidden_layers=1, total_ut_steps=1, norm_placement="pre")
    layer, width = model.model.layers[0], model.config.hidden_size
    weights = torch.from_numpy(extreme_weights(width, 32).T.copy()).float()
    with torch.no_grad():
        layer.input_layernorm.weight.fill_(1)
        layer.self_attn.v_proj.weight.copy_(weights)
        # Embeddings of one magnitude: after the norm every value is the row's largest or its negative.
        turns = torch.from_numpy(extreme_weights(width, 650).T.copy()).float() / 127
        model.model.embed_tokens.weight[:650].copy_(turns)
    bundle = tmp_path / "bundle"
    options = ExportOptions("int8", {"model.embed_tokens": "float32"}, verified=False)
    export_bundle(save_checkpoint(model, tmp_path / "checkpoint"), bundle, options)
    loaded = MeltModel.load(bundle, device="cpu", capacity=64)
    runner = loaded.new_runner()
    runner.prefill(PROMPT[:8], 1)
    (_, values), *_ = runner.state.caches[0]
    rows = values.values()[0, :, :8].swapaxes(0, 1).reshape(8, -1)
    assert_close(rows, turns[PROMPT[:8]] @ weights.T, PARITY["float32"])


def test_the_manifest_says_what_it_costs(random_bundle):
    bundle = random_bundle("int4", verified=True, prompts="int8")
    prompts = read_manifest(bundle).prompts
    assert prompts.weight_bytes == (bundle / "prompts.data").stat().st_size
    assert [run.kv_cache for run in prompts.parity.runs] == list(KV_CACHES)
    for run in prompts.parity.runs:
        assert all(found.error <= found.allowed for found in run.tensors.values())
        assert run.tensors["hidden"].error > 0
    own = read_manifest(bundle).quality.kv_cache["float"]
    assert list(prompts.quality.hidden_error_by_loop) == ["1", "2", "3", "4"]
    # The bundle's own weights have 4 bits, the copy 8: their difference is about what 4 bits cost.
    assert 0.3 * own.kl < prompts.quality.kl < 3 * own.kl
    plan = plan_memory(read_manifest(bundle), 64)
    assert plan.prompt_bytes == prompts.weight_bytes
    assert plan.total_bytes == plan.weight_bytes + plan.prompt_bytes + plan.state.total_bytes
    assert "for prompts" in format_plan(plan)


def outlier_checkpoint(folder, rows, reading, factor):
    """melt-tiny with one column of the rows that matrices read ``factor`` times as large, which the matrices undo.

    Nothing changes but that the column alone then says how a row is rounded.
    """
    model = load_checkpoint(MELT_TINY)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.get_submodule(rows).weight[3] *= factor
            for linear in reading:
                layer.get_submodule(linear).weight[:, 3] /= factor
    save_checkpoint(model, folder)
    shutil.copyfile(MELT_TINY / EVALUATION_NAME, folder / EVALUATION_NAME)
    return folder


def measure_little(monkeypatch) -> None:
    """Exports read a few of melt-tiny's examples, and let it answer none."""
    monkeypatch.setattr("melt_export.quality.exact_match", lambda *_: {})
    monkeypatch.setattr("melt_export.probe._EXAMPLES", 8)


def test_a_column_that_is_large_in_every_row_costs_nothing(tmp_path, monkeypatch):
    """Half of its range moves to the weights."""
    measure_little(monkeypatch)
    reading = ["mlp.gate_proj", "mlp.up_proj"]
    checkpoint = outlier_checkpoint(tmp_path / "checkpoint", "post_attention_layernorm", reading, 300)
    options = ExportOptions("int8", block=32, quantized_caches=False)
    loss = export_bundle(checkpoint, tmp_path / "bundle", options).prompts.quality.loss
    plain = export_bundle(MELT_TINY, tmp_path / "plain", options).prompts.quality.loss
    assert loss.within_limit
    for loops, error in loss.hidden_error_by_loop.items():
        assert error < 2 * plain.hidden_error_by_loop[loops]


def test_smoothing_is_undone_by_the_weights():
    draw = torch.Generator().manual_seed(0)
    weight, rows = torch.randn(40, 96, generator=draw), torch.randn(64, 96, generator=draw)
    rows[:, 5] *= 300
    rows[:, 6], weight[:, 5], weight[:, 7] = 0, weight[:, 5] / 300, 0
    errors = []
    for smoothed in (True, False):
        column = ColumnLinear(Matrix(("q_proj",), (40,), 96, WeightFormat("int8")), smoothed)
        column.peaks = rows.abs().amax(0)
        packed = column.pack(lambda _: weight)
        factors = packed.get("smoothing", torch.ones(96))
        assert bool((factors > 0).all() and factors.isfinite().all())
        restored = column.unpack(packed.__getitem__, slice(None))
        product = rounded(rows * factors) @ (restored / factors).T
        errors.append(float((product - rows @ weight.T).norm() / (rows @ weight.T).norm()))
    assert errors[0] < 0.02 < 10 * errors[0] < errors[1]


def test_a_copy_that_costs_too_much_is_left_out(tmp_path, monkeypatch):
    measure_little(monkeypatch)
    checkpoint, notes = outlier_checkpoint(tmp_path / "checkpoint", "mlp.up_proj", ["mlp.down_proj"], 3000), []
    options = ExportOptions("int8", block=32, quantized_caches=False, report=notes.append)
    manifest = export_bundle(checkpoint, tmp_path / "bundle", options)
    assert manifest.prompts is None
    assert manifest.quality.kv_cache["float"].within_limit
    assert any("left out: the copy for prompts costs more than is allowed" in note for note in notes)
    assert not list((tmp_path / "bundle").glob("prompts*"))
    assert read_manifest(tmp_path / "bundle") == manifest
    MeltModel.load(tmp_path / "bundle", device="cpu")
    with pytest.raises(LossError, match="--prompts none"):
        export_bundle(checkpoint, tmp_path / "asked", replace(options, prompts="int8"))
    assert not (tmp_path / "asked").exists()
    kept = export_bundle(checkpoint, tmp_path / "kept", replace(options, allow_loss=True))
    assert not kept.prompts.quality.loss.within_limit


def test_a_file_of_no_copy_is_a_stranger(random_bundle, tmp_path):
    bundle = shutil.copytree(random_bundle("int4"), tmp_path / "bundle")
    values = json.loads((bundle / "manifest.json").read_text())
    values["files"]["prompts.data"] = values["files"]["weights.data"]
    (bundle / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(BundleError, match="files.prompts.data must be absent where prompts is null"):
        read_manifest(bundle)


def test_only_the_layers_have_a_copy():
    formats = weight_formats(random_model(), "int4", {"*.u_z": "float32"})
    copies = prompt_formats(formats)
    assert copies["model.layers.0.mlp.up_proj"].by_column
    for name in ("model.layers.0.gate.u_z", "model.embed_tokens", "lm_head", "model.early_exit_gate"):
        assert copies[name] == formats[name]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "float32"}, "prompts must be 'none' for float32 weights and float32 activations"),
        ({"precision": "int4", "activations": "float16"}, "for int4 weights and float16 activations"),
        ({"precision": "float16"}, "whose activations are float32"),
    ],
)
def test_weights_that_have_no_integer_products_are_refused(options, message):
    with pytest.raises(ValueError, match="prompts must be") as raised:
        ExportOptions(**options, prompts="int8")
    assert message in str(raised.value)


def test_an_unknown_copy_is_refused():
    with pytest.raises(ValueError, match="prompts must be one of int8, none, got 'int4'"):
        ExportOptions("int4", prompts="int4")


def test_a_bundle_without_quantized_layers_has_nothing_to_copy(tmp_path):
    checkpoint = save_checkpoint(random_model(), tmp_path / "checkpoint")
    with pytest.raises(FormatError, match="which has none"):
        export_bundle(
            checkpoint, tmp_path / "bundle", ExportOptions("int4", {"model.layers.*": "float32"}, prompts="int8")
        )
    assert not (tmp_path / "bundle").exists()


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    model = random_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("inf")
    checkpoint = save_checkpoint(model, tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match=r"model.layers.1.mlp.up_proj.weight"):
        export_bundle(checkpoint, tmp_path / "bundle", ExportOptions("int4", prompts="int8"))
    assert not (tmp_path / "bundle").exists()


def test_the_command_line_says_what_is_wrong(tmp_path, capsys):
    checkpoint = save_checkpoint(random_model(), tmp_path / "checkpoint")
    arguments = [str(checkpoint), "--out", str(tmp_path / "out"), "--prompts", "int8"]
    assert export_main(arguments) == 1
    assert "prompts must be 'none' for float32 weights" in capsys.readouterr().err
    assert export_main([*arguments, "--precision", "int4", "--format", "genai"]) == 1
    assert "leave --prompts int8 out" in capsys.readouterr().err
    assert export_main([*arguments, "--melt"]) == 1
    assert "--prompts is for bundles" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["prompts.data", "prompts.onnx", "prompts_int8.onnx"])
def test_a_missing_or_altered_copy_is_refused(random_bundle, tmp_path, name):
    bundle = shutil.copytree(random_bundle("int4", prompts="int8"), tmp_path / "bundle")
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    with pytest.raises(BundleError, match=f"{name} was altered"):
        MeltModel.load(bundle, device="cpu")
    (bundle / name).unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        MeltModel.load(bundle, device="cpu")


def test_doctor_names_the_kernels(monkeypatch, capsys):
    assert main(["doctor"]) == 0
    said = next(line for line in capsys.readouterr().out.splitlines() if "8-bit products" in line)
    assert all(name in said for name in integers.instructions())
    monkeypatch.setattr("melt_runtime.device.doctor.overflows", lambda: True)
    assert main(["doctor"]) == 0
    assert "overflow here" in capsys.readouterr().out
