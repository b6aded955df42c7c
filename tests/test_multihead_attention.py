"""lmkern.nn.MultiheadAttention against torch's."""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import lmkern
from lmkern.nn import MultiheadAttention, RotaryPosition
from oracle import EPSILON, relative_error

E, H = 12, 3

CONFIGS = {
    "plain": {},
    "no-bias": {"bias": False},
    "kdim": {"kdim": 7, "vdim": 5},
    "kdim-no-bias": {"kdim": 7, "vdim": 5, "bias": False},
    "vdim": {"vdim": 9},
    "bias-kv": {"add_bias_kv": True},
    "zero-attn": {"add_zero_attn": True},
    "both": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 7},
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))


@pytest.fixture(autouse=True)
def _one_way_of_torch():
    """torch's fast path for evaluation gives other results for padding; its slow path is the truth."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def pair(dtype=torch.float64, embed=E, heads=H, **config):
    torch.manual_seed(3)
    theirs = torch.nn.MultiheadAttention(embed, heads, dtype=dtype, **config)
    torch.manual_seed(3)
    ours = MultiheadAttention(embed, heads, dtype=dtype, **config)
    with torch.no_grad():  # biases start as zeros, which hide mistakes
        for p in theirs.parameters():
            if p.dim() == 1:
                p.normal_()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def inputs(layer, B=2, L=4, S=5, dtype=torch.float64):
    """query, key, value in the layout of the layer; B = 0 is unbatched."""
    shapes = [(L, layer.embed_dim), (S, layer.kdim), (S, layer.vdim)]
    if B:
        shapes = [(B, n, w) if layer.batch_first else (n, B, w) for n, w in shapes]
    return [torch.randn(s, dtype=dtype) for s in shapes]


def run(layer, args, **options):
    """Output, weights, and the gradients of inputs and parameters."""
    leaves = [x.clone().requires_grad_() for x in args]
    layer.zero_grad()
    out, weights = layer(*leaves, **options)
    generator = torch.Generator().manual_seed(0)
    loss = (out * torch.randn(out.shape, generator=generator).to(out.dtype)).sum()
    if weights is not None:
        loss = loss + (weights * torch.randn(weights.shape, generator=generator)).sum()
    loss.backward()
    results = {"out": out.detach(), "weights": None if weights is None else weights.detach()}
    results |= {f"input {i}": x.grad for i, x in enumerate(leaves)}
    return results | {name: p.grad for name, p in layer.named_parameters()}


def assert_same(ours, theirs):
    assert list(ours) == list(theirs)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], msg=lambda m, n=name: f"{n}: {m}")


def compare(layers, args, **options):
    ours, theirs = layers
    assert_same(run(ours, args, **options), run(theirs, args, **options))


@each_config
def test_parameters_are_torchs(config):
    torch.manual_seed(3)
    theirs = torch.nn.MultiheadAttention(E, H, **config)
    after = torch.random.get_rng_state()
    torch.manual_seed(3)
    ours = MultiheadAttention(E, H, **config)
    assert torch.equal(torch.random.get_rng_state(), after)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    for name, p in theirs.named_parameters():
        assert ours.get_parameter(name).shape == p.shape
    theirs.load_state_dict(ours.state_dict())
    for name in ("in_proj_weight", "q_proj_weight", "in_proj_bias", "bias_k", "bias_v"):
        assert (getattr(ours, name) is None) == (getattr(theirs, name) is None)


def test_signatures_are_torchs():
    for ours, theirs in (
        (MultiheadAttention.__init__, torch.nn.MultiheadAttention.__init__),
        (MultiheadAttention.forward, torch.nn.MultiheadAttention.forward),
    ):
        mine = list(inspect.signature(ours).parameters.values())
        same = list(inspect.signature(theirs).parameters.values())
        assert [(p.name, p.default, p.kind) for p in mine[: len(same)]] == [
            (p.name, p.default, p.kind) for p in same
        ]
        assert all(p.kind is p.KEYWORD_ONLY for p in mine[len(same) :])


@each_config
@pytest.mark.parametrize("batch_first", [False, True], ids=["LBE", "BLE"])
@pytest.mark.parametrize("batch", [0, 1, 2], ids=["unbatched", "B1", "B2"])
def test_forward_and_gradients(config, batch_first, batch):
    layers = pair(batch_first=batch_first, **config)
    args = inputs(layers[0], batch)
    compare(layers, args)
    compare(layers, args, need_weights=False)
    compare(layers, args, average_attn_weights=False)


@pytest.mark.parametrize("batch_first", [False, True], ids=["LBE", "BLE"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_self_attention_and_shared_key_and_value(batch_first, bias):
    ours, theirs = pair(batch_first=batch_first, bias=bias)
    for arrange in (
        lambda x, y: (x, x, x),
        lambda x, y: (x, y, y),
        lambda x, y: (x, y, x),
        lambda x, y: (x, x, y),
    ):
        results = []
        for layer in (ours, theirs):
            torch.manual_seed(1)
            x, y = (torch.randn(3, 3, E, dtype=torch.float64, requires_grad=True) for _ in "xy")
            layer.zero_grad()
            out, weights = layer(*arrange(x, y))
            (out.square().sum() + weights.square().sum()).backward()
            grads = [p.grad for p in layer.parameters()]
            results.append([out, weights, x.grad, y.grad if y.grad is not None else x.grad, *grads])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


def mask_of(kind, *shape):
    """A mask in the sense of torch's layer that hides a part; the first key is never hidden."""
    hidden = torch.rand(shape) > 0.6
    hidden[..., 0] = False
    if kind == "bool":
        return hidden
    return torch.randn(shape, dtype=torch.float64).masked_fill(hidden, -math.inf)


