"""The shipped model of source code: depth pays on text that it has never seen, and what its card says holds."""

import json

import pytest
import torch
from conftest import ROOT
from safetensors import safe_open
from transformers import PreTrainedTokenizerFast

from melt_models import load_checkpoint
from melt_models.code.evaluate import bytes_of_tokens, measure_depth, measure_waves

FOLDER = ROOT / "models" / "melt-code"
LENGTH, CHUNK = 192, 64


@pytest.fixture(scope="module")
def model():
    return load_checkpoint(FOLDER).float().eval()


@pytest.fixture(scope="module")
def tokenizer():
    return PreTrainedTokenizerFast.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def rows(tokenizer):
    """Of this project's own sources, which nobody trained on."""
    files = sorted((ROOT / "runtime" / "melt_runtime").rglob("*.py"), key=lambda path: path.stat().st_size)[-12:]
    ids = [tokenizer.encode(path.read_text(encoding="utf-8"), add_special_tokens=False) for path in files]
    return torch.tensor([one[:LENGTH] for one in ids])


@torch.no_grad()
def test_depth_pays_on_text_that_nobody_trained_on(model, tokenizer, rows):
    sizes = bytes_of_tokens(tokenizer)
    one, two, four = (measure_depth(model, rows, sizes, loops, CHUNK) for loops in (1, 2, 4))
    assert four.perplexity < two.perplexity < one.perplexity
    assert four.perplexity < 0.9 * one.perplexity
    assert four.bits_per_byte < 2.5, "letters at random have 6 or more"


@torch.no_grad()
def test_waves_and_plain_decoding_read_nearly_as_well_as_chunks(model, rows):
    waves = measure_waves(model, rows, model.config.total_ut_steps, CHUNK)
    plain = waves[max(waves)]
    assert plain.perplexity < 1.2 * waves[0].perplexity
    assert waves[1].perplexity < 1.1 * plain.perplexity
    assert waves[1].agreement > 0.8
    assert 0.2 < waves[1].held < waves[2].held < waves[3].held


def test_the_weights_are_small_and_the_sources_named():
    with safe_open(FOLDER / "model.safetensors", "pt") as weights:
        kinds = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
    assert kinds == {"BF16"}
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 20 << 20
    sources = json.loads((FOLDER / "sources.json").read_text(encoding="utf-8"))
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for package in sources["packages"]:
        assert package["license"]
        assert package["name"] in card


def test_a_line_s_end_and_the_end_of_a_file_are_tokens(tokenizer, model):
    assert tokenizer.decode(tokenizer.encode("if x:\n    return\n")) == "if x:\n    return\n"
    assert model.config.stop_ids == (tokenizer.eos_token_id,)


def test_the_card_is_about_this_model(model):
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert f"{parameters / 1e6:.1f} million parameters" in card
