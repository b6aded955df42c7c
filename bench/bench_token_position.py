"""Token + position + layer norm + dropout, both passes, the fresh gradient of the token table included.

Predicted from bytes, for U distinct ids: forward U D read and N D written; backward U D and N D read,
N D written and read again, U D written. torch reads or writes N D fourteen times, and V D besides.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from harness import Case, assert_agree
from lmkern.functional import token_position_embedding

# (V, D, B, L)
SIZES = [(50257, 768, 8, 1024), (30522, 384, 32, 128)]


def functions(ids):
    """Ours and torch's, of dropout_p, the tables of tokens and positions, and the norm's parameters."""

    def ours(p, token, position, *affine):
        norm = "layer" if affine else None
        return token_position_embedding(ids, token, position, None, *affine, norm=norm, dropout_p=p)

    def theirs(p, token, position, *affine):
        x = F.embedding(ids, token) + position
        if affine:
            x = F.layer_norm(x, token.shape[1:], *affine)
        return F.dropout(x, p) if p else x

    return ours, theirs


def trainer(f, p, start, d_out):
    # Parameters of its own: a step that drops the peer's gradients would pay for freeing them.
    parameters = [torch.nn.Parameter(t.clone()) for t in start]

    def step():
        for parameter in parameters:
            parameter.grad = None
        out = f(p, *parameters)
        out.backward(d_out)
        return [out.detach(), *(parameter.grad for parameter in parameters)]

    return step


@pytest.mark.parametrize("norm", ["layer", None])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_token_position(compare, threads, size, norm):
    V, D, B, L = size
    ids, d_out = torch.randint(V, (B, L)), torch.randn(B, L, D)
    start = [torch.randn(V, D), torch.randn(L, D)]
    start += [torch.randn(D), torch.randn(D)] if norm else []

    ours, theirs = functions(ids)

    def stepper(f, p=0.1):
        return trainer(f, p, start, d_out)

    compiled = torch.compile(theirs, dynamic=False)

    def check():  # masks differ: what is computed is compared without dropout
        without = {"torch": stepper(theirs, 0.0), "compile": stepper(compiled, 0.0)}
        assert_agree(stepper(ours, 0.0), without, 1e-5)

    distinct = ids.unique().numel()
    compare(
        Case(
            f"token + position + {norm} norm + dropout both V,D,B,L={size}",
            ours=stepper(ours),
            peers={"torch": stepper(theirs), "compile": stepper(compiled)},
            check=check,
            bytes=(4 * B * L + (3 if norm else 2) * distinct) * D * 4,
        )
    )
