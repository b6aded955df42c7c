"""lmkern.nn's Transformer and its parts against torch's."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F

import lmkern

E, H, FF = 12, 3, 20
pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
CLASSES = [
    "TransformerEncoderLayer", "TransformerDecoderLayer", "TransformerEncoder", "TransformerDecoder",
    "Transformer",
]  # fmt: skip
CONFIGS = {
    "post": {},
    "pre": {"norm_first": True},
    "gelu": {"activation": "gelu"},
    "callable": {"activation": F.silu, "layer_norm_eps": 1e-3},
    "no-bias": {"bias": False, "batch_first": True},
    "all": {"norm_first": True, "bias": False, "activation": torch.nn.GELU()},
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))


@pytest.fixture(autouse=True)
def _one_way_of_torch():
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def build(library, name, layers=2, dtype=torch.float64, dropout=0.0, **config):
    """A module of torch.nn or lmkern.nn, from seed 3, and the state of the generator after it."""
    torch.manual_seed(3)
    options = {"dim_feedforward": FF, "dropout": dropout, "dtype": dtype, **config}
    if name == "Transformer":
        module = library.Transformer(E, H, layers, layers, **options)
    elif name.endswith("Layer"):
        module = getattr(library, name)(E, H, **options)
    else:
        layer = getattr(library, f"{name}Layer")(E, H, **options)
        extra = {"enable_nested_tensor": False} if name == "TransformerEncoder" else {}
        module = getattr(library, name)(layer, layers, torch.nn.LayerNorm(E, dtype=dtype), **extra)
    return module, torch.random.get_rng_state()


def pair(name, **config):
    (theirs, _), (ours, _) = build(torch.nn, name, **config), build(lmkern.nn, name, **config)
    with torch.no_grad():  # copies of a layer are equal, and biases zero: both hide mistakes
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    # torch's decoder layers forget an activation that is a module when they are copied, and run ReLU.
    for module in theirs.modules():
        if isinstance(module, torch.nn.TransformerDecoderLayer) and "activation" in module._modules:
            module.__dict__.pop("activation", None)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def run(module, args, **masks):
    """Output, and the gradients of inputs and parameters."""
    leaves = [x.clone().requires_grad_() for x in args]
    module.zero_grad()
    out = module(*leaves, **masks)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=out.dtype)
    (out * weight).sum().backward()
    results = {"out": out.detach()} | {f"input {i}": x.grad for i, x in enumerate(leaves)}
    return results | {n: p.grad for n, p in module.named_parameters()}


def assert_same(ours, theirs):
    assert list(ours) == list(theirs)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], msg=lambda m, n=name: f"{n}: {m}")


def inputs(name, batch_first=False, batch=2, L=4, S=5, **_):
    """[src], [tgt, memory] or [src, tgt]; batch = 0 is unbatched."""
    lengths = {"Enc": [S], "Dec": [L, S]}.get(name[11:14], [S, L])
    shapes = [(batch, n) if batch_first else (n, batch) for n in lengths]
    return [
        torch.randn(*(shape if batch else (n,)), E, dtype=torch.float64)
        for n, shape in zip(lengths, shapes, strict=True)
    ]


def padding(*lengths, size):
    return torch.arange(size) >= torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("name", CLASSES)
def test_signatures_are_torchs(name):
    for method in ("__init__", "forward"):
        ours, theirs = (
            inspect.signature(getattr(getattr(library, name), method)).parameters.values()
            for library in (lmkern.nn, torch.nn)
        )
        assert [(p.name, p.default, p.kind) for p in ours] == [
            (p.name, p.default, p.kind) for p in theirs
        ]


@each_config
@pytest.mark.parametrize("name", CLASSES)
def test_parameters_are_torchs(name, config):
    (theirs, after), (ours, other) = (
        build(torch.nn, name, **config),
        build(lmkern.nn, name, **config),
    )
    assert torch.equal(after, other)
    expected = theirs.state_dict()
    assert list(ours.state_dict()) == list(expected)
    for key, value in ours.state_dict().items():
        assert torch.equal(value, expected[key]), key
    theirs.load_state_dict(ours.state_dict())


@each_config
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("batch", [0, 2], ids=["unbatched", "B2"])
def test_forward_and_gradients(name, config, batch):
    ours, theirs = pair(name, **config)
    args = inputs(name, batch=batch, **config)
    assert_same(run(ours, args), run(theirs, args))


ENCODER_MASKS = [
    {"mask": "causal"},
    {"mask": "causal bool"},
    {"mask": "random"},
    {"padding": True},
    {"mask": "causal bool", "padding": True},
    {"mask": "causal", "is_causal": True},
    {"mask": "causal", "is_causal": False},
]


def masks_of(kind, size):
    if kind == "causal":
        return lmkern.nn.Transformer.generate_square_subsequent_mask(size, dtype=torch.float64)
    hidden = torch.ones(size, size, dtype=torch.bool).triu(1)
    return hidden if kind == "causal bool" else torch.randn(size, size, dtype=torch.float64)


@pytest.mark.parametrize("case", ENCODER_MASKS, ids=str)
@pytest.mark.parametrize("batch_first", [False, True], ids=["LBE", "BLE"])
def test_masks_of_the_encoder(case, batch_first):
    for name in ("TransformerEncoder", "TransformerEncoderLayer"):
        ours, theirs = pair(name, batch_first=batch_first)
        args = inputs(name, batch_first)
        key = "mask" if name == "TransformerEncoder" else "src_mask"
        masks = {key: masks_of(case["mask"], 5)} if "mask" in case else {}
        if case.get("padding"):
            masks["src_key_padding_mask"] = padding(5, 3, size=5)
        if "is_causal" in case:
            masks["is_causal"] = case["is_causal"]
        assert_same(run(ours, args, **masks), run(theirs, args, **masks))


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("kind", ["causal", "causal bool"])
@pytest.mark.parametrize("name", ["TransformerDecoderLayer", "TransformerDecoder"])
def test_masks_of_the_decoder(name, kind, norm_first):
    ours, theirs = pair(name, norm_first=norm_first)
    args = inputs(name)
    masks = {
        "tgt_mask": masks_of(kind, 4),
        "memory_mask": torch.randn(4, 5, dtype=torch.float64),
        "tgt_key_padding_mask": padding(4, 2, size=4),
        "memory_key_padding_mask": padding(3, 5, size=5),
    }
    expected = run(theirs, args, **masks)
    assert_same(run(ours, args, **masks), expected)
    assert_same(run(ours, args, tgt_is_causal=True, **masks), expected)
    del masks["tgt_mask"]
    assert_same(run(ours, args, tgt_is_causal=True, **masks), expected)
    masks = {"memory_mask": torch.ones(4, 5, dtype=torch.bool).triu(1)}
    expected = run(theirs, args, **masks)
    assert_same(run(ours, args, memory_is_causal=True), expected)
    assert_same(run(ours, args, memory_is_causal=True, **masks), expected)


@pytest.mark.parametrize("batch_first", [False, True], ids=["LBE", "BLE"])
def test_masks_of_the_whole(batch_first):
    ours, theirs = pair("Transformer", batch_first=batch_first)
    args = inputs("Transformer", batch_first)
    masks = {
        "src_mask": torch.rand(5, 5).fill_diagonal_(1) < 0.3,
        "tgt_mask": masks_of("causal bool", 4),
        "memory_mask": torch.rand(4, 5) < 0.3,
        "src_key_padding_mask": padding(5, 4, size=5),
        "tgt_key_padding_mask": padding(2, 4, size=4),
        "memory_key_padding_mask": padding(5, 4, size=5),
    }
    masks["memory_mask"][:, 0] = False
    expected = run(theirs, args, **masks)
    assert_same(run(ours, args, **masks), expected)
    assert_same(run(ours, args, **masks, tgt_is_causal=True, src_is_causal=False), expected)


def test_the_causal_mask_is_recognised(monkeypatch):
    seen = []
    real = lmkern.nn.attention.scaled_dot_product_attention
    monkeypatch.setattr(
        lmkern.nn.attention, "scaled_dot_product_attention",
        lambda q, k, v, mask, **o: (seen.append((mask, o["window"])), real(q, k, v, mask, **o))[1],
    )  # fmt: skip
    encoder, _ = pair("TransformerEncoder", layers=1)
    x = inputs("TransformerEncoder")[0]
    for kind in ("causal", "causal bool"):
        encoder(x, mask=masks_of(kind, 5))
        assert seen.pop() == (None, (-1, 0))
    for mask in (masks_of("random", 5), ~masks_of("causal bool", 5).T, torch.zeros(5, 5).double()):
        encoder(x, mask=mask)
        assert seen.pop()[1] == (-1, -1)


@pytest.mark.parametrize("name", CLASSES)
def test_training_and_evaluation_are_one_path(name):
    torch.backends.mha.set_fastpath_enabled(True)
    ours, _ = build(lmkern.nn, name, dropout=0.3, batch_first=True, dtype=torch.float32)
    still, _ = build(lmkern.nn, name, dropout=0.0, batch_first=True, dtype=torch.float32)
    args = [x.float() for x in inputs(name, True)]
    assert not torch.equal(ours(*args), still(*args))  # dropout acts
    ours.eval()
    with torch.no_grad():
        assert torch.equal(ours(*args), still(*args))


def test_dropout_is_where_torch_has_it():
    """Everything but the attention's own: the same seed drops the same."""
    for name in ("TransformerEncoderLayer", "TransformerDecoderLayer"):
        ours, theirs = pair(name, dropout=0.4)
        for attention in ("self_attn", "multihead_attn"):
            for layer in (ours, theirs):
                if hasattr(layer, attention):
                    getattr(layer, attention).dropout = 0.0
        args, results = inputs(name), []
        for layer in (ours, theirs):
            torch.manual_seed(5)
            results.append(layer(*args))
        torch.testing.assert_close(*results)


