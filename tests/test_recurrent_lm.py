"""RecurrentLM's cells and AWD-LSTM's options: against torch, their masks, and both backends."""

import pytest
import torch
import torch.nn.functional as F

from lm_helpers import AWD, VOCAB, tiny_config, tiny_data, tiny_model
from lmkern.models import RecurrentLM, RecurrentLMConfig, recurrent_layer
from lmkern.train import Updater

each_cell = pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
each_backend = pytest.mark.parametrize("backend", ["lmkern", "torch"])


def ids(*shape):
    return torch.randint(VOCAB, shape)


@each_cell
@each_backend
def test_it_is_torchs_stack_of_layers(cell, backend):
    model = tiny_model("lstm", backend, cell=cell).eval()
    layer = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn": torch.nn.RNN}[cell]
    torch.manual_seed(0)  # the same seed gives the same values
    embedding = torch.nn.Embedding(VOCAB, 9)
    stack = layer(9, 13, 2)
    head = torch.nn.Linear(13, VOCAB)
    tokens, more = ids(3, 8), ids(3, 5)
    expected, state = stack(embedding(tokens.t()))
    logits, ours = model(tokens)
    torch.testing.assert_close(logits, head(expected).transpose(0, 1), rtol=1e-5, atol=1e-5)
    theirs = state if cell == "lstm" else (state,)
    assert len(ours) == 2 * len(theirs) == len(model.init_state(3))
    torch.testing.assert_close(torch.stack(ours[:: len(theirs)]), theirs[0], rtol=1e-5, atol=1e-5)
    expected, _ = stack(embedding(more.t()), state)
    logits, _ = model(more, ours)
    torch.testing.assert_close(logits, head(expected).transpose(0, 1), rtol=1e-5, atol=1e-5)


