"""What scaled_dot_product_attention has beyond torch's, against a loop over single queries.

``slow`` states every option a second time, query by query over the list of keys that it sees; it shares
no line with lmkern.reference.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lmkern.functional import scaled_dot_product_attention as attention
from oracle import assert_oracle

FLOATS = [torch.float32, torch.float64]
TOLERANCE = {
    torch.float32: {"atol": 2e-5, "rtol": 1e-4},
    torch.float64: {"atol": 1e-11, "rtol": 1e-9},
}


def heads(B, H, L, S, D, Dv, dtype=torch.float64, key_heads=None):
    shapes = [(B, H, L, D), (B, key_heads or H, S, D), (B, key_heads or H, S, Dv)]
    return [torch.randn(s, dtype=dtype) for s in shapes]


def slow_row(q, k, v, p, bias, seen, scale, softcap, slope, sink):
    """One query over the keys of the list ``seen``: out [Dv], lse, {key: weight}."""
    if not seen:
        return v.new_zeros(v.shape[1]), v.new_tensor(-math.inf) if sink is None else sink, {}
    logits = []
    for j in seen:
        s = scale * (q * k[j]).sum()
        if softcap is not None:
            s = softcap * torch.tanh(s / softcap)
        logits.append(s - (0.0 if slope is None else slope * abs(p - j)) + bias(j))
    logits = torch.stack(logits)
    top = logits.detach().max()
    if sink is not None:
        top = torch.maximum(top, sink.detach())
    e = (logits - top).exp()
    total = e.sum() if sink is None else e.sum() + (sink - top).exp()
    weights = e / total
    return weights @ v[seen], total.log() + top, dict(zip(seen, weights, strict=True))


def slow(q, k, v, mask=None, causal=False, scale=None, window=None, softcap=None, slopes=None,
         sinks=None, key_lengths=None, align="top_left"):  # fmt: skip
    """q [B, H, L, D], k and v [B, H_kv, S, ...], mask [B, H, L, S] -> out, lse, weights."""
    (B, H, L, D), S = q.shape, k.shape[2]
    scale = D**-0.5 if scale is None else scale
    out, lse, weights = [], [], []
    for b in range(B):
        keys = S if key_lengths is None else int(key_lengths[b])
        for h in range(H):
            g = h // (H // k.shape[1])
            slope = None if slopes is None else slopes.expand(B, H)[b, h]
            sink = None if sinks is None else sinks[h]
            for i in range(L):
                p = i + (keys - L if align == "bottom_right" else 0)
                seen = list(range(keys))
                if causal:
                    seen = [j for j in seen if j <= p]
                if window is not None and window[0] not in (None, -1):
                    seen = [j for j in seen if p - j <= window[0]]
                if window is not None and window[1] not in (None, -1):
                    seen = [j for j in seen if j - p <= window[1]]
                bias = lambda j: 0.0  # noqa: E731
                if mask is not None and mask.dtype == torch.bool:
                    seen = [j for j in seen if mask[b, h, i, j]]
                elif mask is not None:
                    row = mask[b, h, i]
                    seen = [j for j in seen if row[j] != -math.inf]
                    bias = row.__getitem__
                o, e, w = slow_row(
                    q[b, h, i], k[b, g], v[b, g], p, bias, seen, scale, softcap, slope, sink
                )
                out.append(o)
                lse.append(e)
                weights.append(
                    torch.stack([w.get(j, q.new_zeros(())) for j in range(S)])
                    if S
                    else q.new_zeros(0)
                )
    rows = (B, H, L)
    return (
        torch.stack(out).view(*rows, -1), torch.stack(lse).view(rows), torch.stack(weights).view(*rows, S),
    )  # fmt: skip


def results_and_gradients(f, inputs):
    """f's results, and the gradients of a fixed random combination of all that is finite in them."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    results = f(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(1)
    loss = sum(0.0 * x.masked_fill(x == -math.inf, 0.0).sum() for x in leaves)
    for r in results:
        weight = torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.dtype)
        loss = loss + (r.masked_fill(r.detach() == -math.inf, 0.0) * weight).sum()
    return [r.detach() for r in results] + list(torch.autograd.grad(loss, leaves))


