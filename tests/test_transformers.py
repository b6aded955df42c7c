"""Hugging Face models on attn_implementation="lmkern", against "eager" and "sdpa"."""

from __future__ import annotations

import copy
import inspect
import math
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import lmkern

pytestmark = pytest.mark.cpu_only("whole models of others, made by others")

transformers = pytest.importorskip("transformers")
lmkern.register_transformers()

B, L, V = 3, 11, 50

SMALL = {
    "vocab_size": V,
    "hidden_size": 24,
    "intermediate_size": 30,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 6, "pad_token_id": 0}

# Configuration, model class, what of scaled_dot_product_attention it needs beyond torch's signature.
MODELS: dict[str, tuple[str, dict[str, Any], str, str | None]] = {
    "bert": ("BertConfig", SMALL, "BertForMaskedLM", None),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": V, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 40},
        "GPT2LMHeadModel",
        None,
    ),
    "llama": ("LlamaConfig", GROUPED, "LlamaForCausalLM", None),
    "mistral": ("MistralConfig", GROUPED | {"sliding_window": 4}, "MistralForCausalLM", None),
    "t5": (
        "T5Config",
        {"vocab_size": V, "d_model": 24, "d_kv": 6, "d_ff": 30, "num_layers": 2, "num_heads": 4},
        "T5ForConditionalGeneration",
        None,
    ),
    "gemma2": (
        "Gemma2Config",
        GROUPED | {"sliding_window": 4, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 6},
        "Gemma2ForCausalLM",
        "softcap",
    ),
    "gpt_oss": (
        "GptOssConfig",
        GROUPED
        | {"hidden_size": 32, "intermediate_size": 32}  # torch's grouped product wants 16 bytes
        | {"sliding_window": 4, "num_local_experts": 2, "num_experts_per_tok": 1},
        "GptOssForCausalLM",
        "sinks",
    ),
}
DECODERS = [name for name in MODELS if name not in ("bert", "t5")]


