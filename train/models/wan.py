"""Wan2.1 text-to-video: diffusers' WanTransformer3DModel with radial self-attention.

The class stays as diffusers ships it. Each block's ``attn1`` gets a `WanSelfAttention` processor, the cross-attention
``attn2`` keeps its own. The model predicts the velocity eps - x0 at timestep 1000 sigma; text is zero-padded to 512
tokens and not masked, as in the family's own training.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.nn import functional as F

from data.sample import TextTokens
from radial import VideoGrid
from train.errors import UserError
from train.models.base import Conditions, ModelAdapter, PlannedAttention


class WanSelfAttention(PlannedAttention):
    """Attention processor of one self-attention layer."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Same contract as diffusers' WanAttnProcessor; hidden_states is (batch, this rank's tokens, dim)."""
        assert encoder_hidden_states is None and attention_mask is None, "self-attention only"
        q = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        k = attn.norm_k(attn.to_k(hidden_states)).unflatten(2, (attn.heads, -1))
        v = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1))
        if rotary_emb is not None:
            q, k = _rotate(q, *rotary_emb), _rotate(k, *rotary_emb)
        out = self.attend(q.type_as(v), k.type_as(v), v)
        return attn.to_out[1](attn.to_out[0](out.flatten(2)))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding on neighbouring pairs.

    Args:
        x: (batch, tokens, heads, head_dim).
        cos, sin: (1, tokens, 1, head_dim), each angle stored twice.
    """
    # each number's partner by a flip within the pairs: the compiler makes one pass of it, and stores nothing between
    partner = x.float().unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    first = torch.arange(x.shape[-1], device=x.device) % 2 == 0
    return (x.float() * cos + partner * torch.where(first, -sin, sin)).type_as(x)


class WanAdapter(ModelAdapter):
    """Adapter of the Wan2.1 text-to-video family (1.3B, 14B, and any small model of the class)."""

    family = "wan"
    model_class = WanTransformer3DModel
    processor_class = WanSelfAttention
    lora_targets = r"blocks\.\d+\.attn1\.(to_q|to_k|to_v|to_out\.0)"
    tiny_config = {  # noqa: RUF012
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 24,
        "freq_dim": 16,
        "ffn_dim": 48,
        "num_layers": 3,
    }

    def blocks(self) -> list[nn.Module]:
        return list(self.transformer.blocks)

    def self_attention(self, block: nn.Module) -> Any:
        return block.attn1

    def feed_forwards(self) -> list[nn.Module]:
        return [block.ffn for block in self.transformer.blocks]

    def grid(self, latent: Tensor) -> VideoGrid:
        return VideoGrid.from_latent(*latent.shape[2:], patch=self.patch)

    def follow_shard(self) -> None:
        model = self.transformer
        model.rope.register_forward_hook(lambda _, inputs, angles: tuple(self.sliced(angle) for angle in angles))
        # (batch, dim, F, H, W) -> (batch, dim, tokens): the model flattens the last dimensions next
        model.patch_embedding.register_forward_hook(lambda _, inputs, patches: self._own_patches(patches))
        model.proj_out.register_forward_hook(lambda _, inputs, tokens: self.gathered(tokens))

    def _own_patches(self, patches: Tensor) -> Tensor:
        return self.sliced(patches.flatten(2), dim=2)

    def velocity(self, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        parameter = self.transformer.patch_embedding.weight
        tokens = conditions.named("text", "text").tokens
        if tokens.shape[1] > self.text_tokens:
            raise UserError(f"the shards' text has {tokens.shape[1]} tokens, model.text_tokens is {self.text_tokens}")
        tokens = F.pad(tokens, (0, 0, 0, self.text_tokens - tokens.shape[1]))
        return self.transformer(x.to(parameter.dtype), 1000 * sigma, tokens.to(parameter.dtype), return_dict=False)[
            0
        ].float()

    def random_conditions(self, latent: Tensor) -> Conditions:
        shape = (len(latent), self.text_tokens, self.transformer.config.text_dim)
        tokens = torch.randn(shape, device=latent.device)
        return Conditions({"text": TextTokens(tokens, torch.ones(shape[:2], dtype=torch.bool, device=latent.device))})

    def linear_flops(self, grid: VideoGrid) -> float:
        config, n, text = self.transformer.config, grid.tokens, self.text_tokens
        dim, patch = config.num_attention_heads * config.attention_head_dim, math.prod(config.patch_size)
        projections = 12 * n * dim**2 + 4 * text * dim**2  # Q, K, V, O of both attentions; text only as K and V
        cross_attention, feed_forward = 4 * n * text * dim, 4 * n * dim * config.ffn_dim
        ends = 2 * n * dim * patch * (config.in_channels + config.out_channels)
        embedding = 2 * text * dim * (config.text_dim + dim)
        return float(config.num_layers * (projections + cross_attention + feed_forward) + ends + embedding)

    @property
    def patch(self) -> tuple[int, int, int]:
        return tuple(self.transformer.config.patch_size)

    @property
    def attention_shape(self) -> tuple[int, int, int]:
        config = self.transformer.config
        return config.num_layers, config.num_attention_heads, config.attention_head_dim
