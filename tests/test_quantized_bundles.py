"""L3 to L5: quantized weights and KV caches: structure exactly, cost as the manifest states it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MELT_TINY, random_model, save_checkpoint
from test_parity import draw_ids, open_runner
from tolerances import LAST_PLACE, PARITY, assert_close

from melt_export import ExportError, ExportOptions, export_bundle, reference
from melt_export.bundle import write_text_files
from melt_export.calibrate import key_scales, value_scales
from melt_export.cli import main
from melt_export.limits import LIMITS
from melt_export.probe import choose_probe
from melt_export.quality import compare, trace_reference
from melt_export.reference import reference_model
from melt_export.source import checkpoint_source
from melt_export.summary import summarize
from melt_models import load_checkpoint
from melt_models.evaluation import read_examples
from melt_runtime import MeltModel, read_manifest
from melt_runtime.bundle.manifest import check_files
from melt_runtime.bundle.measured import LossLimit
from melt_runtime.cli.info import describe_bundle

HOPS = ("1 hop", "2 hops", "3 hops", "4 hops")
TEXT = "Ana reports to Ben. Cleo reports to Ana. Ben works for Dan. " * 12


@pytest.mark.parametrize(
    ("precision", "kind"), [("int8", "elementwise"), ("int4", "elementwise"), ("int4", "scalar"), ("int4", "none")]
)
def test_quantized_graphs_compute_what_torch_does_with_the_rounded_weights(random_bundle, precision, kind):
    """With unrounded activations the comparison is as close as at float32: nothing is packed in a wrong place."""
    parity = read_manifest(random_bundle(precision, verified=True, gate_kind=kind)).parity
    assert [run.kv_cache for run in parity.runs] == ["float", "int8", "int4"]
    for run in parity.runs:
        assert all(found.error <= found.allowed for found in run.tensors.values()), run


def test_mixed_precision_lies_between(random_bundle):
    bundles = {
        "int4": random_bundle("int4", verified=True),
        "mixed": random_bundle(
            "int4", verified=True, layers={"*.self_attn.*": "int8", "*.mlp.*": "int8", "model.layers.0.*": "float32"}
        ),
        "int8": random_bundle("int8", verified=True),
    }
    manifests = {name: read_manifest(bundle) for name, bundle in bundles.items()}
    kinds = manifests["mixed"].quantization.formats
    assert {"float32", "int4 block 64", "int8 block 32", "int8 block 64"} <= set(kinds)
    errors = {name: last_error(manifest, "float") for name, manifest in manifests.items()}
    assert errors["int8"] < errors["int4"]
    assert errors["mixed"] < errors["int4"]


def last_error(manifest, kv_cache) -> float:
    return manifest.quality.kv_cache[kv_cache].hidden_error_by_loop[str(manifest.model.trained_loops)]


def test_the_cost_is_stated_for_every_loop_and_every_kv_cache(random_bundle):
    """Fewer bits cost more, of weights and of KV caches, after every loop; float32 costs nothing but rounding."""
    found = {
        precision: read_manifest(random_bundle(precision, verified=True)).quality
        for precision in ("float32", "int8", "int4")
    }
    for quality in found.values():
        assert quality.text == "seeded random tokens"
        assert set(quality.kv_cache) == {"float", "int8", "int4"}
        for cost in quality.kv_cache.values():
            assert list(cost.hidden_error_by_loop) == ["1", "2", "3", "4"]
            assert (cost.limit, cost.exact_match) == (None, {})
    errors = {
        (precision, kind): np.array(list(cost.hidden_error_by_loop.values()))
        for precision, quality in found.items()
        for kind, cost in quality.kv_cache.items()
    }
    assert (errors["float32", "float"] <= PARITY["float32"].relative).all()
    for precision in found:
        assert (errors[precision, "float"] < errors[precision, "int4"]).all()
    for kind in ("int8", "int4"):
        assert (errors["float32", kind] < errors["int4", kind]).all()
    assert (errors["float32", "float"] < errors["float32", "int8"]).all()
    assert (errors["float32", "int8"] < errors["float32", "int4"]).all()
    assert (errors["float32", "float"] < errors["int8", "float"]).all()
    assert (errors["int8", "float"] < errors["int4", "float"]).all()
    divergences = [found[precision].kv_cache["float"].kl for precision in ("float32", "int8", "int4")]
    assert divergences == sorted(divergences)
    exact = found["float32"]
    assert_close(exact.kv_cache["float"].perplexity, exact.perplexity_of_float32)


def test_what_waves_change_is_stated_for_every_lag(random_bundle):
    """In float32 nothing at the longest lag; by ``melt info`` and at the end of an export, of random tokens too."""
    bundle = random_bundle(verified=True)
    manifest = read_manifest(bundle)
    waves = manifest.quality.waves
    assert list(waves) == ["1", "2", "3"]
    assert waves["3"].agreement == 1.0
    (line,) = manifest.quality.describe_waves()
    shares = {
        name: [f"{100 * getattr(found, name):.1f} %" for found in waves.values()] for name in ("agreement", "held")
    }
    said = {
        name: ", ".join(f"lag {lag} {share}" for lag, share in zip(waves, shares[name], strict=True)) for name in shares
    }
    begin = "waves (float KV cache), first choice as in plain decoding: "
    assert line.startswith(f"{begin}{said['agreement']}; drafts that hold: {said['held']}; perplexity: lag 1 ")
    assert line in summarize(bundle, manifest)
    assert line in " ".join(describe_bundle(bundle, manifest).split())


@pytest.mark.parametrize("kind", ["none", "mean"])
def test_no_waves_are_stated_where_they_change_nothing_or_are_refused(random_bundle, kind):
    bundle = random_bundle(verified=True, gate_kind=kind)
    manifest = read_manifest(bundle)
    assert manifest.quality.waves == {}
    assert "waves" not in summarize(bundle, manifest) + describe_bundle(bundle, manifest)


def test_melt_tiny_answers_at_four_bits_with_every_kv_cache(tiny_int4):
    """The manifest's table, and the same answers again through the bundle as loaded."""
    manifest = read_manifest(tiny_int4)
    assert manifest.weight_bytes < 0.6 * 322_849 * 4
    examples = read_examples(MELT_TINY)
    for kind in manifest.kv_caches:
        table = manifest.quality.kv_cache[kind].exact_match
        least = 0.6 if kind == "int4" else 0.85
        for loops in range(1, 5):
            for hops, share in enumerate((table[str(loops)][group] for group in HOPS), start=1):
                assert share >= least if hops <= loops else share <= 0.3, (kind, table)
        model = MeltModel.load(tiny_int4, device="cpu", capacity=512, kv_cache=kind)
        right = sum(model.generate(e.chat, max_new_tokens=48).text == e.answer for e in examples[:24])
        assert right >= 21


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("gate_kind", ["elementwise", "none"])
def test_rows_of_a_quantized_cache_are_the_rounded_rows(random_bundle, kind, gate_kind):
    """Each loop rounds the keys and values that it computes, never those that an earlier loop rounded."""
    bundle = random_bundle(gate_kind=gate_kind)
    exact, rounded = (open_runner(bundle, chunk=8, kv_cache=cache) for cache in ("float", kind))
    scales = stored_scales(bundle, kind)
    seen = []

    def keep(runner):
        def observe(loop_idx):
            chosen = runner.state.caches[runner.state.plan.cache_set(loop_idx)][0]
            seen.append([buffer.read()[0, :, :8] for buffer in chosen])

        return observe

    ids = draw_ids(8)[0].tolist()
    exact.prefill(ids, 4, observe=keep(exact))
    rounded.prefill(ids, 4, observe=keep(rounded))
    limit = 128 if kind == "int8" else 8
    for place in range(2):  # layer 0 of loop 1 sees no rounding before its own
        wanted = np.clip(np.round(seen[0][place] / scales[place][:, None]), -limit, limit - 1)
        codes = unpacked(seen[4][place], kind)
        assert np.abs(codes - wanted).max() <= 1
        assert (codes == wanted).mean() > 0.99
    if gate_kind == "elementwise":
        assert (unpacked(seen[4][0], kind) != unpacked(seen[5][0], kind)).any()  # rewritten by the second loop


