"""Generation: cached against uncached, sampling, arguments."""

import pytest
import torch

from lm_helpers import BACKENDS, VOCAB, tiny_model
from lmkern.generate import generate, sample, stream

each_family = pytest.mark.parametrize("family", ["gpt", "lstm"])
PROMPT = torch.tensor([[1, 4, 2], [7, 0, 9]])


def greedy_without_state(model, tokens, count):
    """What `generate` documents, by recomputing everything for every token."""
    size, window = model.context_size, tokens
    for _ in range(count):
        if size is not None and window.shape[1] > size:
            window = window[:, -(size // 2) :]
        with torch.no_grad():
            following = model(window)[0][:, -1].argmax(-1, keepdim=True)
        window = torch.cat([window, following], 1)
        tokens = torch.cat([tokens, following], 1)
    return tokens


@each_family
@pytest.mark.parametrize("backend", BACKENDS)
def test_cached_generation_equals_recomputation(family, backend):
    model = tiny_model(family, backend, seed=2).eval()
    expected = greedy_without_state(model, PROMPT, 40)  # GPT's block of 12 overflows four times
    assert torch.equal(generate(model, PROMPT, 40, temperature=0), expected)
    assert len(expected[0].unique()) > 1


@each_family
def test_the_prefix_is_never_recomputed(family):
    model = tiny_model(family)
    lengths = []
    model.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    generate(model, PROMPT, 20, seed=0)
    expected = [3] + [1] * 19
    if family == "gpt":
        # Full after 3 + 9 tokens; then 6 tokens are read again, which leaves room for 6 more.
        expected[10] = expected[17] = 6
    assert lengths == expected


def test_long_prompt_is_cut_to_the_context():
    model = tiny_model("gpt").eval()
    prompt = torch.arange(30)[None] % VOCAB
    cut = generate(model, prompt[:, -12:], 5, temperature=0)
    assert torch.equal(generate(model, prompt, 5, temperature=0)[:, -17:], cut)


@each_family
def test_seed_and_batch(family):
    model = tiny_model(family, seed=1)
    model.train()
    state = torch.random.get_rng_state()
    first = generate(model, PROMPT, 15, seed=3)
    assert torch.equal(first, generate(model, PROMPT, 15, seed=3))
    assert not torch.equal(first, generate(model, PROMPT, 15, seed=4))
    assert torch.equal(torch.random.get_rng_state(), state) and model.training
    assert torch.equal(first[:, :3], PROMPT) and first.shape == (2, 18)
    one = generate(model, PROMPT[1:], 15, temperature=0)
    assert torch.equal(one[0], generate(model, PROMPT, 15, temperature=0)[1])
    parts = list(stream(model, PROMPT, 15, seed=3))
    assert torch.equal(torch.stack(parts, 1), first[:, 3:])
    assert torch.equal(generate(model, PROMPT, 0), PROMPT)


def test_stream_leaves_gradients_on_between_tokens():
    for _ in stream(tiny_model("lstm"), PROMPT, 3):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def frequencies(**options):
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(20_000, 4)
    tokens = sample(logits, generator=torch.Generator().manual_seed(0), **options)
    return (torch.bincount(tokens, minlength=4) / len(tokens)).tolist()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 0.5}, [0.6849, 0.2466, 0.0616, 0.0068]),
        ({"temperature": 0.0}, [1, 0, 0, 0]),
        ({"temperature": 1e-30}, [1, 0, 0, 0]),
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_k": 9}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_p": 0.6}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.01}, [1, 0, 0, 0]),
        ({"top_p": 1.0}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_k": 3, "top_p": 0.5}, [1, 0, 0, 0]),
    ],
)
def test_sampling_frequencies(options, expected):
    measured = frequencies(**options)
    for value, target in zip(measured, expected, strict=True):
        assert (value == 0) if target == 0 else value == pytest.approx(target, abs=0.015)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, "input_ids"),
        ({"input_ids": torch.zeros(3, dtype=torch.int64)}, "input_ids"),
    ],
)
def test_bad_arguments_are_named(options, name):
    arguments = {"input_ids": PROMPT, "max_new_tokens": 3, **options}
    with pytest.raises(ValueError, match=name):
        stream(tiny_model("lstm"), **arguments)