def compare(ours, theirs, inputs):
    ours, theirs = results_and_gradients(ours, inputs), results_and_gradients(theirs, inputs)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(a, b, msg=lambda m, i=i: f"{i}: {m}", **TOLERANCE[a.dtype])


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_combination(data):
    """Every option with every other: outputs, and the gradients of all that has one."""
    draw = data.draw
    dtype = draw(st.sampled_from(FLOATS), "dtype")
    B, groups, repeat = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    L, S, D, Dv = (draw(st.integers(1, n)) for n in (5, 6, 4, 3))
    H = groups * repeat
    torch.manual_seed(draw(st.integers(0, 99)))
    q, k, v = (2 * x for x in heads(B, H, L, S, D, Dv, dtype, groups))
    causal = draw(st.booleans(), "causal")
    kind = (
        "none" if causal else draw(st.sampled_from(["none", "bool", "float", "broadcast"]), "mask")
    )
    side = st.one_of(st.none(), st.integers(-1, 4))
    window = draw(st.one_of(st.none(), st.tuples(side, side)), "window")
    softcap = draw(st.sampled_from([None, 1.5]), "softcap")
    scale = draw(st.sampled_from([None, 0.7]), "scale")
    align = draw(st.sampled_from(["top_left", "bottom_right"]), "align")
    slopes = draw(st.sampled_from([None, (H,), (B, H)]), "slopes")
    sinks = draw(st.booleans(), "sinks")
    lengths = draw(
        st.one_of(st.none(), st.lists(st.integers(0, S), min_size=B, max_size=B)), "lengths"
    )
    lse, weights = draw(st.booleans()), draw(st.sampled_from([None, "heads", "mean"]))

    mask = None
    if kind == "bool":
        mask = torch.rand(B, H, L, S) > 0.3
    elif kind != "none":
        mask = torch.randn((B, 1, 1, S) if kind == "broadcast" else (B, H, L, S), dtype=dtype)
        mask[..., 0] = -math.inf
    extras = {
        "mask": None if kind == "bool" else mask,
        "slopes": torch.rand(slopes, dtype=dtype) if slopes else None,
        "sinks": torch.randn(H, dtype=dtype) if sinks else None,
    }
    names = [name for name, x in extras.items() if x is not None]
    lengths = None if lengths is None else torch.tensor(lengths)

    def ours(q, k, v, *more):
        x = {**extras, **dict(zip(names, more, strict=True))}
        return attention(
            q, k, v, mask if kind == "bool" else x["mask"], is_causal=causal, scale=scale,
            enable_gqa=True, window=window, softcap=softcap, alibi_slopes=x["slopes"],
            sinks=x["sinks"], key_lengths=lengths, causal_align=align, return_lse=lse,
            return_weights=weights,
        )  # fmt: skip

    def theirs(q, k, v, *more):
        x = {**extras, **dict(zip(names, more, strict=True))}
        m = mask if kind == "bool" else x["mask"]
        out, e, w = slow(
            q, k, v, None if m is None else m.expand(B, H, L, S), causal, scale, window, softcap,
            x["slopes"], x["sinks"], lengths, align,
        )  # fmt: skip
        weighted = {None: [], "heads": [w], "mean": [w.mean(1)]}[weights]
        return (out, *[e] * lse, *weighted)

    compare(ours, theirs, [q, k, v, *(extras[n] for n in names)])