def stored_scales(bundle, kind):
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(bundle / f"loop_{kind}.onnx").graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer if "scale" in tensor.name}
    return tensors[f"{kind}_key_scale.0"], tensors[f"{kind}_value_scale.0"]


def unpacked(rows, kind):
    if kind == "int8":
        return rows.astype(np.int32)
    return np.stack((rows & 15, rows >> 4), axis=-1).reshape(*rows.shape[:-1], -1).astype(np.int32) - 8


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantized_cache_leaves_other_rows_alone_and_resets(random_bundle, kind):
    runner, ids = open_runner(random_bundle(), chunk=8, kv_cache=kind), draw_ids(24)[0].tolist()
    first = runner.prefill(ids, 4).copy()
    before = runner.state.caches[0][1][0].read()
    runner.decode([3], 4)
    after = runner.state.caches[0][1][0].read()
    np.testing.assert_array_equal(before[:, :, :24], after[:, :, :24])
    runner.reset()
    np.testing.assert_array_equal(first, runner.prefill(ids, 4))


@pytest.mark.filterwarnings("ignore:loops=:RuntimeWarning")
def test_state_bytes_do_not_depend_on_loops_and_shrink_with_the_cache(random_bundle):
    sizes = {}
    for kind in ("float", "int8", "int4"):
        model = MeltModel.load(random_bundle(), device="cpu", capacity=256, kv_cache=kind)
        seen = set()
        for loops in range(1, 17):
            model.generate([1, 2, 3], loops=loops, max_new_tokens=1, stop_ids=())
            seen.add(model.state_bytes)
        (sizes[kind],) = seen
    rest = model.session.plan.work_bytes
    assert sizes["float"] - rest > 2.5 * (sizes["int8"] - rest) > 2.5 * (sizes["int4"] - rest) > 0