def test_rows_that_see_nothing_are_finite():
    ours, theirs = pair("TransformerEncoder")
    args = inputs("TransformerEncoder")
    mask = padding(5, 0, size=5)
    results = run(ours, args, src_key_padding_mask=mask)
    assert all(x.isfinite().all() for x in results.values())
    # torch does the same here, where it needs no weights; MultiheadAttention's own test has the NaN.
    assert_same(results, run(theirs, args, src_key_padding_mask=mask))


@pytest.mark.parametrize("name", CLASSES)
def test_pickle_and_deepcopy(name):
    module, _ = build(lmkern.nn, name)
    args = inputs(name)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(*args), module(*args))


def test_custom_parts_and_layers_of_torch():
    ours, theirs = pair("Transformer")
    state = copy.deepcopy(
        ours.state_dict()
    )  # the constructor draws all parameters anew, as torch's
    mixed = lmkern.nn.Transformer(E, H, custom_encoder=theirs.encoder, custom_decoder=ours.decoder)
    mixed.load_state_dict(state)
    assert mixed.encoder is theirs.encoder
    args = inputs("Transformer")
    torch.testing.assert_close(mixed(*args), theirs(*args))
    layer = torch.nn.TransformerEncoderLayer(E, H, FF, dropout=0.0, dtype=torch.float64)
    stack = lmkern.nn.TransformerEncoder(layer, 2)
    x = inputs("TransformerEncoder")[0]
    mask = masks_of("causal", 5)
    torch.testing.assert_close(stack(x, mask), layer(layer(x, mask), mask))


