"""Word-level corpora in three files, and the configuration that trains on them."""

import json
import math
import re

import numpy as np
import pytest
import tokenizers
import torch

from lm_helpers import log_rows
from lmkern.cli import main
from lmkern.data import DataConfig, Tokenizer, load_data
from lmkern.models import load_pretrained
from lmkern.train.checkpoint import resolve_model_directory
from test_cli import CONFIGS

pytestmark = pytest.mark.cpu_only("runs commands and trainers that choose their device")

# As the Penn Treebank's files: a space before and after every line's words.
TRAIN = " the cat sat on the <unk> \n the dog sat on N mats \n\n the end \n"
VALID = " the bird sat on the end \n"
TEST = "no dog sat\n the end \n"


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A directory with train.txt, valid.txt and test.txt, beside the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LMKERN_CACHE", str(tmp_path / "cache"))
    directory = tmp_path / "words"
    directory.mkdir()
    for name, text in (("train", TRAIN), ("valid", VALID), ("test", TEST)):
        (directory / f"{name}.txt").write_text(text)
    return directory


def test_words_are_counted_and_lines_end(corpus):
    data = load_data(DataConfig(path=str(corpus), tokenizer="word"))
    assert data.tokenizer.kind == "word"
    vocabulary = data.tokenizer.inner.get_vocab()
    assert sorted(vocabulary, key=vocabulary.get) == [
        "<eos>", "the", "on", "sat", "<unk>", "N", "cat", "dog", "end", "mats"
    ]  # fmt: skip

    def words(ids):
        return [data.tokenizer.inner.id_to_token(int(i)) for i in ids]

    assert words(data.train[:8]) == ["the", "cat", "sat", "on", "the", "<unk>", "<eos>", "the"]
    assert words(data.train[-6:]) == ["mats", "<eos>", "<eos>", "the", "end", "<eos>"]
    assert words(data.val) == ["the", "<unk>", "sat", "on", "the", "end", "<eos>"]
    assert words(data.test) == ["<unk>", "dog", "sat", "<eos>", "the", "end", "<eos>"]
    assert data.test.dtype == np.uint16 and isinstance(data.test, np.memmap)


def test_a_word_tokenizer_reads_writes_and_streams(tmp_path):
    tokenizer = Tokenizer.train("one two\nthree two\n", "word")
    assert "<unk>" in tokenizer.inner.get_vocab()
    tokenizer.save(tmp_path / "t.json")
    loaded = Tokenizer.load(tmp_path / "t.json")
    text = "two\tone \n four\nthree"
    ids = loaded.encode(text)
    assert ids.tolist() == tokenizer.encode(text).tolist()
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
    assert theirs.encode(text).ids == ids.tolist()
    assert loaded.decode(ids) == "two one \n<unk> \nthree "
    assert list(loaded.stream_decode(ids)) == ["two ", "one ", "\n", "<unk> ", "\n", "three "]


def test_the_cache_knows_each_file(corpus):
    config = DataConfig(path=str(corpus), tokenizer="word")
    keys = {load_data(config).key}
    assert load_data(DataConfig(path=str(corpus), tokenizer="word", val_fraction=0.5)).key in keys
    keys.add(load_data(DataConfig(path=str(corpus), tokenizer="char")).key)
    for name in ("train", "valid", "test"):
        with (corpus / f"{name}.txt").open("a") as file:
            file.write("more\n")
        keys.add(load_data(config).key)
    (corpus / "test.txt").unlink()
    data = load_data(config)
    assert data.test is None and len(keys | {data.key}) == 6


@pytest.mark.parametrize("name", ["train", "valid"])
def test_a_missing_or_empty_part_is_named(corpus, name):
    path = corpus / f"{name}.txt"
    path.write_text("")
    with pytest.raises(ValueError, match=rf"{name}\.txt: the file is empty"):
        load_data(DataConfig(path=str(corpus), tokenizer="word"))
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name}\.txt: no such file"):
        load_data(DataConfig(path=str(corpus), tokenizer="word"))


def sentences(count, seed):
    """A subject chooses its verb, a verb its object: there is something to learn."""
    random = np.random.RandomState(seed)
    lines = []
    for _ in range(count):
        i, j = random.randint(4, size=2)
        lines.append(f" subject{i} verb{(i + j) % 4} object{j} \n")
    return "".join(lines)


def test_zaremba_small_needs_only_a_directory(corpus, capsys, one_thread):
    for name, count, seed in (("train", 600, 0), ("valid", 60, 1), ("test", 50, 2)):
        (corpus / f"{name}.txt").write_text(sentences(count, seed))
    config = str(CONFIGS / "word-zaremba-small.yaml")
    assert main(["train", "--config", config, "--data.path", str(corpus)]) == 0
    output = capsys.readouterr().out
    rows = log_rows(corpus.parent / "out-word-zaremba-small")
    per_epoch = math.ceil((600 * 4 - 1) // 20 / 20)
    assert len(rows) == 13 * per_epoch
    rates = [row["learning_rate"] for row in rows[::per_epoch]]
    assert rates == [1.0] * 4 + [0.5**n for n in range(1, 10)]
    evaluated = [row["step"] for row in rows if "val_loss" in row]
    assert evaluated == [per_epoch * n for n in range(1, 14)]

    directory = resolve_model_directory(corpus.parent / "out-word-zaremba-small")
    model = load_pretrained(directory).eval()
    size = model.config
    assert (size.cell, size.embedding_dim, size.hidden_size, size.num_layers) == (
        "lstm", 200, 200, 2
    )  # fmt: skip
    assert size.init_range == 0.1 and not size.tie_weights
    tokens = torch.from_numpy(Tokenizer.load(directory / "tokenizer.json").encode(
        (corpus / "test.txt").read_text()
    ).astype(np.int64))  # fmt: skip
    with torch.no_grad():
        logits, _ = model(tokens[None, :-1])
    expected = torch.nn.functional.cross_entropy(logits[0], tokens[1:]).exp().item()
    found = {
        part: float(re.search(rf"^{part} word perplexity ([\d.]+)", output, re.M)[1])
        for part in ("validation", "test")
    }
    assert found["test"] == pytest.approx(expected, abs=0.006)  # printed with two digits
    assert 2.0 < found["test"] < 8.0  # 14 kinds of words: it has learned what follows what

    arguments = ["eval", "--checkpoint", str(directory), "--data.part", "test", "--batch_size", "1"]
    assert main([*arguments, "--device", "cpu"]) == 0
    assert float(re.search(r"perplexity +([\d.]+)", capsys.readouterr().out)[1]) == pytest.approx(
        expected, rel=1e-3
    )
    arguments = ["generate", "--checkpoint", str(directory), "--prompt", "subject1"]
    assert main([*arguments, "--max_new_tokens", "30", "--seed", "1"]) == 0
    words = capsys.readouterr().out.split()
    assert words[0] == "subject1" and len(words) > 15
    assert set(words) <= set(
        json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]
    )


def test_a_text_without_test_part_says_so(corpus, capsys):
    (corpus / "test.txt").unlink()
    arguments = ["train", "--model", "lstm", "--data.path", str(corpus), "--data.tokenizer", "word"]
    arguments += ["--train.max_steps", "2", "--train.batch_size", "2", "--train.device", "cpu"]
    assert main(arguments) == 0
    assert "test word perplexity" not in capsys.readouterr().out
    assert main(["eval", "--checkpoint", "out", "--data.part", "test"]) == 1
    assert "has no test part" in capsys.readouterr().err
