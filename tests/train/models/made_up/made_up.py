"""A family that the project does not know, as CONTRIBUTING says to add one: diffusers' LTXVideoTransformer3DModel.

Its latents come as a sequence of tokens, its text is masked in cross-attention. `test_made_up.py` puts this file
into train/models/families/ of a copy of the project.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import LTXVideoTransformer3DModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from data.shards.sample import TextTokens
from radial import VideoGrid
from train.models.base import ModelAdapter
from train.models.conditions import Conditions
from train.models.layout_attention import LayoutAttention


class MadeUpSelfAttention(LayoutAttention):
    """Attention processor of one self-attention layer: diffusers' arithmetic around `attend`."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Same contract as diffusers' LTXVideoAttnProcessor."""
        assert image_rotary_emb is not None
        q, k = (
            _rotate(x, *image_rotary_emb)
            for x in (attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states)))
        )
        v = attn.to_v(hidden_states)
        q, k, v = (x.type_as(v).unflatten(2, (attn.heads, -1)) for x in (q, k, v))
        return attn.to_out[1](attn.to_out[0](self.attend(q, k, v).flatten(2)))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.float().unflatten(2, (-1, 2)).unbind(-1)
    return x.float() * cos + torch.stack([-odd, even], dim=-1).flatten(2) * sin


class MadeUpAdapter(ModelAdapter):
    """Adapter of the class; shards hold ``text.text``."""

    family = "made_up"
    model_class = LTXVideoTransformer3DModel
    processor_class = MadeUpSelfAttention
    lora_targets = r"transformer_blocks\.\d+\.attn1\.(to_q|to_k|to_v|to_out\.0)"
    tiny_config = {  # noqa: RUF012
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "cross_attention_dim": 64,
        "num_layers": 3,
        "caption_channels": 24,
    }

    def layers(self) -> list[nn.Module]:
        return list(self.transformer.transformer_blocks)

    def self_attention(self, layer: nn.Module) -> Any:
        return layer.attn1

    def feed_forwards(self) -> list[nn.Module]:
        return [layer.ff for layer in self.transformer.transformer_blocks]

    def grid(self, latent: Tensor) -> VideoGrid:
        return VideoGrid.from_latent(*latent.shape[2:], patch=self.patch)

    def hook_tokens(self) -> Sequence[RemovableHandle]:
        model = self.transformer
        return (
            model.rope.register_forward_hook(lambda _, inputs, angles: tuple(self.to_layers(x) for x in angles)),
            model.proj_in.register_forward_hook(lambda _, inputs, tokens: self.to_layers(tokens)),
            model.proj_out.register_forward_hook(lambda _, inputs, tokens: self.from_layers(tokens)),
        )

    def velocity(self, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        dtype = self.transformer.proj_in.weight.dtype
        tokens, lengths = conditions.packed_text("text", self.text_tokens)
        mask = torch.arange(self.text_tokens, device=lengths.device) < lengths[:, None]
        frames, height, width = x.shape[2:]
        sequence = x.flatten(2).transpose(1, 2).to(dtype)
        out = self.transformer(
            sequence, tokens.to(dtype), 1000 * sigma, mask, frames, height, width, (1.0, 32.0, 32.0), return_dict=False
        )[0]
        return out.float().transpose(1, 2).unflatten(2, (frames, height, width))

    def random_conditions(self, latent: Tensor) -> Conditions:
        shape = (len(latent), self.text_tokens, self.transformer.config.caption_channels)
        tokens = torch.randn(shape, device=latent.device)
        return Conditions({"text": TextTokens(tokens, torch.ones(shape[:2], dtype=torch.bool, device=latent.device))})

    def linear_flops(self, grid: VideoGrid) -> float:
        config, n, text = self.transformer.config, grid.tokens, self.text_tokens
        dim = config.num_attention_heads * config.attention_head_dim
        layer = 12 * n * dim**2 + 4 * text * dim**2 + 4 * n * text * dim + 16 * n * dim**2
        ends = 2 * n * dim * (config.in_channels + config.out_channels)
        return float(config.num_layers * layer + ends + 2 * text * dim * (config.caption_channels + dim))

    @property
    def patch(self) -> tuple[int, int, int]:
        return 1, 1, 1

    @property
    def attention_shape(self) -> tuple[int, int, int]:
        config = self.transformer.config
        return config.num_layers, config.num_attention_heads, config.attention_head_dim
