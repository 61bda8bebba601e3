"""Wan2.1 text-to-video: diffusers' WanTransformer3DModel with radial self-attention.

The class stays as diffusers ships it. Each block's ``attn1`` gets a `WanSelfAttention` processor, the cross-attention
``attn2`` keeps its own. The model predicts the velocity eps - x0 at timestep 1000 sigma; text is zero-padded to 512
tokens and not masked, as in the family's own training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.nn import functional as F

from data.sample import TextTokens
from radial import BlockLayout, VideoGrid
from train.errors import UserError
from train.models.base import ModelAdapter, named_text
from train.plan import AttentionPlan
from train.sequence import SequenceShard, sharded_attention


class WanSelfAttention:
    """Attention processor of one self-attention layer; `WanAdapter.set_plan` gives it the layout."""

    def __init__(self) -> None:
        self.layout: BlockLayout | None = None
        self.backend: str | None = None
        self.shard: SequenceShard | None = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Same contract as diffusers' WanAttnProcessor; hidden_states is (batch, this rank's tokens, dim)."""
        assert self.layout is not None, "set_plan comes before the forward"
        assert encoder_hidden_states is None and attention_mask is None, "self-attention only"
        q = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        k = attn.norm_k(attn.to_k(hidden_states)).unflatten(2, (attn.heads, -1))
        v = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1))
        if rotary_emb is not None:
            q, k = _rotate(q, *rotary_emb), _rotate(k, *rotary_emb)
        out = sharded_attention(q.type_as(v), k.type_as(v), v, self.layout, self.shard, backend=self.backend)
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
    lora_targets = r"blocks\.\d+\.attn1\.(to_q|to_k|to_v|to_out\.0)"

    @classmethod
    def load(
        cls, path: str | Path, subfolder: str | None = None, *, text_tokens: int = 512, dtype: torch.dtype
    ) -> WanAdapter:
        """See `ModelAdapter.load`.

        Raises:
            UserError: the folder holds another class of model.
        """
        config = WanTransformer3DModel.load_config(path, subfolder=subfolder)
        if config.get("_class_name") != "WanTransformer3DModel":
            raise UserError(
                f"model.path {path} holds a {config.get('_class_name')}, expected a WanTransformer3DModel: "
                "choose the model=... that fits the weights"
            )
        model = WanTransformer3DModel.from_pretrained(
            path, subfolder=subfolder, torch_dtype=dtype, use_safetensors=True
        )
        return cls(model, text_tokens)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, text_tokens: int = 512) -> WanAdapter:
        return cls(WanTransformer3DModel(**config), text_tokens)

    def install_processors(self) -> None:
        self._shard: SequenceShard | None = None
        self._follows_shard = False
        for block in self.transformer.blocks:
            block.attn1.set_processor(WanSelfAttention())

    def feed_forwards(self) -> list[nn.Module]:
        return [block.ffn for block in self.transformer.blocks]

    def grid(self, latent: Tensor) -> VideoGrid:
        return VideoGrid.from_latent(*latent.shape[2:], patch=self.patch)

    def set_plan(self, plan: AttentionPlan) -> None:
        for layer, block in enumerate(self.transformer.blocks):
            block.attn1.processor.layout = plan.layout(layer)
            block.attn1.processor.backend = plan.backend_of(layer)
            block.attn1.processor.shard = plan.shard
        self._shard = plan.shard
        if plan.shard is not None and not self._follows_shard:
            # where the sequence enters and leaves the blocks; now, since a LoRA may have replaced proj_out
            self.transformer.rope.register_forward_hook(self._slice_rotary)
            self.transformer.patch_embedding.register_forward_hook(self._slice_patches)
            self.transformer.proj_out.register_forward_hook(self._gather_output)
            self._follows_shard = True

    def _slice_rotary(self, module: Any, inputs: Any, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        shard = self._shard
        return angles if shard is None else (shard.slice(angles[0]), shard.slice(angles[1]))

    def _slice_patches(self, module: Any, inputs: Any, patches: Tensor) -> Tensor:
        """(batch, dim, F, H, W) -> (batch, dim, tokens): the model flattens the last dimensions next."""
        return patches if self._shard is None else self._shard.slice(patches.flatten(2), dim=2)

    def _gather_output(self, module: Any, inputs: Any, tokens: Tensor) -> Tensor:
        return tokens if self._shard is None else self._shard.gather(tokens)

    def velocity(self, x: Tensor, sigma: Tensor, text: Mapping[str, TextTokens]) -> Tensor:
        parameter = self.transformer.patch_embedding.weight
        tokens = named_text(text, "text").tokens
        if tokens.shape[1] > self.text_tokens:
            raise UserError(f"the shards' text has {tokens.shape[1]} tokens, model.text_tokens is {self.text_tokens}")
        tokens = F.pad(tokens, (0, 0, 0, self.text_tokens - tokens.shape[1]))
        return self.transformer(x.to(parameter.dtype), 1000 * sigma, tokens.to(parameter.dtype), return_dict=False)[
            0
        ].float()

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
