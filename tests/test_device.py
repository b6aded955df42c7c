"""pytest --device: what the tests make lies on the device, what the library makes does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pack_padded_sequence

import lmkern
import lmkern.models

AT_IMPORT = torch.ones(2)
MAKERS = {
    "zeros": lambda: torch.zeros(2, 3, dtype=torch.float64),
    "randn": lambda: torch.randn(3, generator=torch.Generator().manual_seed(1)),
    "tensor": lambda: torch.tensor([1, 2]),
    "arange": lambda: torch.arange(3),
    "Parameter": lambda: torch.nn.Parameter(torch.rand(2)),
    "like": lambda: torch.randn_like(torch.ones(2)),
    "Linear": lambda: torch.nn.Linear(2, 3).weight,
    "LSTM": lambda: lmkern.nn.LSTM(2, 3).weight_hh_l0,
    "GPT": lambda: (
        lmkern.models.GPT(lmkern.models.GPTConfig(n_layer=1, n_head=1, n_embd=8)).position_embedding
    ),
    "import": lambda: AT_IMPORT,
    "Sequential": lambda: torch.nn.Sequential(torch.nn.Linear(2, 2))[0].bias,
}


@pytest.mark.parametrize("name", MAKERS)
def test_what_tests_make_is_on_the_device(name, device):
    made = MAKERS[name]()
    assert made.device.type == device
    assert made.is_leaf


def test_options_of_factories(device):
    x = torch.zeros(2, requires_grad=True)
    assert x.requires_grad and x.is_leaf and x.device.type == device
    assert torch.zeros(2, device="meta").device.type == "meta"
    assert torch.zeros(2, device="cpu").device.type == "cpu"
    assert lmkern.nn.GRU(2, 3, device="cpu").weight_hh_l0.device.type == "cpu"
    assert torch.as_tensor(x) is x
    assert not hasattr(torch, "no such name")


def test_what_the_library_makes_is_where_it_says():
    assert lmkern.functional.norm.dropout_seed(0.5, torch.zeros(1)).device.type == "cpu"
    assert F.one_hot is torch.nn.functional.one_hot


def test_lengths_of_torchs_packing(device):
    lengths = torch.tensor([3, 1], device="cpu" if device == "meta" else None)
    packed = pack_padded_sequence(torch.randn(3, 2, 4), lengths)
    assert packed.data.device.type == device and packed.batch_sizes.tolist() == [2, 1, 1]


def test_compiled(device):
    def f(x):
        return x + torch.arange(3) + torch.ones_like(x)

    x = torch.ones(3)
    y = torch.compile(f, backend="eager", fullgraph=True)(x)
    assert y.device.type == device


@pytest.mark.cpu_only
def test_cpu_only(device):
    assert device == "cpu"


def test_isa_fixture(isa, device, request):
    from lmkern import _C

    assert isa == _C.isa()
    assert (device == "cpu") == (request.node.callspec.params["isa"] in _C.supported_isas())


@pytest.mark.cpu_only
def test_this_file_on_another_device():
    command = [sys.executable, "-m", "pytest", "-q", "--device", "meta", __file__]
    result = subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert "2 skipped" in result.stdout
