"""lmkern.nn.TokenPositionEmbedding; sparse gradients, compilation, torch.func, and its use in GPT."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

import lmkern
from lmkern import reference
from lmkern.functional import token_position_embedding
from lmkern.models import GPT, GPTConfig
from lmkern.nn import SinusoidalPosition, TokenPositionEmbedding
from lmkern.ops.backend import kernels_of


def test_learned_positions_segments_and_layer_norm():
    layer = TokenPositionEmbedding(30, 16, 12, num_segments=2, dropout=0.5, padding_idx=-1)
    names = ["token_weight", "position_weight", "segment_weight", "norm_weight", "norm_bias"]
    assert list(layer.state_dict()) == names and layer.padding_idx == 29
    assert not layer.token_weight[29].any() and layer.token_weight[28].any()
    ids, segments = torch.randint(30, (3, 10)), torch.randint(2, (3, 10))
    parts = layer.token_weight[ids] + layer.position_weight[:10]
    parts = parts + layer.segment_weight[segments]
    expected = F.layer_norm(parts, (16,))
    torch.testing.assert_close(layer.eval()(ids, segments), expected)
    torch.testing.assert_close(layer(ids), layer(ids, torch.zeros_like(ids)))
    out = layer.train()(ids, segments)
    dropped = out == 0
    assert 0.3 < dropped.float().mean() < 0.7
    torch.testing.assert_close(out[~dropped], 2 * expected[~dropped])
    out.square().sum().backward()
    assert not layer.token_weight.grad[29].any()
    assert not layer.position_weight.grad[10:].any() and layer.position_weight.grad[9].any()


def test_sinusoidal_positions():
    layer = TokenPositionEmbedding(30, 16, position="sinusoidal", norm=None, scale=4.0)
    assert list(layer.state_dict()) == ["token_weight"]
    ids = torch.randint(30, (3, 10))
    added = SinusoidalPosition(16, batch_first=True)
    expected = added(layer.token_weight[ids] * 4)
    torch.testing.assert_close(layer(ids), expected)
    torch.testing.assert_close(layer(ids[:, 7:], offset=7), expected[:, 7:])
    far = torch.randint(100_000, (3, 10))
    rows = added(torch.zeros(100_000, 16))
    torch.testing.assert_close(layer(ids, positions=far) - rows[far], layer.token_weight[ids] * 4)
    compiled = torch.compile(
        lambda i, p: layer(i, positions=p), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(ids, far), layer(ids, positions=far))
    assert layer.double()(ids).dtype == torch.float64
    with pytest.raises(ValueError, match="offset must be at least 0, got -1"):
        layer(ids, offset=-1)


def test_decoding_goes_on_where_it_stopped():
    layer = TokenPositionEmbedding(30, 16, 12, norm="rms")
    ids = torch.randint(30, (3, 10))
    whole = layer(ids)
    for n in range(10):
        assert torch.equal(layer(ids[:, n : n + 1], offset=n), whole[:, n : n + 1])
    with pytest.raises(IndexError, match="positions 3 to 12 are out of range for P = 12"):
        layer(ids, offset=3)


def test_without_positions_and_options_of_the_norm():
    ids = torch.randint(30, (3, 10))
    layer = TokenPositionEmbedding(30, 16, position=None, bias=False, dtype=torch.float64)
    assert list(layer.state_dict()) == ["token_weight", "norm_weight"]
    torch.testing.assert_close(layer(ids), F.layer_norm(layer.token_weight[ids], (16,)))
    layer = TokenPositionEmbedding(30, 16, position=None, norm="rms", elementwise_affine=False)
    assert list(layer.state_dict()) == ["token_weight"]
    torch.testing.assert_close(layer(ids), F.rms_norm(layer.token_weight[ids], (16,)))
    assert "position=None" in repr(layer) and "norm='rms'" in repr(layer)


def test_copies():
    for kind, length in (("sinusoidal", None), ("learned", 12)):
        layer = TokenPositionEmbedding(30, 16, length, position=kind)
        ids = torch.randint(30, (3, 10))
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(other(ids), layer(ids))


def test_sparse_gradient():
    ids = torch.tensor([[1, 7, 1], [2, 7, 7]])
    grads = []
    for sparse in (True, False):
        torch.manual_seed(1)
        layer = TokenPositionEmbedding(4000, 32, 3, sparse=sparse, padding_idx=2, scale=2.0)
        layer(ids).pow(3).sum().backward()
        grads.append(layer.token_weight.grad)
    ours, dense = grads
    assert ours.is_sparse and ours.is_coalesced() and ours.indices().tolist() == [[1, 7]]
    assert torch.equal(ours.to_dense(), dense)


@pytest.mark.cpu_only("the memory of gradients is kept on the CPU")
def test_gradient_memory_is_kept():
    layer = TokenPositionEmbedding(4000, 32, 3)
    places = set()
    for _ in range(3):
        layer(torch.randint(4000, (2, 3))).pow(3).sum().backward()
        places.add(layer.token_weight.grad.data_ptr())
        assert layer.token_weight.grad.any(1).sum() <= 6
        layer.zero_grad()
    assert len(places) == 1


def test_only_what_needs_a_gradient_gets_one():
    ids = torch.randint(30, (3, 10))
    layer = TokenPositionEmbedding(30, 16, 12, num_segments=2, dropout=0.1)
    for name, parameter in layer.named_parameters():
        layer.requires_grad_(False)
        parameter.requires_grad_()
        layer.zero_grad()
        layer(ids).pow(3).sum().backward()
        assert [n for n, p in layer.named_parameters() if p.grad is not None] == [name]
    with torch.no_grad():
        assert not layer(ids).requires_grad


def test_a_table_that_changes_before_backward():
    ids, token = torch.tensor([[1, 2]]), torch.randn(5, 4, requires_grad=True)
    for norm in (None, "layer"):
        out = token_position_embedding(ids, token, norm=norm)
        with torch.no_grad():
            token.mul_(2)
        if norm is None:
            out.sum().backward()
            assert token.grad.sum() == 8
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                out.sum().backward()


@pytest.mark.parametrize("norm", [None, "layer", "rms"])
def test_opcheck(norm):
    number = (None, "rms", "layer").index(norm)
    token, position, segment = torch.randn(9, 5), torch.randn(8, 5), torch.randn(2, 5)
    ids, segments, seed = torch.randint(9, (2, 3)), torch.randint(2, (2, 3)), torch.tensor(7)
    weight = torch.randn(5) if norm else None
    bias = torch.randn(5) if norm == "layer" else None
    rows = (ids, token, position, None, 1, 3, segment, segments, 2.0)
    args = (*rows, weight, bias, seed, number, 1e-5, 0.5)
    torch.library.opcheck(torch.ops.lmkern.token_position_forward.default, args)
    out, statistics = torch.ops.lmkern.token_position_forward(*args)
    for need in (True, False):
        args = (out, *rows, statistics, weight, seed, number, 0.5, need, need, need and number > 0, need and norm == "layer")  # fmt: skip
        torch.library.opcheck(torch.ops.lmkern.token_position_backward.default, args)


@pytest.mark.parametrize("options", [{"norm": None}, {"norm": "layer"}, {"norm": "rms", "sparse": True, "bias": False}], ids=str)  # fmt: skip
def test_compile_fullgraph(options):
    torch.compiler.reset()  # compilations are counted for each code object, which the cases share
    layer = TokenPositionEmbedding(30, 16, 12, num_segments=2, scale=2.0, **options)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for length in (10, 12, 7):
        ids = torch.randint(30, (3, length))
        results = []
        for f in (layer, compiled):
            layer.zero_grad()
            out = f(ids)
            out.pow(3).sum().backward()
            grads = [p.grad.to_dense() if p.grad.is_sparse else p.grad for p in layer.parameters()]
            results.append([out.detach(), *grads])
        torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-5)
    layer.dropout = 0.5
    out = torch.compile(layer, fullgraph=True, backend="aot_eager")(ids)
    assert 0.2 < (out == 0).float().mean() < 0.8


def test_functorch():
    token, position = torch.randn(9, 5), torch.randn(8, 5)
    ids = torch.randint(9, (4, 2, 3))
    expected = reference.token_position_embedding(ids, token, position, norm="layer")
    mapped = torch.func.vmap(lambda i: token_position_embedding(i, token, position, norm="layer"))
    torch.testing.assert_close(mapped(ids), expected)
    _, tangent = torch.func.jvp(
        lambda t: token_position_embedding(ids, t, position, norm="rms"), (token,), (token,)
    )
    assert tangent.shape == expected.shape
    grad = torch.func.grad(lambda t: token_position_embedding(ids, t).sum())(token)
    torch.testing.assert_close(grad[:, 0], torch.bincount(ids.flatten(), minlength=9).float())


@pytest.mark.usefixtures("fallback_allowed")
def test_without_a_kernel():
    token, ids = torch.randn(5, 3, dtype=torch.complex64), torch.tensor([1, 2, 1])
    assert torch.equal(token_position_embedding(ids, token, token), token[ids] + token[:3])


def test_gpt_takes_it(monkeypatch):
    config = GPTConfig(vocab_size=30, block_size=16, n_layer=1, n_head=2, n_embd=16)
    models = []
    for backend in ("lmkern", "torch"):
        torch.manual_seed(0)
        models.append(GPT(config, backend=backend))
    assert list(models[0].state_dict()) == list(models[1].state_dict())
    ids = torch.randint(30, (2, 9))
    called, kernels = [], kernels_of(torch.empty(0))
    kernel = kernels.token_position_forward
    monkeypatch.setattr(
        kernels, "token_position_forward", lambda *a: (called.append(1), kernel(*a))[1]
    )
    results = []
    for model in models:
        logits, _ = model(ids)
        logits.square().sum().backward()
        results.append([logits.detach(), *(p.grad for p in model.parameters())])
    assert called == [1]
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda f: f(0, 4, 2), "num_embeddings and embedding_dim must be at least 1, got 0 and 4"),
        (lambda f: f(5, 4), "max_length must be at least 1 for position = 'learned'"),
        (lambda f: f(5, 4, 0), "max_length must be at least 1 for position = 'learned'"),
        (lambda f: f(5, 4, 3, position=None), "and None for others, got 3"),
        (lambda f: f(5, 4, 3, position="rotary"), "position must be 'learned', 'sinusoidal' or None, got 'rotary'"),
        (lambda f: f(5, 4, 3, num_segments=-1), "num_segments must be at least 0, got -1"),
        (lambda f: f(5, 4, 3, norm="batch"), "norm must be 'layer', 'rms' or None, got 'batch'"),
        (lambda f: f(5, 4, 3, dropout=math.inf), r"dropout must be in \[0, 1\], got inf"),
        (lambda f: f(5, 4, 3, padding_idx=5), r"padding_idx must be in \[-5, 5\), got 5"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call(lmkern.nn.TokenPositionEmbedding)
