"""Joint attention: the video's and the text's tokens attend to each other in one sequence, [video, text].

Each stream has projections of its own, or both share the video's. Only the video's tokens have positions. Text is
padded to one length, so that layouts and compiled layers stay the same; padding is masked as keys. Under sequence
parallelism a rank holds its stretch of the video and all of the text.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from train.models.layout_attention import LayoutAttention


class JointAttention(LayoutAttention):
    """Attention processor of one joint attention; the contract of diffusers' processors of the same families.

    Padding's query rows are computed and end up in padding alone, which nothing reads.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Attention's output for video and text.

        Args:
            attn: the module with the projections.
            hidden_states: (batch, this rank's video tokens, dim).
            encoder_hidden_states: (batch, text tokens, text dim).
            attention_mask: what the model hands its layers; see `text_lengths`.
            image_rotary_emb: what the model hands its layers; see `pairs`.
        """
        q, k, v = _heads(attn, hidden_states, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))
        cos, sin = self.pairs(image_rotary_emb)
        q, k = rotate_pairs(q, cos, sin), rotate_pairs(k, cos, sin)
        names = (("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))
        if getattr(attn, "add_q_proj", None) is not None:
            names = (("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k"))
        words = _heads(attn, encoder_hidden_states, *names)
        q, k, v = (torch.cat([x.type_as(v), y.type_as(v)], dim=1) for x, y in zip((q, k, v), words, strict=True))
        lengths = self.text_lengths(attention_mask, encoder_hidden_states.shape[1])
        out = self.attend(q, k, v, lengths).flatten(2)
        video, text = out.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        if attn.to_out is not None:
            video = attn.to_out[1](attn.to_out[0](video))
        if getattr(attn, "to_add_out", None) is not None:
            text = attn.to_add_out(text)
        return video, text

    @abstractmethod
    def text_lengths(self, mask: Tensor, text_tokens: int) -> Tensor:
        """(batch,) valid text tokens of each sample, from the model's mask."""

    @abstractmethod
    def pairs(self, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the model's angles, one a pair of channels, that broadcast to (tokens, heads, pairs)."""


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding on neighbouring pairs of channels, computed in float32.

    Args:
        x: (batch, tokens, heads, head_dim).
        cos, sin: broadcast to (tokens, heads, head_dim / 2).
    """
    # each number's partner by a flip within the pair: the compiler makes one pass of it, and stores nothing between
    pairs = x.float().unflatten(-1, (-1, 2))
    sign = torch.tensor([-1.0, 1.0], device=x.device)
    return (pairs * cos[..., None] + pairs.flip(-1) * (sin[..., None] * sign)).flatten(-2).type_as(x)


def _heads(attn: Any, x: Tensor, layers: tuple[str, str, str], norms: tuple[str, str]) -> tuple[Tensor, ...]:
    """Normalised Q and K, and V, (batch, tokens, heads, head_dim) each."""
    q, k, v = (getattr(attn, layer)(x).unflatten(2, (attn.heads, -1)) for layer in layers)
    return getattr(attn, norms[0])(q), getattr(attn, norms[1])(k), v