@each_cell
def test_a_masked_state_is_torchs_cell_with_a_masked_state(cell):
    size = 5
    layer = recurrent_layer.RecurrentLayer(cell, 4, size, recurrent_dropout=0.5, backend="torch")
    plain = {"lstm": torch.nn.LSTMCell, "gru": torch.nn.GRUCell, "rnn": torch.nn.RNNCell}[cell]
    plain = plain(4, size)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(6, 3, 4)
    torch.manual_seed(1)
    y, _ = layer(x)
    torch.manual_seed(1)
    mask = F.dropout(torch.ones(3, size), 0.5)
    assert 0 < (mask == 0).sum() < mask.numel()
    h, c = torch.zeros(3, size), torch.zeros(3, size)
    for t in range(6):
        if cell == "lstm":
            h, c = plain(x[t], (h * mask, c))
        elif cell == "rnn":
            h = plain(x[t], h * mask)
        else:  # z ⊙ h sees the whole h: torch's cell gives (1 - z) n + z m h
            z = (x[t] @ plain.weight_ih[size : 2 * size].T + plain.bias_ih[size : 2 * size]) + (
                h * mask @ plain.weight_hh[size : 2 * size].T + plain.bias_hh[size : 2 * size]
            )
            h = plain(x[t], h * mask) + z.sigmoid() * (h - h * mask)
        torch.testing.assert_close(y[t], h, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        layer.eval()
        first, _ = layer(x)
        torch.testing.assert_close(first, layer(x)[0], rtol=0, atol=0)


@each_cell
@pytest.mark.parametrize("recurrent_dropout", [0.0, 0.25])
def test_backends_drop_the_same_and_learn_the_same(cell, recurrent_dropout):
    """The same seed: the losses of 40 steps agree to 1e-4, averaging and penalties included."""
    curves = {}
    for backend in ("lmkern", "torch"):
        model = tiny_model("awd", backend, cell=cell, recurrent_dropout=recurrent_dropout)
        options = {"optimizer": "sgd", "learning_rate": 0.5, "schedule": "constant"}
        updater = Updater(model, tiny_data(), tiny_config(averaging="always", **options))
        torch.manual_seed(7)
        losses = [updater.update()[0] for _ in range(40)]
        curves[backend] = losses
        assert updater.average.count == 40
    assert curves["lmkern"] == pytest.approx(curves["torch"], rel=1e-4)
    assert len(set(curves["lmkern"])) == 40 and curves["lmkern"][-1] < curves["lmkern"][0]


@each_backend
def test_nothing_is_dropped_in_evaluation(backend):
    awd = tiny_model("awd", backend).eval()
    plain = tiny_model("lstm", backend, tie_weights=True).eval()
    plain.load_state_dict(awd.state_dict())
    tokens = ids(2, 7)
    before = torch.random.get_rng_state()
    assert torch.equal(awd(tokens)[0], plain(tokens)[0])
    assert torch.equal(torch.random.get_rng_state(), before)
    awd.train()
    assert not torch.equal(awd(tokens)[0], plain(tokens)[0])


def test_tied_weights_narrow_the_last_layer():
    model = tiny_model("awd", num_layers=3)
    assert [layer.hidden_size for layer in model.layers] == [13, 13, 9]
    assert model.head.weight is model.embedding.weight
    assert [tuple(part.shape) for part in model.init_state(4)] == [(4, 13)] * 4 + [(4, 9)] * 2


def test_variational_dropout_has_one_mask_per_sequence():
    model = tiny_model("lstm", variational=True, dropout=0.5, dropout_output=0.2).train()
    x = torch.ones(6, 40, 50)
    y = model._drop(x, "hidden")
    assert torch.equal(y, y[:1].expand_as(y))
    assert set(y.unique().tolist()) == {0.0, 2.0} and 0.4 < (y == 0).float().mean() < 0.6
    assert not torch.equal(y[0, 0], y[0, 1])  # each sequence has its own
    assert 0.1 < (model._drop(x, "output") == 0).float().mean() < 0.3
    plain = tiny_model("lstm", dropout=0.5).train()._drop(x, "hidden")
    assert not torch.equal(plain[0], plain[1])


def test_embedding_dropout_drops_whole_tokens():
    model = tiny_model("lstm", dropout_embedding=0.4).train()
    tokens = ids(30, 20)
    x = model._embed(tokens, model.embedding.weight)
    scale = (x / model.embedding(tokens)).detach()
    torch.testing.assert_close(scale, scale[..., :1].expand_as(scale))
    dropped = set(tokens[scale[..., 0] == 0].tolist())
    assert 0 < len(dropped) < VOCAB
    assert dropped.isdisjoint(tokens[scale[..., 0] != 0].tolist())
    torch.testing.assert_close(scale.max(), torch.tensor(1 / 0.6))


def test_weight_drop_is_drawn_once_per_call(monkeypatch):
    seen = []

    def spy(input, w_ih, w_hh, b_ih, b_hh, hx, **options):
        seen.append(w_hh)
        return recurrent_layer.torch_lstm(input, w_ih, w_hh, b_ih, b_hh, hx)

    monkeypatch.setattr(recurrent_layer, "recurrence", lambda *_: spy)
    model = tiny_model("lstm", weight_drop=0.5, hidden_size=40).train()
    model(ids(2, 5))[0].sum().backward()
    for layer, dropped in zip(model.layers, seen, strict=True):
        kept = dropped != 0
        assert 0.4 < kept.float().mean() < 0.6
        assert torch.equal(dropped[kept], 2 * layer.weight_hh[kept])
        assert (layer.weight_hh.grad[~kept] == 0).all() and layer.weight_hh.grad[kept].any()
    model(ids(2, 5))
    assert not torch.equal(seen[0], seen[2])


def test_penalties_are_their_formulas():
    model = tiny_model("awd", backend="torch", dropout_output=0.5).train()
    outputs = []
    hook = model.layers[-1].register_forward_hook(lambda m, a, out: outputs.append(out[0]))
    heads = model.head.register_forward_pre_hook(lambda m, args: outputs.append(args[0]))
    tokens = ids(3, 6)
    _, _, penalty = model(tokens, return_penalty=True)
    output, dropped = outputs
    expected = 2.0 * dropped.square().mean() + 1.0 * output.diff(dim=0).square().mean()
    torch.testing.assert_close(penalty, expected)
    hook.remove(), heads.remove()
    # One token: nothing changes from step to step.
    assert model(tokens[:, :1], return_penalty=True)[2].isfinite()
    # The trainer adds it to the loss of each token, and reports the loss without it.
    updater = Updater(model, tiny_data(), tiny_config())
    batch = updater.sampler.batch(0, 0, 3)
    torch.manual_seed(3)
    total = updater.accumulate_gradient([batch], batch.num_tokens)
    gradient = model.embedding.weight.grad.clone()
    model.zero_grad()
    torch.manual_seed(3)
    logits, _, penalty = model(batch.inputs, return_penalty=True)
    loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
    (loss + penalty).backward()
    torch.testing.assert_close(total / batch.num_tokens, loss.detach())
    torch.testing.assert_close(gradient, model.embedding.weight.grad, rtol=1e-4, atol=1e-6)


def test_init_range_and_wrong_states():
    model = tiny_model("lstm", init_range=0.02)
    for name, parameter in model.named_parameters():
        assert 0.015 < parameter.abs().max() <= 0.02, name
    with pytest.raises(ValueError, match="state must have 4 tensors, got 2"):
        model(ids(1, 2), model.init_state(1)[:2])


def test_a_saved_model_keeps_its_options(tmp_path):
    tiny_model("awd", cell="gru").save_pretrained(tmp_path)
    loaded = RecurrentLM.from_pretrained(tmp_path)
    sizes = {"embedding_dim": 9, "hidden_size": 13}
    assert loaded.config == RecurrentLMConfig(vocab_size=VOCAB, cell="gru", **sizes, **AWD)
