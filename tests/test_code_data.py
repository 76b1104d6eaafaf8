"""What melt-code is trained from: chosen sources, their tokenizer, token data."""

import json

import pytest
from datasets import load_from_disk
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from melt_models import load_checkpoint
from melt_models.code import write_data
from melt_models.code.sources import STANDARD_LIBRARY, Package, Text, Unrepeated, find_package, read_texts
from melt_models.code.tokenizer import train_tokenizer
from melt_models.training.errors import TrainingError

CODE = "".join(f"def number_{place}(self, value):\n    return self.{place}_value + value\n\n" for place in "abcdefgh")


def packed(tmp_path, **files):
    """A package of files by name; ``__`` stands for a slash."""
    found = []
    for name, content in files.items():
        place = tmp_path / f"{name}.py"
        place.write_text(content)
        found.append((f"{name.replace('__', '/')}.py", place))
    return Package("some", "1.0", "MIT", tuple(found))


def test_files_that_nobody_wrote_to_be_read_are_left_out(tmp_path):
    package = packed(
        tmp_path,
        good=f"# Copyright somebody\n#\n\n{CODE}",
        tests__good=CODE,
        some___vendor__other=CODE,
        test_it=CODE,
        made=f"# This file was automatically generated from another one.\n{CODE}",
        table="numbers = [\n" + "    12345678, 23456789,\n" * 40 + "]\n",
        wide=f"{CODE}text = {'x' * 300!r}\n",
        short="x = 1\n",
    )
    (text,) = read_texts(package, 10**6)
    assert text == Text("some", "good.py", CODE)


def test_a_package_gives_so_many_bytes_and_no_more(tmp_path):
    package = packed(tmp_path, **dict.fromkeys("abcdef", CODE))
    assert len(list(read_texts(package, 3 * len(CODE)))) == 3
    assert list(read_texts(package, 3 * len(CODE))) == list(read_texts(package, 3 * len(CODE)))


def test_what_repeats_earlier_files_is_left_out():
    unrepeated = Unrepeated()
    other = CODE.replace("value", "thing")
    texts = [Text("a", name, content) for name, content in (("1", CODE), ("2", f"import os\n{CODE}"), ("3", other))]
    assert [text.path for text in unrepeated(texts)] == ["1", "3"]
    # Most windows of this one are new: enough for training, too few for what is held out.
    mixed = Text("b", "4", CODE[: len(CODE) // 2] + CODE.replace("value", "item"))
    assert not list(unrepeated([mixed], most_seen=0.1))
    assert list(unrepeated([mixed])) == [mixed]


def test_the_licence_decides():
    assert find_package(STANDARD_LIBRARY).license == "PSF-2.0"
    assert "MIT" in find_package("pluggy").license
    with pytest.raises(
        TrainingError, match=r"hypothesis .* must have a permissive licence, its metadata say 'MPL-2.0'"
    ):
        find_package("hypothesis")
    with pytest.raises(TrainingError, match="package no-such-package is not installed"):
        find_package("no-such-package")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([CODE, "class Other:\n\n    def run(self):\n        return 12345\n"])


@given(st.text())
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_a_line_s_end_takes_the_indentation_that_follows(tokenizer):
    assert "Ċ\u0120\u0120\u0120\u0120" in tokenizer.tokenize("pass\n    return")
    assert tokenizer.tokenize("12345") == list("12345")


@pytest.fixture
def few_packages(monkeypatch):
    monkeypatch.setattr(write_data, "TRAINED", ("h11", "click"))
    monkeypatch.setattr(write_data, "HELD_OUT", ("pluggy",))


def test_the_same_versions_give_the_same_data(few_packages, tmp_path, capsys):
    arguments = ["--length", "64", "--most-bytes", "60000", "--layers", "1", "--hidden-size", "128"]
    for name in ("one", "two"):
        assert write_data.main(["--out", str(tmp_path / name), *arguments]) == 0
    one, two = tmp_path / "one", tmp_path / "two"
    described = json.loads((one / "sources.json").read_text())
    assert (two / "sources.json").read_text() == (one / "sources.json").read_text()
    assert [(package["name"], package["held_out"]) for package in described["packages"]] == [
        ("h11", False),
        ("click", False),
        ("pluggy", True),
    ]
    assert all(0 < package["bytes"] <= 60_000 and package["license"] for package in described["packages"])
    train, held_out = load_from_disk(str(one / "train")), load_from_disk(str(one / "held_out"))
    assert {len(ids) for ids in train["input_ids"]} == {len(ids) for ids in held_out["input_ids"]} == {64}
    assert train["input_ids"] == load_from_disk(str(two / "train"))["input_ids"]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(one / "start")
    text = tokenizer.decode([token for ids in held_out["input_ids"] for token in ids], skip_special_tokens=True)
    assert (one / "held_out.txt").read_text().startswith(text)
    model = load_checkpoint(one / "start")
    assert (model.config.gate_kind, model.config.total_ut_steps, model.config.exit_gate) == ("none", 4, True)
    assert model.config.stop_ids == (0,) == (tokenizer.eos_token_id,)
    assert f"train: {len(train)} rows of 64 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--length", "0"], "--length must be at least 1, got 0"),
        (["--hidden-size", "100"], "--hidden-size must be a multiple of 128, got 100"),
        (["--most-bytes", "500"], "--most-bytes 500 leaves no file of h11, click: raise it"),
    ],
)
def test_bad_input_leaves_nothing(few_packages, tmp_path, capsys, arguments, message):
    assert write_data.main(["--out", str(tmp_path / "out"), *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