SEEN = [
    # causal, window, align, L, S -> one row of keys (1 = seen) for each query
    (True, None, "top_left", 2, 4, ["1000", "1100"]),
    (True, None, "bottom_right", 2, 4, ["1110", "1111"]),
    (True, None, "bottom_right", 4, 2, ["00", "00", "10", "11"]),
    (False, (1, 0), "top_left", 4, 4, ["1000", "1100", "0110", "0011"]),
    (False, (None, 1), "top_left", 3, 4, ["1100", "1110", "1111"]),
    (False, (0, -1), "bottom_right", 2, 4, ["0011", "0001"]),
    (True, (1, 2), "top_left", 3, 3, ["100", "110", "011"]),
    (False, (1, 1), "bottom_right", 1, 4, ["0011"]),
    (True, None, "bottom_right", 1, 3, ["111"]),
    (False, (0, 0), "top_left", 3, 1, ["1", "0", "0"]),
]


@pytest.mark.parametrize(("causal", "window", "align", "L", "S", "rows"), SEEN, ids=str)
def test_who_sees_whom(causal, window, align, L, S, rows):
    q, k, v = heads(1, 2, L, S, 4, 4)
    _, weights = attention(
        q, k, v, is_causal=causal, window=window, causal_align=align, return_weights="heads"
    )
    expected = torch.tensor([[c == "1" for c in row] for row in rows])
    assert torch.equal(weights[0] > 0, expected.expand(2, L, S))


def test_bottom_right_starts_from_each_rows_own_length():
    q, k, v = heads(2, 1, 2, 5, 4, 4)
    options = {"is_causal": True, "causal_align": "bottom_right", "return_weights": "mean"}
    _, weights = attention(q, k, v, key_lengths=torch.tensor([5, 3]), **options)
    assert (weights > 0).int().tolist() == [
        [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]],
        [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]],
    ]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True, "causal_align": "bottom_right"},
        {"window": (7, 0)},
        {"window": (3, 5), "causal_align": "bottom_right"},
        {"key_lengths": torch.tensor([50, 33])},
        {"key_lengths": torch.tensor([70, 1], dtype=torch.int32), "is_causal": True},
        {"alibi": True},
    ],
    ids=str,
)
def test_oracle_against_torch_with_a_mask(options, dtype):
    """What torch says with a mask, under the oracle rule; no row is without a key."""
    L, S = 50, 70
    inputs = heads(2, 4, L, S, 24, 16, dtype)
    options = dict(options)
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.01]) if options.pop("alibi", None) else None
    p = torch.arange(L)[:, None] + (S - L if "causal_align" in options else 0)
    j = torch.arange(S)
    left, right = options.get("window", (None, 0 if options.get("is_causal") else None))
    seen = torch.ones(2, 1, L, S, dtype=torch.bool)
    if left is not None:
        seen &= j >= p - left
    if right is not None:
        seen &= j <= p + right
    if "key_lengths" in options:
        seen &= j < options["key_lengths"][:, None, None, None]
    mask = torch.zeros(2, 4, L, S, dtype=torch.float64).masked_fill(~seen, -math.inf)
    if slopes is not None:
        mask = mask - slopes.double()[:, None, None] * (p - j).abs()
    assert_oracle(
        lambda *a: attention(*a, alibi_slopes=slopes, **options),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask.to(q.dtype)),
        inputs,
    )


def test_sinks_are_one_more_key_of_value_zero():
    """A key that is orthogonal to no query in one extra dimension, whose score is the sink."""
    q, k, v = heads(2, 3, 5, 7, 4, 4)
    sinks = torch.randn(3, dtype=torch.float64)

    def theirs(q, k, v, sinks):
        q, k = F.pad(q, (0, 1), value=1.0), F.pad(k, (0, 1, 0, 1))
        sink = sinks.view(1, 3, 1, 1) * F.one_hot(torch.tensor(4), 5) / 0.5
        k = torch.cat([k[:, :, :-1], sink.expand(2, 3, 1, 5)], 2)
        return F.scaled_dot_product_attention(q, k, F.pad(v, (0, 0, 0, 1)), scale=0.5)

    compare(lambda *a: attention(*a[:3], sinks=a[3], scale=0.5), theirs, [q, k, v, sinks])


