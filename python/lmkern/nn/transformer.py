"""The Transformer of Vaswani et al. 2017, its encoder and its decoder. Layers: transformer_layer.py."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import LayerNorm, Module, ModuleList
from torch.nn.init import xavier_uniform_

from lmkern.nn.transformer_layer import (
    Activation,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
)


class TransformerEncoder(Module):
    """``torch.nn.TransformerEncoder``: copies of a layer, one after the other, and a normalisation.

    Args:
        encoder_layer: the layer of which there are ``num_layers`` deep copies, with equal weights.
        norm: applied to the output of the last.
        enable_nested_tensor, mask_check: accepted as by torch, without effect: padding is skipped
            inside of the attention, and padded positions hold values in evaluation as in training.

    Shape:
        - src, mask, src_key_padding_mask: as those of the layer.
        - is_causal: None looks whether ``mask`` is the causal one (but not under torch.compile).
    """

    def __init__(
        self,
        encoder_layer: Module,
        num_layers: int,
        norm: Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        super().__init__()
        self.layers = _copies(encoder_layer, num_layers)
        self.num_layers, self.norm = num_layers, norm
        self.enable_nested_tensor, self.mask_check = enable_nested_tensor, mask_check

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        if is_causal is None:
            is_causal = _is_causal_mask(mask)
        x = src
        for layer in self.layers:
            x = layer(
                x, src_mask=mask, is_causal=is_causal, src_key_padding_mask=src_key_padding_mask
            )
        return x if self.norm is None else self.norm(x)


class TransformerDecoder(Module):
    """``torch.nn.TransformerDecoder``: copies of a layer, one after the other, and a normalisation.

    An activation that is a module stays what it is in the copies, where torch's fall back to ReLU.

    Args:
        decoder_layer: the layer of which there are ``num_layers`` deep copies, with equal weights.
        norm: applied to the output of the last.

    Shape:
        - as those of the layer; tgt_is_causal: None looks whether ``tgt_mask`` is the causal one (but
          not under torch.compile).
    """

    def __init__(self, decoder_layer: Module, num_layers: int, norm: Module | None = None) -> None:
        super().__init__()
        self.layers = _copies(decoder_layer, num_layers)
        self.num_layers, self.norm = num_layers, norm

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        if tgt_is_causal is None:
            tgt_is_causal = _is_causal_mask(tgt_mask)
        x = tgt
        for layer in self.layers:
            x = layer(
                x, memory, tgt_mask=tgt_mask, memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask, tgt_is_causal=tgt_is_causal,
                memory_is_causal=memory_is_causal,
            )  # fmt: skip
        return x if self.norm is None else self.norm(x)


class Transformer(Module):
    """``torch.nn.Transformer`` on lmkern's kernels: an encoder, and a decoder that attends to it.

    Constructor arguments, ``state_dict`` and initialisation (Xavier-uniform matrices) are torch's.

    Args:
        d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first,
            bias, device, dtype: of the layers, see :class:`TransformerEncoderLayer`.
        num_encoder_layers, num_decoder_layers: how many.
        custom_encoder, custom_decoder: modules that take their place.

    Shape:
        - src: [S, B, E], [B, S, E] with ``batch_first``, or [S, E]. tgt: [L, B, E], likewise.
        - masks: as of :class:`TransformerEncoder` and :class:`TransformerDecoder`.
        - returns the shape of tgt.

    Raises:
        ValueError, TypeError: an argument that does not fit, naming expected and actual.

    Source: Vaswani et al. 2017.
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        custom_encoder: Any | None = None,
        custom_decoder: Any | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        kwargs: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        layer = (
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first,
            norm_first,
        )  # fmt: skip

        def norm() -> LayerNorm:
            return LayerNorm(d_model, eps=layer_norm_eps, **kwargs)

        if custom_encoder is None:
            encoder_layer = TransformerEncoderLayer(*layer, **kwargs)
            custom_encoder = TransformerEncoder(encoder_layer, num_encoder_layers, norm())
        self.encoder = custom_encoder
        if custom_decoder is None:
            decoder_layer = TransformerDecoderLayer(*layer, **kwargs)
            custom_decoder = TransformerDecoder(decoder_layer, num_decoder_layers, norm())
        self.decoder = custom_decoder
        self._reset_parameters()
        self.d_model, self.nhead, self.batch_first = d_model, nhead, batch_first

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        for name, x in (("src", src), ("tgt", tgt)):
            if x.shape[-1] != self.d_model:
                raise ValueError(
                    f"Transformer: {name} must have d_model = {self.d_model} features, "
                    f"got {list(x.shape)}"
                )
        rows = 0 if self.batch_first else 1
        if src.dim() == 3 and (tgt.dim() != 3 or src.shape[rows] != tgt.shape[rows]):
            raise ValueError(
                f"Transformer: tgt must have B = {src.shape[rows]} like src, got {list(tgt.shape)}"
            )
        memory = self.encoder(
            src, mask=src_mask, src_key_padding_mask=src_key_padding_mask, is_causal=src_is_causal
        )
        return self.decoder(
            tgt, memory, tgt_mask=tgt_mask, memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask, tgt_is_causal=tgt_is_causal,
            memory_is_causal=memory_is_causal,
        )  # fmt: skip

    @staticmethod
    def generate_square_subsequent_mask(
        sz: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """The causal mask [sz, sz]: 0 where a query sees a key, -inf elsewhere."""
        return torch.full((sz, sz), float("-inf"), dtype=dtype, device=device).triu(1)

    def _reset_parameters(self) -> None:
        for parameter in self.parameters():
            if parameter.dim() > 1:
                xavier_uniform_(parameter)


def _copies(layer: Module, count: int) -> ModuleList:
    return ModuleList([copy.deepcopy(layer) for _ in range(count)])


def _is_causal_mask(mask: Tensor | None) -> bool:
    """Whether the mask hides from every query what comes after it, and nothing else.

    Then the kernel skips half the work. Looking costs one pass over [L, L]; a graph has no values to
    look at.
    """
    if (
        mask is None
        or mask.dim() != 2
        or mask.shape[0] != mask.shape[1]
        or mask.requires_grad
        or torch.compiler.is_compiling()
        or type(mask) is not Tensor
        or torch._C._functorch.is_functorch_wrapped_tensor(mask)
        or mask.device.type == "meta"
    ):
        return False
    if mask.dtype == torch.bool:
        return torch.equal(mask, torch.ones_like(mask).triu(1))
    causal = Transformer.generate_square_subsequent_mask(mask.shape[0], mask.device, mask.dtype)
    return torch.equal(mask, causal)
