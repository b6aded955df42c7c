"""The language models: call form, state, backends, saving and loading."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from lm_helpers import BACKENDS, FAMILIES, VOCAB, tiny_model
from lmkern.models import (
    GPT,
    GPTConfig,
    RecurrentLM,
    RecurrentLMConfig,
    load_pretrained,
)

each_family = pytest.mark.parametrize("family", FAMILIES)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def ids(*shape, seed=0):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@each_family
@each_backend
@pytest.mark.parametrize("chunks", [(12,), (1,) * 12, (5, 1, 4, 2), (1, 11)])
def test_state_continues_exactly_where_it_stopped(family, backend, chunks):
    model = tiny_model(family, backend).eval()
    tokens = ids(3, 12)
    with torch.no_grad():
        whole, _ = model(tokens)
        state = model.init_state(3)
        parts = []
        for part in tokens.split(chunks, dim=1):
            logits, state = model(part, state)
            parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)


@each_family
@each_backend
def test_logits_do_not_see_the_future(family, backend):
    model = tiny_model(family, backend).eval()
    tokens = ids(2, 9)
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % VOCAB
    with torch.no_grad():
        before, after = model(tokens)[0], model(changed)[0]
    assert before.shape == (2, 9, VOCAB)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5], after[:, 5])


@each_family
def test_backends_are_the_same_model(family):
    ours, theirs = tiny_model(family, "lmkern"), tiny_model(family, "torch")
    ours_state, theirs_state = ours.state_dict(), theirs.state_dict()
    assert list(ours_state) == list(theirs_state)
    for name, value in ours_state.items():
        assert torch.equal(value, theirs_state[name]), name
    other = tiny_model(family, "torch", seed=1)
    other.load_state_dict(ours_state)
    tokens, targets = ids(3, 10), ids(3, 10, seed=1)
    gradients = []
    for model in (ours, other):
        logits, _ = model(tokens)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-6)


@each_family
def test_loaded_state_dict_of_other_backend_gives_same_logits(family):
    ours, theirs = tiny_model(family, "lmkern", seed=3).eval(), tiny_model(family, "torch").eval()
    theirs.load_state_dict(ours.state_dict())
    tokens = ids(2, 8)
    torch.testing.assert_close(ours(tokens)[0], theirs(tokens)[0], rtol=1e-4, atol=1e-5)


def test_gpt_initialisation():
    model = GPT(GPTConfig(vocab_size=97, n_layer=8, n_embd=64, bias=True), backend="torch")
    deviations = {name: p.std().item() for name, p in model.named_parameters() if p.ndim == 2}
    for name, deviation in deviations.items():
        expected = 0.02 / 4 if name.endswith("out.weight") else 0.02  # 4 = sqrt(2 * 8)
        assert deviation == pytest.approx(expected, rel=0.06), name
    assert model.head.weight is model.token_embedding.weight
    assert all((p == 0).all() for n, p in model.named_parameters() if n.endswith("bias"))


def test_num_parameters_counts_tied_weights_once():
    config = GPTConfig(vocab_size=65, block_size=64, n_layer=4, n_head=4, n_embd=128)
    # nanoGPT prints 0.80M for this size: 786,432 + 1,152 in blocks and norms, embeddings.
    assert GPT(config, backend="torch").num_parameters == 787_584 + 65 * 128 + 64 * 128


@each_family
def test_save_and_load(family, tmp_path):
    model = tiny_model(family, "torch", seed=5)
    model.save_pretrained(tmp_path)
    before = torch.random.get_rng_state()
    loaded = load_pretrained(tmp_path, backend="torch")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert type(loaded) is type(model) and loaded.config == model.config
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name)), name
    if family != "lstm":
        assert "head.weight" not in load_file(tmp_path / "model.safetensors")
        embedding = next(iter(loaded.parameters()))
        assert loaded.head.weight.data_ptr() == loaded.state_dict()["head.weight"].data_ptr()
        assert any(loaded.head.weight is p for p in loaded.parameters()), embedding.shape
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_loading_says_what_is_wrong(tmp_path):
    model = tiny_model("lstm")
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"

    def fails(error, *words):
        with pytest.raises(error) as caught:
            load_pretrained(tmp_path, backend="torch")
        message = str(caught.value)
        assert "\n" not in message
        for word in words:
            assert word in message, message

    fails(FileNotFoundError, str(config))
    model.save_pretrained(tmp_path)
    weights.unlink()
    fails(FileNotFoundError, str(weights))
    model.save_pretrained(tmp_path)
    content = weights.read_bytes()
    for size in (0, 5, len(content) // 2, len(content) - 1):
        weights.write_bytes(content[:size])
        fails(ValueError, str(weights), "not a complete safetensors file")
    weights.write_bytes(b"PK\x03\x04 a zip file, as torch.save writes it" * 10)
    fails(ValueError, str(weights))
    save_file({"foreign": torch.zeros(2)}, weights)
    fails(ValueError, str(weights), "embedding.weight", "foreign")
    tensors = dict(model.named_parameters())
    save_file({**tensors, "head.bias": torch.zeros(VOCAB + 1)}, weights)
    fails(ValueError, str(weights), "head.bias", f"[{VOCAB}]", f"[{VOCAB + 1}]")
    fields = json.loads(config.read_text())
    for change, words in [
        ({"model_type": "gpt2"}, ("model_type", "gpt2")),
        ({"hidden_size": 0}, ("hidden_size", "0")),
        ({"surprise": 1}, ("surprise",)),
    ]:
        config.write_text(json.dumps({**fields, **change}))
        fails(ValueError, str(config), *words)
    config.write_text("{")
    fails(ValueError, str(config), "JSON")
    config.write_text(json.dumps({**fields, "model_type": "gpt"}))
    with pytest.raises(ValueError, match="model_type must be 'recurrent_lm'"):
        RecurrentLM.from_pretrained(tmp_path)


def test_interrupted_save_keeps_the_old_file(tmp_path, monkeypatch):
    old = tiny_model("lstm", seed=1)
    old.save_pretrained(tmp_path)

    def full_disk(tensors, path, metadata):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        tiny_model("lstm", seed=2).save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path, backend="torch")
    assert torch.equal(loaded.head.weight, old.head.weight)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        (GPTConfig, {"n_embd": 10, "n_head": 4}, "n_embd"),
        (GPTConfig, {"n_layer": 0}, "n_layer"),
        (GPTConfig, {"block_size": 2.5}, "block_size"),
        (GPTConfig, {"dropout": 1.0}, "dropout"),
        (RecurrentLMConfig, {"hidden_size": -1}, "hidden_size"),
        (RecurrentLMConfig, {"dropout": -0.1}, "dropout"),
        (RecurrentLMConfig, {"tie_weights": True, "num_layers": 1}, "tie_weights"),
        (RecurrentLMConfig, {"cell": "qrnn"}, "cell must be one of lstm, gru, rnn, got 'qrnn'"),
        (RecurrentLMConfig, {"dropout_hidden": 1.0}, "dropout_hidden"),
        (RecurrentLMConfig, {"weight_drop": -0.5}, "weight_drop"),
        (RecurrentLMConfig, {"recurrent_dropout": 2.0}, "recurrent_dropout"),
        (RecurrentLMConfig, {"temporal_reg": -1.0}, "temporal_reg"),
        (RecurrentLMConfig, {"init_range": 0.0}, "init_range"),
    ],
)
def test_config_is_checked(config, options, words):
    with pytest.raises(ValueError, match=words):
        config(**options)


@each_family
@each_backend
def test_inputs_are_checked(family, backend):
    model = tiny_model(family, backend)
    for bad in (VOCAB, -1):
        tokens = ids(2, 4)
        tokens[1, 2] = bad
        with pytest.raises(IndexError, match=f"token id {bad} .*vocab_size is {VOCAB}"):
            model(tokens)
    with pytest.raises(ValueError, match="input_ids"):
        model(ids(4))
    with pytest.raises(ValueError, match="input_ids"):
        model(ids(2, 0))
    with pytest.raises(TypeError, match="int64"):
        model(ids(2, 4).float())


def test_gpt_refuses_more_than_its_block():
    model = tiny_model("gpt")
    with pytest.raises(ValueError, match="13 new tokens exceed block_size = 12"):
        model(ids(1, 13))
    with torch.no_grad():
        _, cache = model(ids(1, 10), model.init_state(1))
        with pytest.raises(ValueError, match="10 cached"):
            model(ids(1, 3), cache)
        with pytest.raises(ValueError, match="state holds 1 sequences, input_ids 2"):
            model(ids(2, 1), cache)


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend"):
        tiny_model("gpt", "numpy")
    with pytest.raises(ValueError, match="backend"):
        tiny_model("lstm", "numpy")


@each_family
@each_backend
def test_targets_give_the_summed_loss(family, backend):
    model, targets = tiny_model(family, backend).eval(), ids(3, 12, seed=1)
    targets[1, 2:] = -100
    logits = model(ids(3, 12))[0]
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(model(ids(3, 12), targets=targets)[0], expected)


@pytest.mark.parametrize("backend", ["lmkern", "torch"])
def test_gpt_is_the_pre_norm_transformer(backend):
    """Against its definition, written out: x + attention(norm(x)), then x + mlp(norm(x))."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(17, 8, n_layer=3, n_head=2, n_embd=8, bias=True), backend)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    p, tokens = model.state_dict(), torch.randint(17, (2, 8))

    def norm(x, name):
        return F.layer_norm(x, (8,), p[f"{name}.weight"], p[f"{name}.bias"])

    def linear(x, name):
        return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

    x = p["token_embedding.weight"][tokens] + p["position_embedding"]
    for block in (f"blocks.{i}." for i in range(3)):
        q, k, v = (
            part.view(2, 8, 2, 4).transpose(1, 2)
            for part in linear(norm(x, block + "attention_norm"), block + "attention.qkv").chunk(
                3, -1
            )
        )
        scores = (q @ k.transpose(2, 3) / 2).masked_fill(torch.ones(8, 8).triu(1) > 0, -torch.inf)
        x = x + linear((scores.softmax(3) @ v).transpose(1, 2).flatten(2), block + "attention.out")
        hidden = F.gelu(linear(norm(x, block + "mlp_norm"), block + "mlp.up"))
        x = x + linear(hidden, block + "mlp.out")
    logits = norm(x, "norm") @ p["token_embedding.weight"].t()
    torch.testing.assert_close(model.eval()(tokens)[0], logits, atol=1e-4, rtol=1e-4)