OFFSETS = {
    "one": ([0, 4, 4, 5, 11], None),
    "pair": ([0, 3, 3, 7], [0, 5, 6, 6]),  # a sequence without queries and one without keys
}


@pytest.mark.parametrize("integers", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("kind", list(OFFSETS))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"is_causal": True, "causal_align": "bottom_right"},
        {"window": (1, 1), "causal_align": "bottom_right", "softcap": 2.0},
        {"alibi": (4,), "sinks": True},
        {"alibi": (0, 4), "is_causal": True, "scale": 0.3},
    ],
    ids=str,
)
def test_packed_sequences_attend_inside_of_themselves(options, kind, integers):
    cu_q, cu_k = OFFSETS[kind]
    cu_k = cu_k or cu_q
    n, H, groups, D, Dv = len(cu_q) - 1, 4, 2, 5, 3
    q = torch.randn(H, cu_q[-1], D, dtype=torch.float64)
    k, v = (torch.randn(groups, cu_k[-1], w, dtype=torch.float64) for w in (D, Dv))
    options = dict(options)
    shape = options.pop("alibi", None)
    extras = {}
    if shape:
        extras["slopes"] = torch.rand(shape if len(shape) == 1 else (n, H), dtype=torch.float64)
    if options.pop("sinks", False):
        extras["sinks"] = torch.randn(H, dtype=torch.float64)
    one = torch.tensor(cu_q, dtype=integers)
    packed = one if kind == "one" else (one, torch.tensor(cu_k, dtype=integers))

    def ours(q, k, v, *more):
        x = dict(zip(extras, more, strict=True))
        return attention(
            q, k, v, enable_gqa=True, cu_seqlens=packed, alibi_slopes=x.get("slopes"),
            sinks=x.get("sinks"), return_lse=True, **options,
        )  # fmt: skip

    def theirs(q, k, v, *more):
        x = dict(zip(extras, more, strict=True))
        outs, lses = [], []
        names = {"is_causal": "causal", "causal_align": "align"}
        for b in range(n):
            rows, columns = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
            if rows.start == rows.stop:
                continue
            slopes = x.get("slopes")
            if slopes is not None and slopes.dim() == 2:
                slopes = slopes[b : b + 1]
            out, lse, _ = slow(
                q[None, :, rows], k[None, :, columns], v[None, :, columns], slopes=slopes,
                sinks=x.get("sinks"), **{names.get(o, o): value for o, value in options.items()},
            )  # fmt: skip
            outs.append(out[0])
            lses.append(lse[0])
        return torch.cat(outs, 1), torch.cat(lses, 1)

    compare(ours, theirs, [q, k, v, *extras.values()])


def test_nothing_reaches_anything_from_beyond_key_lengths():
    q, k, v = heads(2, 2, 4, 6, 3, 3)
    k[1, :, 2:], v[1, :, 2:] = math.nan, math.inf
    for x in results_and_gradients(
        lambda *a: attention(*a, key_lengths=torch.tensor([6, 2])), [q, k, v]
    ):
        assert x.isfinite().all()


def test_rows_without_keys():
    q, k, v = heads(2, 2, 4, 6, 3, 3)
    sinks = torch.tensor([0.5, -1.0], dtype=torch.float64)
    options = {"key_lengths": torch.tensor([6, 0]), "return_lse": True, "return_weights": "heads"}
    out, lse, weights, d_q, d_k, d_v = results_and_gradients(
        lambda *a: attention(*a, **options), [q, k, v]
    )
    for x in (out, weights, d_q, d_k, d_v):
        assert (x[1] == 0).all() and (x[0] != 0).any() and x.isfinite().all()
    assert (lse[1] == -math.inf).all() and lse[0].isfinite().all()
    out, lse, _ = attention(q, k, v, sinks=sinks, **options)
    assert (out[1] == 0).all() and torch.equal(lse[1], sinks[:, None].expand(2, 4))


