"""lmkern.optim as torch.optim.Optimizers: schedules, groups, closures, compiled steps; errors."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch.optim import lr_scheduler

from lmkern import _C
from lmkern.optim import SGD, Adagrad, AdamW, SparseAdam
from optim_helpers import EVERY, dense, name, random_gradients, sparse


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize(("optimizer", "options"), EVERY, ids=name)
@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: lr_scheduler.LambdaLR(o, lambda t: t / 3),
        lambda o: lr_scheduler.CosineAnnealingLR(o, 3),
        lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=6, cycle_momentum=False),
    ],
    ids=["lambda", "cosine", "one cycle"],
)
def test_schedulers(scheduler, optimizer, options, tensor_lr):
    results = []
    gradients = random_gradients(9, [5], 9, steps=5)
    for kind in (optimizer, getattr(torch.optim, optimizer.__name__)):
        torch.manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(9, 5))
        lr = torch.tensor(options["lr"]) if tensor_lr else options["lr"]
        instance = kind([parameter], **{**options, "lr": lr})
        schedule = scheduler(instance)
        for g in gradients:
            dense_needed = kind is torch.optim.AdamW
            parameter.grad = dense(parameter, g) if dense_needed else sparse(parameter, g)
            instance.step()
            schedule.step()
        results.append(parameter.detach())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_groups_closure_and_zero_grad():
    first, second = (torch.nn.Embedding(9, 5, sparse=True) for _ in range(2))
    bias = torch.nn.Parameter(torch.zeros(5))
    optimizer = AdamW([{"params": [first.weight], "weight_decay": 0.0}, {"params": [bias]}], lr=0.1)
    optimizer.add_param_group({"params": second.weight, "lr": 0.0})
    before = second.weight.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = (
            (first(torch.tensor([1, 1])) + second(torch.tensor([2, 3])) + bias - 7).square().sum()
        )
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(200)]
    assert losses[-1] < 1e-2 * losses[0]
    assert torch.equal(second.weight, before)
    assert optimizer.step() is None
    optimizer.zero_grad(set_to_none=False)
    assert not first.weight.grad.to_dense().any()
    optimizer.zero_grad()
    assert first.weight.grad is None and bias.grad is None
    optimizer.step()


@pytest.mark.parametrize(("optimizer", "options"), EVERY, ids=name)
def test_an_empty_gradient_counts_as_a_step(optimizer, options):
    table = torch.nn.Parameter(torch.ones(4, 3))
    instance = optimizer([table], **options)
    table.grad = sparse(table, (torch.zeros(0, dtype=torch.int64), torch.zeros(0, 3)))
    instance.step()
    assert (table == 1).all()
    if optimizer is not SGD:
        assert instance.state[table]["step"] == 1
    instance.catch_up()
    assert torch.allclose(table, torch.tensor(0.997 if optimizer is AdamW else 1.0))


def test_a_step_counts_the_weights_version_up():
    table = torch.nn.Parameter(torch.ones(4, 3))
    product = (table.double() * table).sum()
    table.grad = sparse(table, (torch.tensor([1]), torch.ones(1, 3)))
    SGD([table]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_a_compiled_step():
    tables = []
    for compiled in (False, True):
        torch.manual_seed(0)
        table = torch.nn.Embedding(9, 5, sparse=True)
        optimizer = AdamW(table.parameters(), lr=0.1)

        def step(table=table, optimizer=optimizer):
            optimizer.zero_grad()
            table(torch.tensor([1, 3, 1])).square().sum().backward()
            optimizer.step()

        run_step = torch.compile(step, backend="eager") if compiled else step
        for _ in range(3):
            run_step()
        tables.append(table.weight.detach())
    assert torch.equal(*tables)


# ---- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "options", "match"),
    [
        (SGD, {"momentum": 0.9}, "SGD: momentum=0.9 is not supported: a momentum buffer moves every row"),
        (SGD, {"nesterov": True}, "SGD: nesterov=True is not supported"),
        (SGD, {"lr": -1.0}, "SGD: lr must be at least 0, got -1.0"),
        (SGD, {"lr": float("nan")}, "SGD: lr must be at least 0, got nan"),
        (SGD, {"lr": torch.ones(2)}, r"SGD: lr must be a number or a tensor of one element, got \[2\]"),
        (Adagrad, {"lr_decay": -1}, "Adagrad: lr_decay must be at least 0, got -1"),
        (Adagrad, {"differentiable": True}, "Adagrad: differentiable=True is not supported"),
        (Adagrad, {"initial_accumulator_value": -1}, "Adagrad: initial_accumulator_value must be at least 0"),
        (SparseAdam, {"eps": -1}, "SparseAdam: eps must be at least 0, got -1"),
        (SparseAdam, {"betas": (0.9, 1.0)}, r"SparseAdam: betas\[1\] must be in \[0, 1\), got 1.0"),
        (AdamW, {"amsgrad": True}, "AdamW: amsgrad=True is not supported: it would keep a third moment"),
        (AdamW, {"weight_decay": -0.1}, "AdamW: weight_decay must be at least 0, got -0.1"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_bad_options(optimizer, options, match):
    table = torch.nn.Parameter(torch.ones(4, 3))
    with pytest.raises(ValueError, match=match) as caught:
        optimizer([table], **options)
    assert "\n" not in str(caught.value)
    instance = optimizer([table])
    with pytest.raises(ValueError, match=match):
        instance.add_param_group({"params": [torch.nn.Parameter(torch.ones(2, 3))], **options})
    assert len(instance.param_groups) == 1


@pytest.mark.parametrize(("optimizer", "options"), EVERY, ids=name)
def test_bad_parameters(optimizer, options):
    for parameter in (torch.zeros(3, 2, dtype=torch.complex64), torch.zeros(3, 2).to_sparse()):
        with pytest.raises(ValueError, match="parameter 0 of group 0 must be dense and of real"):
            optimizer([parameter.requires_grad_()], **options)


def test_bad_gradients():
    table = torch.nn.Parameter(torch.ones(4, 3))
    named = SparseAdam([("embed.weight", table)])
    table.grad = torch.ones(4, 3)
    with pytest.raises(RuntimeError, match=r"gradient of parameter 'embed\.weight' must be sparse"):
        named.step()
    table.grad = torch.ones(4, 3).to_sparse(2)
    for optimizer, options in EVERY:
        instance = optimizer([torch.nn.Parameter(torch.ones(1, 3)), table], **options)
        with pytest.raises(
            RuntimeError, match=r"parameter 1 of group 0 must be dense, or sparse COO.*2"
        ):
            instance.step()
    table.grad = torch.ones(4, 3).to_sparse(1)
    with pytest.raises(
        RuntimeError, match="weight_decay must be 0 for parameter 0 of group 0, whose"
    ):
        Adagrad([table], weight_decay=0.1).step()
    assert (table == 1).all()


def test_options_that_a_scheduler_turns_on():
    table = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = SGD([table])
    lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=6)
    table.grad = torch.ones(4, 3).to_sparse(1)
    with pytest.raises(ValueError, match=r"momentum=0\.95 is not supported"):
        optimizer.step()
    assert (table == 1).all()


W, ROWS, G = torch.ones(4, 3), torch.tensor([1, 3]), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({1: torch.tensor([1, 4])}, IndexError, r"row 4 at position \[1\] is out of range for V = 4"),
        ({1: torch.tensor([-1, 2])}, IndexError, r"row -1 at position \[0\] is out of range"),
        ({1: ROWS.int()}, TypeError, "rows must be int64, got int32"),
        ({1: ROWS[None]}, ValueError, r"rows must be \[N\], got \[1, 2\]"),
        ({1: None}, ValueError, r"gradient must be \[V, D\] = \[4, 3\], got \[2, 3\]"),
        ({0: W.int()}, TypeError, "weight must be float32, float64, bfloat16 or float16, got int32"),
        ({0: W[0]}, ValueError, r"weight must be \[V, D\], got \[3\]"),
        ({0: W.t().contiguous().t()}, ValueError, "weight must be contiguous in its last dimension"),
        ({0: W[:1].expand(4, 3)}, ValueError, "weight must not overlap itself"),
        ({2: G.double()}, TypeError, "gradient must be float32, got float64"),
        ({2: torch.ones(3, 3)}, ValueError, r"gradient must be \[N, D\] = \[2, 3\], got \[3, 3\]"),
        ({4: torch.ones(4)}, TypeError, "touched must be float64, got float32"),
        ({4: torch.ones(3).double()}, ValueError, r"touched must be \[V\] = \[4\], got \[3\]"),
        ({7: W.bfloat16()}, TypeError, "must be float32, got bfloat16"),
        ({7: torch.ones(4, 2)}, ValueError, r"must be \[V, D\] = \[4, 3\], got \[4, 2\]"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
@pytest.mark.cpu_only("on the CPU's module; both share the checks")
@pytest.mark.parametrize("rule", ["embedding_sgd", "embedding_adagrad", "embedding_adam"])
def test_kernels_check_before_they_write(rule, change, error, match):
    rest = {
        "sgd": (),
        "adagrad": (W.clone(), 0.0, 0.1),
        "adam": (W.clone(), W.clone(), 0.9, 0.9, 1.0),
    }
    arguments = [W.clone(), ROWS, G, 1.0, torch.ones(4).double(), 0.5, 1.0]
    arguments += rest[rule.removeprefix("embedding_")]
    for place, value in change.items():
        if place >= len(arguments):
            return
        arguments[place] = value
    before = copy.deepcopy(arguments)
    with pytest.raises(error, match=match) as caught:
        getattr(_C, rule)(*arguments)
    assert str(caught.value).startswith(f"{rule}: ") and "\n" not in str(caught.value)
    assert all(
        torch.equal(a, b)
        for a, b in itertools.zip_longest(arguments, before)
        if isinstance(a, torch.Tensor)
    )


def test_meta_parameters_step_without_values():
    table = torch.nn.Parameter(torch.ones(4, 3, device="meta"))
    table.grad = torch.ones(4, 3, device="meta")
    optimizer = AdamW([table])
    optimizer.step()
    assert optimizer.state[table]["exp_avg"].is_meta


def test_a_captured_step_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    weight = W.clone().requires_grad_()
    weight.grad = torch.ones_like(W)
    with pytest.raises(RuntimeError, match=r"^SGD: step\(\) cannot be captured in a CUDA graph"):
        SGD([weight], lr=0.1).step()
    assert torch.equal(weight, W)
