"""What melt-code's evaluation says is what the model itself says: losses by loops, bytes, waves."""

import math

import pytest
import torch
from conftest import random_model, save_checkpoint
from datasets import Dataset, disable_progress_bars
from tolerances import TORCH, assert_close

from melt_models import load_checkpoint
from melt_models.code import evaluate, ship
from melt_models.code.evaluate import WAVE_TOKENS, bytes_of_tokens, measure_depth, measure_waves
from melt_models.code.tokenizer import train_tokenizer

TEXT = "def head(path):\n    with open(path) as stream:\n        return stream.readline()  # naïve — one line\n" * 8
LENGTH, CHUNK, LOOPS = WAVE_TOKENS + 12, 8, 4


@pytest.fixture(scope="module")
def tokenizer():
    disable_progress_bars()
    return train_tokenizer([TEXT])


@pytest.fixture(scope="module")
def melt(tokenizer):
    return random_model(vocab_size=len(tokenizer), total_ut_steps=LOOPS, chunk_size=CHUNK, max_position_embeddings=256)


@pytest.fixture(scope="module")
def rows(tokenizer):
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    return torch.tensor([ids[start : start + LENGTH] for start in (0, 7, 19)])


@torch.no_grad()
def test_losses_by_loops_are_the_models_own(melt, tokenizer, rows):
    sizes = bytes_of_tokens(tokenizer)
    for loops in (1, LOOPS):
        found = measure_depth(melt, rows, sizes, loops, CHUNK)
        out = melt(rows, labels=rows, loops=loops, chunk_size=CHUNK)
        assert_close(torch.tensor(found.loss), out.loss, TORCH)
        assert found.perplexity == math.exp(found.loss)
        right = (out.logits[:, :-1].argmax(-1) == rows[:, 1:]).float().mean()
        assert_close(torch.tensor(found.right), right, TORCH)
        scored = sum(len(tokenizer.decode(row[1:].tolist()).encode()) for row in rows)
        bits = out.loss * rows[:, 1:].numel() / math.log(2) / scored
        assert_close(torch.tensor(found.bits_per_byte), bits, TORCH)


def test_special_tokens_have_no_bytes_and_the_others_those_of_their_text(tokenizer):
    sizes = bytes_of_tokens(tokenizer)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert sizes[ids].sum() == len(TEXT.encode())
    assert sizes[tokenizer.all_special_ids].tolist() == [0, 0]


@pytest.mark.parametrize("tokens", [WAVE_TOKENS, LENGTH - 1])
@torch.no_grad()
def test_the_longest_lag_is_one_token_after_another(melt, rows, tokens):
    found = measure_waves(melt, rows, LOOPS, CHUNK, tokens)
    known = rows[:, : -tokens - 1]
    cache = melt(known, loops=LOOPS, chunk_size=CHUNK).cache if known.shape[1] else None
    out = melt(rows[:, -tokens - 1 : -1], past_key_values=cache, loops=LOOPS, chunk_size=1)
    loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), rows[:, -tokens:].flatten())
    assert list(found) == [0, 1, 2, 3]
    assert_close(torch.tensor(found[3].loss), loss, TORCH)
    assert found[3].agreement == 1.0
    assert all(0 <= one.agreement <= 1 and one.loss > 0 for one in found.values())
    assert all(0 <= found[lag].held <= 1 for lag in (1, 2, 3))
    assert len({one.loss for one in found.values()}) == LOOPS


@torch.no_grad()
def test_at_lag_0_the_tokens_are_read_in_chunks(melt, rows):
    found = measure_waves(melt, rows, LOOPS, CHUNK, LENGTH - 1)[0]
    out = melt(rows, labels=rows, loops=LOOPS, chunk_size=CHUNK)
    assert_close(torch.tensor(found.loss), out.loss, TORCH)
    assert found.held is None


@pytest.mark.parametrize("gate_kind", ["none", "mean"])
@torch.no_grad()
def test_models_without_waves_are_read_in_chunks_and_token_by_token(tokenizer, rows, gate_kind):
    model = random_model(vocab_size=len(tokenizer), gate_kind=gate_kind, max_position_embeddings=256)
    found = measure_waves(model, rows, LOOPS, CHUNK, 20)
    assert list(found) == [0, LOOPS - 1]
    if gate_kind == "none":
        assert_close(torch.tensor(found[0].loss), torch.tensor(found[3].loss), TORCH)
    else:
        assert found[0].loss != found[3].loss


@pytest.fixture(scope="module")
def folders(melt, tokenizer, rows, tmp_path_factory):
    root = tmp_path_factory.mktemp("code")
    Dataset.from_dict({"input_ids": rows.tolist()}).save_to_disk(str(root / "data"))
    Dataset.from_dict({"input_ids": rows[:, :20].tolist()}).save_to_disk(str(root / "short"))
    for name, kind in (("melt", "elementwise"), ("looplm", "none")):
        model = melt if kind != "none" else random_model(vocab_size=len(tokenizer), gate_kind=kind)
        tokenizer.save_pretrained(save_checkpoint(model, root / name))
    return root


def test_the_command_prints_a_table_of_depths_and_one_of_waves(folders, capsys):
    arguments = [str(folders / "melt"), "--data", str(folders / "data"), "--rows", "2"]
    assert evaluate.main([*arguments, "--most-loops", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines] == ["loops", "---", "1", "2", "3"]
    assert evaluate.main([*arguments, "--waves"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines] == ["lag", "---", "in chunks", "1", "2", "3"]


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (
            "melt",
            ["--data", "short", "--waves"],
            "--waves 64 must be given at least 2 loops and rows of more tokens, got 4 and 20",
        ),
        ("melt", ["--data", "data", "--waves", "--most-loops", "1"], "got 1 and 76"),
        ("melt", ["--data", "data", "--waves", "76"], "rows of more tokens, got 4 and 76"),
        ("melt", ["--data", "data", "--waves", "0"], "--waves must be at least 1, got 0"),
        ("melt", ["--data", "data", "--rows", "4"], r"--rows must be in [1, 3], the rows of"),
        ("melt", ["--data", "melt"], "is not token data"),
        ("melt", ["--data", "data", "--most-loops", "0"], "--most-loops must be at least 1, got 0"),
        ("data", ["--data", "data"], "error: "),
    ],
)
def test_bad_input_is_refused_by_name(folders, capsys, model, arguments, message):
    arguments[1] = str(folders / arguments[1])
    rows = [] if "--rows" in arguments else ["--rows", "2"]
    assert evaluate.main([str(folders / model), *arguments, *rows]) == 1
    assert message in capsys.readouterr().err


def test_what_ships_is_the_model_in_bfloat16_with_its_sources(folders, melt, tmp_path, capsys):
    (tmp_path / "sources.json").write_text("{}")
    arguments = [str(folders / "melt"), "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert ship.main(arguments) == 0
    shipped = load_checkpoint(tmp_path / "out")
    assert shipped.dtype == torch.bfloat16
    for name, weight in shipped.state_dict().items():
        assert torch.equal(weight, melt.state_dict()[name].bfloat16())
    assert (tmp_path / "out" / "sources.json").read_text() == "{}"
    assert ship.main(arguments) == 1
    assert "exists" in capsys.readouterr().err
    assert ship.main([*arguments[:2], str(folders / "data"), "--out", str(tmp_path / "other")]) == 1
    assert "--data must have sources.json" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