@pytest.mark.parametrize("sizes", [(2, 3, 0, 5), (2, 3, 4, 0), (0, 3, 4, 5), (2, 0, 4, 5)], ids=str)
def test_empty(sizes):
    B, H, L, S = sizes
    q, k, v = heads(B, H, L, S, 4, 2)
    extras = [torch.rand(H, dtype=torch.float64), torch.randn(H, dtype=torch.float64)]
    for with_sinks in (False, True):
        out, lse, weights, *grads = results_and_gradients(
            lambda q, k, v, slopes, sinks, s=with_sinks: attention(
                q, k, v, window=(1, 1), softcap=3.0, alibi_slopes=slopes, sinks=sinks if s else None,
                key_lengths=torch.full((B,), S), causal_align="bottom_right", return_lse=True,
                return_weights="heads",
            ),
            [q, k, v, *extras],
        )  # fmt: skip
        assert (
            out.shape == (B, H, L, 2) and lse.shape == (B, H, L) and weights.shape == (B, H, L, S)
        )
        if S == 0:
            expected = extras[1][:, None].expand(B, H, L) if with_sinks else -math.inf
            assert (out == 0).all() and (lse == expected).all()
            assert all((g == 0).all() for g in grads[:4])


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("mean", [False, True], ids=["heads", "mean"])
def test_leading_dimensions(lead, mean):
    """[..., H, L, D] is the same as [B, H, L, D], for the arguments and for the results."""
    H, L, S = 2, 3, 4
    q, k, v = torch.randn(*lead, H, L, 5), torch.randn(*lead, H, S, 5), torch.randn(*lead, H, S, 2)
    slopes, lengths = torch.rand(*lead, H), torch.randint(1, S + 1, lead)
    options = {"return_lse": True, "return_weights": "mean" if mean else "heads"}
    results = attention(q, k, v, alibi_slopes=slopes, key_lengths=lengths, **options)
    n = math.prod(lead)
    flat = attention(
        *(x.view(n, *x.shape[-3:]) for x in (q, k, v)), alibi_slopes=slopes.view(n, H),
        key_lengths=lengths.view(n), **options,
    )  # fmt: skip
    for a, b in zip(results, flat, strict=True):
        torch.testing.assert_close(a, b.view(*lead, *b.shape[1:]))
    if lead == ():  # no heads either
        out, lse, weights = attention(
            q[0], k[0], v[0], window=(1, 1), sinks=torch.zeros(1), **options
        )
        assert out.shape == (L, 2) and lse.shape == (L,) and weights.shape == (L, S)


def test_results_come_in_this_order():
    q, k, v = heads(1, 2, 3, 4, 5, 6, torch.float32)
    assert attention(q, k, v, softcap=9.0).shape == (1, 2, 3, 6)
    out, lse = attention(q, k, v, return_lse=True)
    assert out.shape == (1, 2, 3, 6) and lse.shape == (1, 2, 3)
    out, weights = attention(q, k, v, return_weights="mean")
    assert out.shape == (1, 2, 3, 6) and weights.shape == (1, 3, 4)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 3))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_of_the_results(dtype):
    q, k, v = heads(1, 2, 3, 4, 5, 6, dtype)
    slopes, sinks = torch.rand(2), torch.randn(2, dtype=torch.bfloat16)
    out, lse, weights = attention(
        q, k, v, alibi_slopes=slopes, sinks=sinks, return_lse=True, return_weights="heads"
    )
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    assert (out.dtype, lse.dtype, weights.dtype) == (dtype, accumulate, dtype)
    exact = attention(
        q.double(), k.double(), v.double(), alibi_slopes=slopes, sinks=sinks, return_lse=True
    )[1]
    torch.testing.assert_close(lse.double(), exact, atol=5e-2, rtol=5e-2)