def extended_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_weights: str | None = None,
) -> Any:
    """What lmkern.functional.scaled_dot_product_attention does with its keyword-only arguments."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ key.transpose(-2, -1) * (scale or 1 / math.sqrt(query.shape[-1]))
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    distance = torch.arange(query.shape[2])[:, None] - torch.arange(key.shape[2])
    if is_causal:
        scores = scores.masked_fill(distance < 0, -torch.inf)
    if window is not None:
        scores = scores.masked_fill((distance > window[0]) | (-distance > window[1]), -torch.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1).nan_to_num(0.0)[..., : key.shape[2]]
    return (weights @ value, weights) if return_weights else weights @ value


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments with which attention was called."""
    seen: list[dict[str, Any]] = []
    function = lmkern.functional.scaled_dot_product_attention

    def record(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
        seen.append({"query": query, "key": key, "value": value, **options})
        return function(query, key, value, **options)

    record.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    monkeypatch.setattr(lmkern.functional, "scaled_dot_product_attention", record)
    return seen


def build(name: str, attention: str = "lmkern", **options: Any) -> Any:
    config_class, sizes, model_class, _ = MODELS[name]
    torch.manual_seed(1)
    config = getattr(transformers, config_class)(**sizes, **options)
    model = getattr(transformers, model_class)._from_config(config, attn_implementation=attention)
    for parameter in model.parameters():  # scores that differ, so that a wrong mask shows
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def with_attention(model: Any, attention: str) -> Any:
    other = copy.deepcopy(model)
    other.set_attn_implementation(attention)
    return other


def use(name: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel, if it has what the model needs, or plain torch in its place."""
    needs = MODELS[name][3]
    function = lmkern.functional.scaled_dot_product_attention
    if kernel == "plain":
        monkeypatch.setattr(lmkern.functional, "scaled_dot_product_attention", extended_attention)
    elif needs and needs not in inspect.signature(function).parameters:
        pytest.skip(f"scaled_dot_product_attention has no {needs} yet")


def batch(name: str, padding: str) -> dict[str, Tensor]:
    ids = torch.randint(1, V, (B, L))
    inputs = {"input_ids": ids}
    if padding:
        mask = torch.ones(B, L, dtype=torch.int64)
        mask[1, :4], mask[2, :1] = 0, 0
        inputs["attention_mask"] = mask if padding == "left" else mask.flip(1)
    if name == "t5":
        inputs["decoder_input_ids"] = torch.randint(1, V, (B, L - 2))
    return inputs


def visible(name: str, inputs: dict[str, Tensor], logits: Tensor) -> Tensor:
    """The logits of tokens, without those of padding: a query that sees no key has no right answer."""
    if name == "t5" or "attention_mask" not in inputs:
        return logits
    return logits[inputs["attention_mask"].bool()]


@pytest.mark.parametrize("kernel", ["ours", "plain"])
@pytest.mark.parametrize("padding", ["", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_forward_and_backward(name, padding, kernel, monkeypatch, fallback_allowed):
    use(name, kernel, monkeypatch)
    model, inputs = build(name), batch(name, padding)
    results = {}
    for attention in ("lmkern", "eager", "sdpa"):
        if attention == "sdpa" and MODELS[name][3]:
            continue  # it knows neither
        other = with_attention(model, attention)
        logits = visible(name, inputs, other(**inputs, use_cache=False).logits)
        logits.log_softmax(-1)[..., 0].sum().backward()
        gradients = [p.grad for p in other.parameters() if p.grad is not None]
        results[attention] = (logits.detach(), gradients)
    ours = results.pop("lmkern")
    for logits, gradients in results.values():
        torch.testing.assert_close(ours[0], logits, atol=2e-5, rtol=1e-4)
        assert len(ours[1]) == len(gradients) > 10
        for a, b in zip(ours[1], gradients, strict=True):
            torch.testing.assert_close(
                a, b, atol=2e-5 * b.abs().max().clamp(min=1).item(), rtol=1e-3
            )


@pytest.mark.parametrize("kernel", ["ours", "plain"])
@pytest.mark.parametrize("cache", ["dynamic", "static", None])
@pytest.mark.parametrize("name", [*DECODERS, "t5"])
def test_generate(name, cache, kernel, monkeypatch, fallback_allowed):
    use(name, kernel, monkeypatch)
    model, inputs = build(name), batch(name, "left")
    inputs.pop("decoder_input_ids", None)
    options: dict[str, Any] = {
        "max_new_tokens": 7, "do_sample": False, "pad_token_id": 0, "eos_token_id": None,
        "output_scores": True, "return_dict_in_generate": True, "disable_compile": True,
        "decoder_start_token_id": 0,
        **({"cache_implementation": cache} if cache else {"use_cache": False}),
    }  # fmt: skip
    ours, theirs = (
        with_attention(model, attention).generate(**inputs, **options)
        for attention in ("lmkern", "eager")
    )
    assert len(ours.scores) == 7
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(ours.scores, theirs.scores, atol=1e-4, rtol=1e-4)


def test_beams_and_a_prompt_in_two_pieces():
    model, inputs = build("llama"), batch("llama", "")
    reference = with_attention(model, "eager")
    beams = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**inputs, **beams), reference.generate(**inputs, **beams))
    ids = inputs["input_ids"]
    logits = []
    for each in (model, reference):
        cache = transformers.DynamicCache(config=each.config)
        each(ids[:, :4], past_key_values=cache)
        logits.append(each(ids[:, 4:], past_key_values=cache).logits)
    torch.testing.assert_close(*logits, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(logits[0], model(ids).logits[:, 4:], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_causal_batch_has_no_mask_and_no_copied_heads(name, calls):
    model = build(name)
    inputs = batch(name, "")
    for mask in (None, torch.ones(B, L, dtype=torch.int64)):
        model(inputs["input_ids"], attention_mask=mask)
    assert len(calls) == 4
    for call in calls:
        assert call["attn_mask"] is None and call["is_causal"]
        assert call["key"].shape[1] == (2 if name == "llama" else 4)
        assert call["enable_gqa"] == (name == "llama")


def test_the_mask_of_a_padded_encoder_is_one_row_per_sequence(calls):
    model = build("bert")
    model(**batch("bert", ""))
    model(**batch("bert", "right"))
    assert [call["attn_mask"] is None for call in calls] == [True, True, False, False]
    mask = calls[-1]["attn_mask"]
    assert mask.dtype == torch.bool and mask.shape == (B, 1, L, L) and mask.stride(2) == 0
    assert mask.untyped_storage().nbytes() == B * L


@pytest.mark.parametrize("padding", ["", "left"])
def test_a_plain_window_is_told_to_the_kernel(padding, monkeypatch):
    seen: list[dict[str, Any]] = []

    def spy(*tensors: Tensor, **options: Any) -> Tensor:
        seen.append(options)
        return extended_attention(*tensors, **options)

    spy.__signature__ = inspect.signature(extended_attention)  # type: ignore[attr-defined]
    monkeypatch.setattr(lmkern.functional, "scaled_dot_product_attention", spy)
    model, inputs = build("mistral"), batch("mistral", padding)
    logits = visible("mistral", inputs, model(**inputs).logits)
    expected = visible("mistral", inputs, with_attention(model, "eager")(**inputs).logits)
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)
    for call in seen:
        assert call.get("window") == (None if padding else (3, 0))
        assert (call["attn_mask"] is None) == (not padding)
    seen.clear()
    model(inputs["input_ids"][:, :3])  # shorter than the window
    assert all(call["is_causal"] and "window" not in call for call in seen)


@pytest.mark.parametrize("kernel", ["ours", "plain"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral"])
def test_sequences_packed_by_their_positions(name, kernel, monkeypatch):
    use(name, kernel, monkeypatch)
    model = build(name)
    ids = batch(name, "")["input_ids"]
    positions = torch.cat([torch.arange(6), torch.arange(L - 6)]).expand(B, L)
    ours, theirs = (
        with_attention(model, attention)(ids, position_ids=positions, use_cache=False).logits
        for attention in ("lmkern", "eager")
    )
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(ours[:, 6:], model(ids[:, 6:]).logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kernel", ["ours", "plain"])
def test_attention_weights(kernel, monkeypatch, fallback_allowed):
    function = lmkern.functional.scaled_dot_product_attention
    if kernel == "plain":
        monkeypatch.setattr(lmkern.functional, "scaled_dot_product_attention", extended_attention)
    elif "return_weights" not in inspect.signature(function).parameters:
        pytest.skip("scaled_dot_product_attention has no return_weights yet")
    module = SimpleNamespace(is_causal=True)
    attention = transformers.AttentionInterface()["lmkern"]
    q, k, v = (torch.randn(B, heads, L, 6) for heads in (4, 2, 2))
    out, weights = attention(module, q, k, v, None, output_attentions=True)
    assert out.shape == (B, L, 4, 6) and weights.shape == (B, 4, L, L)
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, 4, L))
    torch.testing.assert_close(
        out.transpose(1, 2), weights @ v.repeat_interleave(2, 1), atol=1e-5, rtol=1e-5
    )


def test_weights_that_cannot_be_had_are_none_with_a_warning():
    function = lmkern.functional.scaled_dot_product_attention
    if "return_weights" in inspect.signature(function).parameters:
        pytest.skip("they can be had")
    q = torch.randn(B, 4, L, 6)
    attention = transformers.AttentionInterface()["lmkern"]
    with pytest.warns(lmkern.LmkernWarning, match="returns no attention weights"):
        assert attention(SimpleNamespace(), q, q, q, None, output_attentions=True)[1] is None


def test_switching_a_model_over_and_back():
    model = build("bert", "sdpa")
    inputs = batch("bert", "right")
    before = model(**inputs).logits
    model.set_attn_implementation("lmkern")
    assert model.config._attn_implementation == "lmkern"
    logits = model(**inputs).logits
    assert not torch.equal(logits, before)
    torch.testing.assert_close(logits, before, atol=2e-5, rtol=1e-4)
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_bfloat16_and_autocast(name):
    model = build(name)
    inputs = batch(name, "right")
    expected = visible(name, inputs, model(**inputs).logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = visible(name, inputs, model(**inputs).logits)
    half = visible(name, inputs, model.bfloat16()(**inputs).logits)
    for logits in (mixed, half):
        assert logits.dtype == torch.bfloat16
        assert (logits.float() - expected).norm() < 0.1 * expected.norm()


def test_dropout_is_on_in_training_only(fallback_allowed):
    model = build("llama", attention_dropout=0.5)
    ids = batch("llama", "")["input_ids"]
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


def test_under_compile():
    model, inputs = build("llama"), batch("llama", "right")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    logits = [
        visible("llama", inputs, f(**inputs, use_cache=False).logits) for f in (compiled, model)
    ]
    torch.testing.assert_close(*logits)


def test_converted_as_well(tmp_path):
    model = build("gpt2")
    ids = batch("gpt2", "")["input_ids"]
    expected = with_attention(model, "eager")(ids).logits
    report = lmkern.convert(model)
    names = {layer.names[0] for layer in report.swapped}
    assert {"transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head"} <= names
    assert model.lm_head.weight is model.transformer.wte.weight
    torch.testing.assert_close(model(ids).logits, expected, atol=2e-5, rtol=1e-4)
    model.save_pretrained(tmp_path)
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, attn_implementation="lmkern")
    torch.testing.assert_close(again(ids).logits, expected, atol=2e-5, rtol=1e-4)


def test_a_paged_cache_is_refused():
    attention = transformers.AttentionInterface()["lmkern"]
    cache = type("PagedAttentionCache", (), {})()
    q = torch.randn(B, 4, L, 6)
    with pytest.raises(NotImplementedError, match="use 'sdpa'"):
        attention(SimpleNamespace(), q, q, q, None, cache=cache)


@pytest.mark.parametrize(
    "code",
    [
        "import sys, lmkern; assert 'transformers' not in sys.modules",
        "import sys; sys.modules['transformers'] = None\n"
        "import lmkern\n"
        "try: lmkern.register_transformers()\n"
        "except ImportError as error: assert 'needs Hugging Face transformers' in str(error)\n"
        "else: raise SystemExit('no error')",
    ],
)
def test_lmkern_without_transformers(code):
    subprocess.run([sys.executable, "-c", code], check=True)