def test_scales_of_keys_hold_at_every_position():
    """A pair of channels turned by any angle stays within reach of the int8 codes."""
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((2, 50, 16)).astype(np.float32)
    scales = key_scales(keys, "int8")
    assert scales.shape == (2, 16)
    np.testing.assert_array_equal(scales[:, :8], scales[:, 8:])
    angle = rng.uniform(0, 6.28, (2, 50, 8))
    turned = keys[..., :8] * np.cos(angle) - keys[..., 8:] * np.sin(angle)
    assert (np.abs(turned) <= 127.001 * scales[:, None, :8]).all()


def test_scales_of_values_clip_only_where_that_helps():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((1, 400, 2)).astype(np.float32)
    values[0, 0, 1] = 40.0  # an outlier
    peaks = np.abs(values).max(axis=1)
    assert_close(value_scales(values, "int8")[0], peaks[0] / 127, LAST_PLACE)
    assert value_scales(values, "int4")[0, 0] < peaks[0, 0] / 7
    assert np.isfinite(value_scales(np.zeros((1, 4, 2), np.float32), "int4")).all()


def test_the_reference_is_the_same_whole_and_in_pieces(tmp_path, monkeypatch):
    """A large model is read layer by layer, every time it is run."""
    source = checkpoint_source(save_checkpoint(random_model(), tmp_path / "checkpoint"))
    write_text_files(source, tmp_path)
    probe = choose_probe(source, tmp_path, None)
    whole = trace_reference(reference_model(source.config, source.read), probe)
    monkeypatch.setattr(reference, "WHOLE_BYTES", 0)
    read: list[str] = []
    pieces = reference_model(source.config, lambda name: (read.append(name), source.read(name))[1])
    assert read == []
    streamed = trace_reference(pieces, probe)
    assert read.count("model.layers.1.mlp.up_proj.weight") == 4 * 2  # every loop of every chunk
    assert all(parameter.is_meta for parameter in pieces.parameters())
    assert whole.logits.equal(streamed.logits)
    direct = load_checkpoint(tmp_path / "checkpoint")
    with torch.no_grad():
        expected = direct(torch.tensor([probe.passages[0].ids])).logits[0, :-1]
    assert whole.logits.equal(expected)
    found = compare(whole, streamed, probe)
    assert (found.kl, found.greedy_agreement) == (0.0, 1.0)


def test_a_given_text_is_what_is_measured(tmp_path):
    checkpoint = save_checkpoint(random_model(), tmp_path / "checkpoint")
    manifest = export_bundle(checkpoint, tmp_path / "out", ExportOptions("int8", text=TEXT, allow_loss=True))
    assert manifest.quality.text == "the given text"
    assert manifest.quality.tokens == 127  # half of the model's 256 positions, all but the first


@pytest.fixture
def checkpoint(tmp_path):
    return save_checkpoint(random_model(), tmp_path / "checkpoint")