def test_dropout_shows_in_the_weights():
    q, k, v = heads(2, 4, 40, 50, 8, 8)
    _, whole = attention(q, k, v, window=(None, 0), return_weights="heads")
    torch.manual_seed(1)
    out, weights = attention(q, k, v, dropout_p=0.25, window=(None, 0), return_weights="heads")
    kept = weights[whole > 0] != 0
    assert 0.7 < kept.double().mean() < 0.8
    torch.testing.assert_close(weights, torch.where(weights != 0, whole / 0.75, 0.0))
    torch.testing.assert_close(out, weights @ v)
    torch.manual_seed(1)
    again = attention(q, k, v, dropout_p=0.25, window=(None, 0), return_weights="heads")
    assert torch.equal(out, again[0]) and torch.equal(weights, again[1])
    torch.manual_seed(1)
    _, mean = attention(q, k, v, dropout_p=0.25, window=(None, 0), return_weights="mean")
    torch.testing.assert_close(mean, weights.mean(1))


EVERYTHING = [
    {
        "is_causal": True,
        "causal_align": "bottom_right",
        "softcap": 1.5,
        "sinks": True,
        "alibi": (2,),
    },
    {"window": (1, 1), "alibi": (2, 2), "mask": (1, 1, 4), "key_lengths": torch.tensor([4, 2])},
    {"mask": (2, 2, 3, 4), "sinks": True},
    {"softcap": 2.0, "is_causal": True},
]


@pytest.mark.parametrize("options", EVERYTHING, ids=str)
def test_gradcheck(options):
    options = dict(options)
    inputs = heads(2, 2, 3, 4, 3, 2)
    shapes = {
        "attn_mask": options.pop("mask", None),
        "alibi_slopes": options.pop("alibi", None),
        "sinks": (2,) if options.pop("sinks", False) else None,
    }
    names = [name for name, shape in shapes.items() if shape]
    inputs += [torch.rand(shapes[name], dtype=torch.float64) for name in names]

    def f(q, k, v, *more):
        options["return_lse"] = True
        options["return_weights"] = "heads"
        return attention(q, k, v, **options, **dict(zip(names, more, strict=True)))

    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


def test_gradient_of_a_broadcast_mask_is_the_sum():
    q, k, v = heads(2, 3, 4, 5, 3, 3)
    for shape in [(5,), (4, 1), (2, 1, 1, 5), (3, 4, 5)]:
        inputs = [q, k, v, torch.randn(shape, dtype=torch.float64)]
        compare(attention, F.scaled_dot_product_attention, inputs)


def test_compile_and_vmap():
    q, k, v = heads(2, 2, 5, 5, 4, 4)
    slopes, sinks, lengths = torch.rand(2), torch.randn(2), torch.tensor([5, 3])

    def f(q, k, v):
        return attention(
            q, k, v, is_causal=True, window=(2, None), softcap=3.0, alibi_slopes=slopes, sinks=sinks,
            key_lengths=lengths, causal_align="bottom_right", return_lse=True,
        )  # fmt: skip

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    compare(compiled, f, [q, k, v])
    mapped = torch.func.vmap(f, in_dims=(0, None, None))(torch.stack([q, 2 * q]), k, v)
    for a, b in zip(mapped, f(2 * q, k, v), strict=True):
        torch.testing.assert_close(a[1], b)
    cu = torch.tensor([0, 2, 5])
    packed = torch.compile(
        lambda q, k, v: attention(q, k, v, cu_seqlens=cu), fullgraph=True, backend="aot_eager"
    )
    compare(packed, lambda q, k, v: attention(q, k, v, cu_seqlens=cu), [q[0], k[0], v[0]])


def _bad(**change):
    q, k, v = heads(2, 4, 5, 6, 8, 8)
    return {"query": q, "key": k, "value": v, **change}


def _packed(**change):
    q, k, v = (x[0] for x in heads(1, 4, 5, 6, 8, 8))
    return {"query": q, "key": k, "value": v, **change}