@pytest.mark.filterwarnings("ignore:Support for mismatched")  # deprecated there, not here
@pytest.mark.parametrize("config", ["plain", "bias-kv", "zero-attn", "both"])
@pytest.mark.parametrize("padding", [None, "bool", "float"])
@pytest.mark.parametrize("attn", [None, "bool", "float", "bool3", "float3"])
@pytest.mark.parametrize("batch", [0, 2], ids=["unbatched", "B2"])
def test_masks(config, padding, attn, batch):
    layers = pair(**CONFIGS[config])
    L, S = 4, 5
    args = inputs(layers[0], batch, L, S)
    options = {}
    if padding:
        options["key_padding_mask"] = mask_of(padding, *([batch] * bool(batch)), S)
    if attn:
        lead = ((batch or 1) * H,) if attn[-1] == "3" else ()
        options["attn_mask"] = mask_of(attn.rstrip("3"), *lead, L, S)
    compare(layers, args, **options)
    compare(layers, args, need_weights=False, **options)
    compare(layers, args, average_attn_weights=False, **options)


@pytest.mark.parametrize("config", ["plain", "both"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("need_weights", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("L", [5, 3], ids=["square", "shorter"])
def test_is_causal_with_and_without_its_mask(config, padded, need_weights, L):
    """torch needs the mask; ours means the same without."""
    ours, theirs = pair(**CONFIGS[config])
    args = inputs(ours, 2, L, 5)
    causal = torch.ones(L, 5, dtype=torch.bool).triu(1)
    options = {"need_weights": need_weights}
    if padded:
        options["key_padding_mask"] = mask_of("bool", 2, 5)
    expected = run(theirs, args, attn_mask=causal, **options)
    assert_same(run(ours, args, attn_mask=causal, **options), expected)
    assert_same(run(ours, args, is_causal=True, **options), expected)
    assert_same(run(ours, args, attn_mask=causal, is_causal=True, **options), expected)


def test_gradient_of_a_mask_survives_the_hint():
    ours, theirs = pair()
    args = inputs(ours, 2, 4, 4)
    gradients = []
    for layer, causal in ((ours, True), (theirs, False)):
        mask = torch.zeros(4, 4, dtype=torch.float64).masked_fill(
            torch.ones(4, 4).triu(1) > 0, -1e9
        )
        mask.requires_grad_()
        layer(*args, attn_mask=mask, is_causal=causal)[0].square().sum().backward()
        gradients.append(mask.grad)
    torch.testing.assert_close(*gradients)


def test_padding_is_never_spread_over_the_queries(monkeypatch):
    seen = []
    real = lmkern.nn.attention.scaled_dot_product_attention
    monkeypatch.setattr(
        lmkern.nn.attention, "scaled_dot_product_attention",
        lambda q, k, v, mask, **o: (seen.append((mask, o)), real(q, k, v, mask, **o))[1],
    )  # fmt: skip
    ours, _ = pair()
    args = inputs(ours, 2, 4, 5)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    ours(*args, key_padding_mask=padding, is_causal=True, need_weights=False)
    (mask, options), = seen  # fmt: skip
    assert mask.shape == (2, 1, 1, 5) and options["window"] == (-1, 0)


def test_key_lengths_are_a_padding_mask_with_a_tail():
    lengths = torch.tensor([5, 1, 3])
    padding = torch.arange(5) >= lengths[:, None]
    for config in ("plain", "both"):
        ours, theirs = pair(**CONFIGS[config])
        args = inputs(ours, 3, 4, 5)
        expected = run(theirs, args, key_padding_mask=padding)
        assert_same(run(ours, args, key_lengths=lengths), expected)


@pytest.mark.parametrize("need_weights", [False, True], ids=["", "weights"])
def test_queries_without_keys_give_zeros_where_torch_gives_nan(need_weights):
    ours, theirs = pair()
    args = inputs(ours, 2, 4, 5)
    padding = torch.tensor([[True] * 5, [False] * 5])
    results = run(ours, args, key_padding_mask=padding, need_weights=need_weights)
    assert theirs(*args, key_padding_mask=padding)[0][:, 0].isnan().all()
    assert all(x.isfinite().all() for x in results.values() if x is not None)
    torch.testing.assert_close(results["out"][:, 0], ours.out_proj.bias.detach().expand(4, E))
    torch.testing.assert_close(results["out"][:, 1], theirs(*args)[0][:, 1].detach())
    assert (results["input 1"][:, 0] == 0).all() and (results["input 0"][:, 0] == 0).all()
    if need_weights:
        assert (results["weights"][0] == 0).all()


def test_training_and_evaluation_are_one_path():
    ours, _ = pair(torch.float32, batch_first=True)
    x = torch.randn(2, 5, E)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    train = ours(x, x, x, key_padding_mask=padding)
    ours.eval()
    for grad in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with grad():
            for a, b in zip(train, ours(x, x, x, key_padding_mask=padding), strict=True):
                assert torch.equal(a, b)


def test_dropout_acts_in_training_and_shows_in_the_weights():
    ours, _ = pair(dropout=0.5)
    x = torch.randn(30, 4, E, dtype=torch.float64)
    _, weights = ours(x, x, x, average_attn_weights=False)
    assert 0.45 < (weights == 0).double().mean() < 0.55
    out, weights = ours.eval()(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(weights.sum(-1), torch.ones(4, H, 30, dtype=torch.float64))
    assert torch.equal(out, ours(x, x, x)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("need_weights", [False, True], ids=["", "weights"])
def test_oracle(dtype, need_weights):
    exact = pair(embed=64, heads=4, batch_first=True)[1]
    args = inputs(exact, 2, 33, 41)
    layers = [layer.to(dtype) for layer in pair(embed=64, heads=4, batch_first=True)]
    exact.load_state_dict(layers[0].double().state_dict())
    layers[0].to(dtype)
    truth = run(exact, [x.to(dtype).double() for x in args], need_weights=need_weights)
    ours, theirs = (
        run(layer, [x.to(dtype) for x in args], need_weights=need_weights) for layer in layers
    )
    for name, t in truth.items():
        if t is None:
            continue
        if name == "in_proj_bias":  # softmax does not see a bias of the keys: rounding alone
            ours[name], theirs[name], t = (
                torch.cat(x[name].chunk(3)[::2]) for x in (ours, theirs, truth)
            )
        assert ours[name].dtype == theirs[name].dtype
        limit = 2 * relative_error(theirs[name], t) + EPSILON[dtype]
        assert relative_error(ours[name], t) <= limit, name


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_call_form(data):
    draw = data.draw
    groups = draw(st.integers(1, 3))
    config = {
        "bias": draw(st.booleans()),
        "add_bias_kv": draw(st.booleans()),
        "add_zero_attn": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "kdim": draw(st.sampled_from([None, 5])),
        "vdim": draw(st.sampled_from([None, 6])),
    }
    layers = pair(embed=4 * groups, heads=groups, **config)
    B, L, S = draw(st.integers(0, 3)), draw(st.integers(1, 6)), draw(st.integers(1, 6))
    options = {"need_weights": draw(st.booleans()), "average_attn_weights": draw(st.booleans())}
    kind = draw(st.sampled_from(["bool", "float"]))
    if draw(st.booleans()):
        options["key_padding_mask"] = mask_of(kind, *([B] * bool(B)), S)
    if draw(st.booleans()):
        lead = ((B or 1) * groups,) if draw(st.booleans()) else ()
        options["attn_mask"] = mask_of(kind, *lead, L, S)
    compare(layers, inputs(layers[0], B, L, S), **options)


def test_pickle_deepcopy_and_repr():
    ours, _ = pair(**CONFIGS["both"])
    ours.rotary = RotaryPosition(4)
    args = inputs(ours)
    expected = ours(*args)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for other in (
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(file, weights_only=False),
    ):
        for a, b in zip(other(*args), expected, strict=True):
            assert torch.equal(a, b)
    assert repr(ours).startswith(
        "MultiheadAttention(\n  12, 3, add_zero_attn=True, kdim=7, add_bias_kv=True"
    )


def test_compile_autocast_and_meta():
    ours, _ = pair(torch.float32, batch_first=True)
    x = torch.randn(2, 5, E)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    for options in ({}, {"is_causal": True, "need_weights": False, "key_padding_mask": padding}):
        for a, b in zip(compiled(x, x, x, **options), ours(x, x, x, **options), strict=True):
            torch.testing.assert_close(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(x, x, x)[0]
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), ours(x, x, x)[0], atol=3e-2, rtol=3e-2)
    meta = MultiheadAttention(E, H, device="meta")
    assert meta(*(x.to("meta") for x in inputs(meta, dtype=torch.float32)))[0].is_meta


def test_torchs_encoder_layer_calls_it_rather_than_its_parameters():
    layer = torch.nn.TransformerEncoderLayer(E, 2, 8, batch_first=True).eval()
    x = torch.randn(2, 5, E)
    torch.backends.mha.set_fastpath_enabled(True)
    called = []
    with torch.no_grad():
        expected = layer(x)
        ours = MultiheadAttention(E, 2, batch_first=True)
        ours.load_state_dict(layer.self_attn.state_dict())
        layer.self_attn = ours.eval()
        ours.register_forward_hook(lambda *a: called.append(1))
        torch.testing.assert_close(layer(x), expected)
        del ours._forward_hooks[next(iter(ours._forward_hooks))]
        ours.window = (0, 0)
        assert not torch.allclose(layer(x), expected) and called


# ---- what torch's does not have ------------------------------------------------------------------


def heads_of(layer, x):
    """The projections of self-attention, [B, heads, L, D], from a [B, L, E] input."""
    D, K = layer.head_dim, layer.num_kv_heads
    parts = F.linear(x, layer.in_proj_weight, layer.in_proj_bias).split(
        [layer.embed_dim, K * D, K * D], -1
    )
    return [p.unflatten(-1, (-1, D)).transpose(1, 2) for p in parts]


def test_grouped_queries():
    layer = MultiheadAttention(12, 6, num_kv_heads=2, batch_first=True, dtype=torch.float64)
    assert layer.in_proj_weight.shape == (12 + 2 * 4, 12) and layer.in_proj_bias.shape == (20,)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    out, weights = layer(x, x, x, average_attn_weights=False)
    q, k, v = heads_of(layer, x)
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out, layer.out_proj(expected))
    assert weights.shape == (2, 6, 5, 5)
    other = MultiheadAttention(12, 6, num_kv_heads=3, kdim=5, vdim=7, add_bias_kv=True)
    assert other.k_proj_weight.shape == (6, 5) and other.v_proj_weight.shape == (6, 7)
    assert other(*inputs(other, dtype=torch.float32))[0].shape == (4, 2, 12)


def test_window_softcap_alibi_and_rotary():
    slopes = lmkern.nn.alibi_slopes(3, dtype=torch.float64)
    rotary = RotaryPosition(4)
    layer = MultiheadAttention(
        E, H, batch_first=True, dtype=torch.float64, window=(2, 1), softcap=0.5, alibi=True, rotary=rotary
    )  # fmt: skip
    assert set(layer.state_dict()) == set(torch.nn.MultiheadAttention(E, H).state_dict())
    x = 3 * torch.randn(2, 6, E, dtype=torch.float64)
    q, k, v = heads_of(layer, x)
    q, k = rotary(q, k)
    distance = torch.arange(6)[:, None] - torch.arange(6)
    s = 0.5 * torch.tanh(q @ k.mT / 2 / 0.5) - slopes[:, None, None] * distance.abs()
    s = s.masked_fill((distance > 2) | (distance < -1), -math.inf)
    expected = layer.out_proj((s.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, x, x)[0], expected)
    y = x.clone()  # not the same tensor: turned by itself
    torch.testing.assert_close(layer(x, y, y)[0], expected)


def test_appended_keys_stand_outside_of_the_window():
    layer = MultiheadAttention(E, H, add_zero_attn=True, window=(0, 0), batch_first=True)
    x = torch.randn(1, 3, E)
    weights = layer(x, x, x)[1]
    assert torch.equal(weights[0] > 0, torch.cat([torch.eye(3), torch.ones(3, 1)], 1) > 0)


def _bad(**change):
    x = torch.randn(4, 2, E)
    return {**{"query": x, "key": x, "value": x}, **change}


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (_bad(query=torch.randn(4, 2, 11)), ValueError, r"query must be \[L, B, E\] or \[L, E\], like query, with E = 12, got \[4, 2, 11\]"),
        (_bad(key=torch.randn(4, E)), ValueError, "key must be"),
        (_bad(query=torch.randn(E)), ValueError, "query must be"),
        (_bad(key=torch.randn(5, 2, E)), ValueError, r"value must have the lengths of key, \[5, 2\], got \[4, 2\]"),
        (_bad(query=torch.randn(4, 3, E)), ValueError, "key must have B = 3 like query, got 2"),
        (_bad(query=torch.randn(4, 2, E).double()), TypeError, "query must be torch.float32 like the parameters, got torch.float64"),
        (_bad(key_padding_mask=torch.zeros(4, 2) > 0), ValueError, r"key_padding_mask must be \[B, S\] = \[2, 4\], got \[4, 2\]"),
        (_bad(key_padding_mask=torch.zeros(2, 4).int()), TypeError, "key_padding_mask must be bool or floating"),
        (_bad(attn_mask=torch.zeros(4, 5)), ValueError, r"attn_mask must be \[L, S\] = \[4, 4\] or \[B H, L, S\] = \[6, 4, 4\], got \[4, 5\]"),
        (_bad(attn_mask=torch.zeros(4, 4).long()), TypeError, "attn_mask must be bool or floating"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_bad_arguments(arguments, error, match):
    with pytest.raises(error, match=match) as caught:
        MultiheadAttention(E, H)(**arguments)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("MultiheadAttention: ")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"embed_dim": 0, "num_heads": 1}, "embed_dim must be greater than 0, got 0"),
        ({"embed_dim": 4, "num_heads": 0}, "num_heads must be greater than 0, got 0"),
        ({"embed_dim": 5, "num_heads": 2}, "embed_dim must be divisible by num_heads, got 5 and 2"),
        ({"embed_dim": 8, "num_heads": 4, "num_kv_heads": 3}, "num_heads must be a multiple of num_kv_heads"),
        ({"embed_dim": 8, "num_heads": 4, "dropout": 1.5}, r"dropout must be in \[0, 1\], got 1.5"),
        ({"embed_dim": 8, "num_heads": 4, "window": (1,)}, "window must be"),
        ({"embed_dim": 8, "num_heads": 4, "alibi": True, "add_zero_attn": True}, "alibi must be False"),
        ({"embed_dim": 8, "num_heads": 4, "rotary": RotaryPosition(4)}, "rotary must be for heads of 2, got 4"),
    ],
)  # fmt: skip
def test_bad_constructor_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        MultiheadAttention(**arguments)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused():
    x = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(2, E)])
    with pytest.raises(TypeError, match="query must not be nested"):
        MultiheadAttention(E, H, batch_first=True)(x, x, x)