def test_weights_that_cost_more_than_is_allowed_stop_the_export(checkpoint, tmp_path, capsys):
    """Random weights are all outliers: 4 bits turn a random model into another one."""
    (tmp_path / "text.txt").write_text(TEXT)
    command = [str(checkpoint), "--out", str(tmp_path / "made" / "out"), "--eval-text", str(tmp_path / "text.txt")]
    assert main([*command, "--precision", "int4"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    limit = LIMITS["int4"]
    assert error.startswith("error: int4 weights cost more than is allowed: KL divergence from float32 ")
    assert f"(limit {limit.kl:g}), first choice equal for " in error
    assert f"% (limit {100 * limit.greedy_agreement:g} %), over 127 tokens of the given text" in error
    assert error.endswith("--block 32 or --layer PATTERN=int8 cost less, --allow-loss keeps them")
    assert list((tmp_path / "made").iterdir()) == []
    assert main([*command, "--precision", "int4", "--allow-loss"]) == 0
    said = capsys.readouterr()
    assert re.search(r"^ *\d+ s  note: int4 weights cost more than is allowed", said.err, re.MULTILINE)
    stages = [line.split(" s  ")[1] for line in said.err.splitlines()]
    assert stages[0] == "tracing embed.onnx"
    assert "verifying against torch, loop by loop" in stages
    manifest = read_manifest(tmp_path / "made" / "out")
    assert manifest.kv_caches == ("float", "int8", "int4")
    assert not manifest.quality.kv_cache["float"].within_limit
    assert "beyond the limit" in describe_bundle(tmp_path / "made" / "out", manifest)


def test_a_kv_cache_that_costs_more_than_is_allowed_is_left_out(checkpoint, tmp_path, monkeypatch):
    """The bundle comes without it and says so; its cost stays in the manifest."""
    monkeypatch.setitem(LIMITS, "int4", LossLimit(0.0, 1.0))
    lines: list[str] = []
    options = ExportOptions(text=TEXT, report=lines.append)
    manifest = export_bundle(checkpoint, tmp_path / "out", options)
    assert manifest == read_manifest(tmp_path / "out")
    check_files(tmp_path / "out", manifest)
    assert manifest.kv_caches == ("float", "int8")
    assert not (tmp_path / "out" / "loop_int4.onnx").exists()
    (note,) = (line for line in lines if line.startswith("note: "))
    assert note.startswith("note: left out: an int4 KV cache costs more than is allowed: KL divergence from float32 ")
    assert not manifest.quality.kv_cache["int4"].within_limit
    assert "left out: beyond the limit" in describe_bundle(tmp_path / "out", manifest)
    assert "int4 KV cache: " in summarize(tmp_path / "out", manifest)
    with pytest.raises(ValueError, match="kv_cache must be one of float, int8, which this float32 bundle has"):
        MeltModel.load(tmp_path / "out", device="cpu", kv_cache="int4")


def test_random_tokens_judge_nothing_and_the_summary_says_so(random_bundle):
    manifest = read_manifest(random_bundle("int4", verified=True))
    assert all(cost.limit is None and cost.within_limit for cost in manifest.quality.kv_cache.values())
    assert "not judged: seeded random tokens do not say" in summarize(Path("out"), manifest)


def test_what_four_bit_keys_and_values_cost_melt_tiny_is_said(tiny_bundle):
    """At export and by ``melt info``: points of its own questions, where they are most."""
    manifest = read_manifest(tiny_bundle)
    points, loops, group = manifest.quality.most_lost("int4")
    table = manifest.quality.kv_cache
    lost = table["float"].exact_match[loops][group] - table["int4"].exact_match[loops][group]
    assert points == 100 * lost > 0
    assert manifest.quality.most_lost("float") is None
    said = f"up to {points:.1f} points of exact answers"
    assert f"costs {said} ({group}, {loops} loops)" in describe_bundle(tiny_bundle, manifest)
    assert f"{said} lost ({group}, {loops} loops)" in summarize(tiny_bundle, manifest)


def test_bad_options_leave_nothing_behind(tmp_path, capsys):
    checkpoint = save_checkpoint(random_model(), tmp_path / "checkpoint")
    made = tmp_path / "made"
    for options, message in (
        (["--precision", "int4", "--layer", "*.none=int8"], "pattern '*.none' matches no layer"),
        (["--layer", "lm_head"], "--layer must be PATTERN=PRECISION, got 'lm_head'"),
        (["--eval-text", str(tmp_path / "short.txt")], "the text must have at least 64 tokens, got 4"),
        (["--eval-text", str(tmp_path / "none.txt")], "No such file"),
    ):
        (tmp_path / "short.txt").write_text("Ana reports to Ben")
        assert main([str(checkpoint), "--out", str(made / "out"), *options]) == 1
        assert message in capsys.readouterr().err
        assert not made.exists() or list(made.iterdir()) == []
    for options in (ExportOptions, lambda: ExportOptions("int3"), lambda: ExportOptions(rounding="up")):
        if options is not ExportOptions:
            with pytest.raises(ValueError, match="must be one of"):
                options()
    with pytest.raises(ExportError, match="exists"):
        export_bundle(checkpoint, tmp_path, ExportOptions("int4"))


def test_float16_bundles_offer_no_quantized_cache(random_bundle):
    bundle = random_bundle("float16")
    assert read_manifest(bundle).kv_caches == ("float",)
    with pytest.raises(ValueError, match="kv_cache must be one of float, which this float16 bundle has, got 'int8'"):
        MeltModel.load(bundle, device="cpu", kv_cache="int8")


def test_a_damaged_evaluation_names_its_line(tmp_path):
    checkpoint = save_checkpoint(random_model(), tmp_path / "checkpoint")
    (checkpoint / "evaluation.jsonl").write_text(json.dumps({"messages": [], "answer": "x", "group": "g"}) + "\n{}\n")
    with pytest.raises(
        ExportError, match="evaluation.jsonl, line 1: messages must have at least 1 item, got"
    ) as raised:
        checkpoint_source(checkpoint)
    for name in ("messages", "answer", "group"):
        assert f"evaluation.jsonl, line 2: {name} is missing" in str(raised.value)