CU = torch.tensor([0, 5]), torch.tensor([0, 6])


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (_bad(window=3), ValueError, r"window must be \(left, right\), each None, -1 or a distance >= 0, got 3"),
        (_bad(window=(1, 2, 3)), ValueError, r"window must be .* got \(1, 2, 3\)"),
        (_bad(window=(-2, 0)), ValueError, r"window must be .* got \(-2, 0\)"),
        (_bad(window=(1.5, 0)), ValueError, r"window must be .* got \(1.5, 0\)"),
        (_bad(softcap=0.0), ValueError, "softcap must be positive and finite, got 0.0"),
        (_bad(softcap=math.inf), ValueError, "softcap must be positive and finite, got inf"),
        (_bad(alibi_slopes=torch.ones(3)), ValueError, r"alibi_slopes must broadcast to \[2, 4\], got \[3\]"),
        (_bad(alibi_slopes=torch.ones(4).long()), TypeError, "alibi_slopes must be floating"),
        (_bad(alibi_slopes=[1.0]), TypeError, "alibi_slopes must be a Tensor, got list"),
        (_bad(sinks=torch.ones(2, 4)), ValueError, r"sinks must be \[H\] = \[4\], got \[2, 4\]"),
        (_bad(sinks=torch.ones(4).int()), TypeError, "sinks must be floating"),
        (_bad(key_lengths=torch.tensor([6, 7])), ValueError, "key_lengths must be between 0 and S = 6, got 6 to 7"),
        (_bad(key_lengths=torch.tensor([-1, 6])), ValueError, "key_lengths must be between 0 and S = 6, got -1 to 6"),
        (_bad(key_lengths=torch.tensor([1, 2, 3])), ValueError, r"key_lengths must broadcast to \[2\], got \[3\]"),
        (_bad(key_lengths=torch.tensor([1.0, 2.0])), TypeError, "key_lengths must be int32 or int64, got torch.float32"),
        (_bad(key_lengths=[1, 2]), TypeError, "key_lengths must be a Tensor, got list"),
        (_bad(causal_align="top"), ValueError, r"causal_align must be one of \['top_left', 'bottom_right'\], got 'top'"),
        (_bad(return_weights="all"), ValueError, r"return_weights must be one of \[None, 'heads', 'mean'\], got 'all'"),
        (_bad(return_weights=True), ValueError, "return_weights must be one of"),
        (_bad(cu_seqlens=CU), ValueError, r"query must be \[H, N, D\] with cu_seqlens, got \[2, 4, 5, 8\]"),
        (_packed(cu_seqlens=CU, attn_mask=torch.ones(5, 6)), ValueError, "attn_mask must be None when cu_seqlens is given"),
        (_packed(cu_seqlens=CU, key_lengths=torch.tensor(3)), ValueError, "key_lengths must be None"),
        (_packed(cu_seqlens=CU, return_weights="mean"), ValueError, "return_weights must be None"),
        (_packed(cu_seqlens=CU[0]), ValueError, r"cu_seqlens must rise from 0 to 6, the rows packed, got \[0, 5\]"),
        (_packed(cu_seqlens=(CU[0], torch.tensor([0, 4, 3, 6]))), ValueError, r"cu_seqlens\[1\] must rise from 0 to 6"),
        (_packed(cu_seqlens=(CU[0], torch.tensor([0, 3, 6]))), ValueError, r"cu_seqlens\[1\] must be \[n \+ 1\] = \[2\], got \[3\]"),
        (_packed(cu_seqlens=(*CU, CU[0])), ValueError, "cu_seqlens must be a tensor or .*, got 3"),
        (_packed(cu_seqlens=CU[0].double()), TypeError, "cu_seqlens must be int32 or int64"),
        (_packed(cu_seqlens=CU[0][None]), ValueError, r"cu_seqlens must be \[n \+ 1\], got \[1, 2\]"),
        (_packed(cu_seqlens=(CU[0], 5)), TypeError, r"cu_seqlens\[1\] must be a Tensor, got int"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_bad_arguments(arguments, error, match):
    with pytest.raises(error, match=match) as caught:
        attention(**arguments)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("scaled_dot_product_attention: ")