def test_compile():
    ours, _ = pair("Transformer", layers=1)
    args = inputs("Transformer")
    masks = {"tgt_mask": masks_of("causal", 4), "src_key_padding_mask": padding(5, 3, size=5)}
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args, **masks), ours(*args, **masks))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: lmkern.nn.TransformerEncoderLayer(4, 2, activation="tanh"), "TransformerEncoderLayer: activation must be 'relu', 'gelu' or a callable, got 'tanh'"),
        (lambda: lmkern.nn.Transformer(4, 2, 1, 1, 4)(torch.zeros(3, 2, 4), torch.zeros(3, 2, 5)), r"Transformer: tgt must have d_model = 4 features, got \[3, 2, 5\]"),
        (lambda: lmkern.nn.Transformer(4, 2, 1, 1, 4)(torch.zeros(3, 2, 4), torch.zeros(3, 1, 4)), r"Transformer: tgt must have B = 2 like src, got \[3, 1, 4\]"),
    ],
    ids=["activation", "d_model", "batch"],
)  # fmt: skip
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_export():
    ours, _ = pair("Transformer", layers=1)
    args, masks = tuple(inputs("Transformer")), {"src_key_padding_mask": padding(5, 3, size=5)}
    program = torch.export.export(ours, args, masks)
    torch.testing.assert_close(program.module()(*args, **masks), ours(*args, **masks))


def test_torchs_encoder_takes_our_layer():
    layer, _ = build(lmkern.nn, "TransformerEncoderLayer", batch_first=True)
    stack = torch.nn.TransformerEncoder(layer, 2).eval()
    torch.backends.mha.set_fastpath_enabled(True)
    x = inputs("TransformerEncoder", True)[0]
    hidden = padding(5, 3, size=5)
    expected = layer(layer(x, None, hidden), None, hidden)
    with torch.no_grad():
        torch.testing.assert_close(stack(x, src_key_padding_mask=hidden), expected)
