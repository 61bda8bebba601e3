"""HunyuanVideo text-to-video: diffusers' HunyuanVideoTransformer3DModel with radial joint attention.

20 double layers, in which video and text have weights of their own, then 40 single layers, in which they share them.
In a single layer the O projection is a part of ``proj_out``, a matrix over attention's output and the MLP's middle.
LLaMA's tokens are refined by two layers of their own before. The model predicts the velocity eps - x0 at timestep 1000
sigma. It is distilled for guidance, and takes 1000 times the weight as an input: 1 in training, 6 in the public
pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from data.shards.sample import TextTokens
from radial import VideoGrid
from train.errors import UserError
from train.flow import shifted
from train.models.base import ModelAdapter
from train.models.conditions import Conditions
from train.models.joint import JointAttention
from train.models.rope import geometric


class HunyuanAttention(JointAttention):
    """Attention processor of one double or single layer."""

    def text_lengths(self, mask: Tensor, text_tokens: int) -> Tensor:
        """The mask is (batch, 1, 1, this rank's video tokens + text tokens)."""
        return mask[:, 0, 0, -text_tokens:].sum(1)

    def pairs(self, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The tables are (tokens, head_dim), each angle stored twice."""
        cos, sin = rotary
        return cos[:, None, 0::2], sin[:, None, 0::2]


def _apart(layer: nn.Module, inputs: Any, streams: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Video and text as tensors of their own.

    A single layer cuts them out of one tensor. The next would be compiled anew for views of it, and what is kept of the
    video for the backward would keep the text too.
    """
    return tuple(stream.contiguous() for stream in streams)


class HunyuanAdapter(ModelAdapter):
    """Adapter of HunyuanVideo text-to-video; shards hold ``text.text`` (LLaMA) and ``pooled.clip``."""

    family = "hunyuan"
    pipeline_name = "HunyuanVideoPipeline"
    vae_in_bf16 = True
    guided_by_prompt = False
    model_class = HunyuanVideoTransformer3DModel
    processor_class = HunyuanAttention
    lora_targets = (
        r"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)"
        r"|single_transformer_blocks\.\d+\.(attn\.to_q|attn\.to_k|attn\.to_v|proj_out)"
    )
    text_lora_targets = r"transformer_blocks\.\d+\.attn\.(add_q_proj|add_k_proj|add_v_proj|to_add_out)"
    riflex = 4  # of the 8 temporal frequencies, by RIFLEx's authors (arXiv 2502.15894)
    tiny_config = {  # noqa: RUF012
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "num_refiner_layers": 1,
        "mlp_ratio": 2.0,
        "text_embed_dim": 24,
        "pooled_projection_dim": 12,
        "rope_axes_dim": (4, 6, 6),
    }

    def __init__(self, transformer: Any, text_tokens: int) -> None:
        kind = transformer.config.image_condition_type
        if kind is not None:
            raise UserError(f"the model takes an image (image_condition_type={kind}), expected text-to-video weights")
        super().__init__(transformer, text_tokens)
        transformer.rope.register_forward_hook(lambda _, inputs, tables: self._extended(inputs[0], tables))
        # it gives a transposed view, whose strides every sum with it would inherit, layer after layer
        transformer.x_embedder.register_forward_hook(lambda _, inputs, tokens: tokens.contiguous())
        for layer in transformer.single_transformer_blocks:
            layer.register_forward_hook(_apart)

    @classmethod
    def encode_prompt(
        cls, pipeline: Any, prompt: str, negative: str, guided: bool, **settings: Any
    ) -> dict[str, Tensor | None]:
        names = ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask")
        return dict(zip(names, pipeline.encode_prompt(prompt, **settings), strict=True))

    def _extended(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The model's cosines and sines for its input x, (batch, C, F, H, W), past the native length by `rope`."""
        rope = self.transformer.rope
        return self.rope.extend(tables, geometric(rope.theta, rope.rope_dim[0]), self.grid(x))

    @classmethod
    def cut(cls, config: Mapping[str, Any], layers: int) -> dict[str, Any]:
        """One double layer for each two single ones, as the model has them."""
        double = max(1, round(layers / 3))
        return {**config, "num_layers": double, "num_single_layers": layers - double}

    def layers(self) -> list[nn.Module]:
        return [*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks]

    def self_attention(self, layer: nn.Module) -> Any:
        return layer.attn

    def feed_forwards(self) -> list[nn.Module]:
        """The feed-forwards of the double layers; a single layer's is no module of its own."""
        return [layer.ff for layer in self.transformer.transformer_blocks]

    def grid(self, latent: Tensor) -> VideoGrid:
        return VideoGrid.from_latent(*latent.shape[2:], patch=self.patch, text_tokens=self.text_tokens)

    def hook_tokens(self) -> Sequence[RemovableHandle]:
        model = self.transformer
        return (
            model.rope.register_forward_hook(lambda _, inputs, angles: tuple(self.to_layers(x, dim=0) for x in angles)),
            model.x_embedder.register_forward_hook(lambda _, inputs, tokens: self.to_layers(tokens)),
            model.proj_out.register_forward_hook(lambda _, inputs, tokens: self.from_layers(tokens)),
        )

    def velocity(self, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        dtype = self.transformer.x_embedder.proj.weight.dtype
        tokens, lengths = conditions.packed_text("text", self.text_tokens)
        told = self.transformer.config.guidance_embeds
        return self.transformer(
            x.to(dtype),
            1000 * sigma,
            tokens.to(dtype),
            torch.arange(self.text_tokens, device=lengths.device) < lengths[:, None],
            conditions.named("pooled", "clip").to(dtype),
            torch.full_like(sigma, 1000 * conditions.guidance) if told else None,
            return_dict=False,
        )[0].float()

    @classmethod
    def noise_levels(cls, steps: int, shift: float) -> list[float]:
        return [shifted(1 - step / steps, shift) for step in range(steps)]

    def random_conditions(self, latent: Tensor) -> Conditions:
        config, batch = self.transformer.config, len(latent)
        tokens = torch.randn(batch, self.text_tokens, config.text_embed_dim, device=latent.device)
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=latent.device)
        pooled = torch.randn(batch, config.pooled_projection_dim, device=latent.device)
        return Conditions({"text": TextTokens(tokens, mask)}, {"clip": pooled})

    def linear_flops(self, grid: VideoGrid) -> float:
        config, n, text = self.transformer.config, grid.tokens, grid.text_tokens
        dim, wide = config.num_attention_heads * config.attention_head_dim, config.mlp_ratio
        modulation = 12 * dim**2
        # Q, K, V, O and the MLP, of each token in the weights of its stream or in shared ones
        layers = (config.num_layers + config.num_single_layers) * (8 + 4 * wide) * n * dim**2
        layers += (2 * config.num_layers + 0.5 * config.num_single_layers) * modulation
        refiner = config.num_refiner_layers * (24 * text * dim**2 + 4 * text**2 * dim + 4 * dim**2)
        refiner += 2 * text * config.text_embed_dim * dim
        cells = self.patch[0] * self.patch[1] * self.patch[2]
        ends = 2 * grid.video_tokens * dim * cells * (config.in_channels + config.out_channels)
        return float(layers + refiner + ends)

    @property
    def patch(self) -> tuple[int, int, int]:
        config = self.transformer.config
        return config.patch_size_t, config.patch_size, config.patch_size

    @property
    def attention_shape(self) -> tuple[int, int, int]:
        config = self.transformer.config
        return config.num_layers + config.num_single_layers, config.num_attention_heads, config.attention_head_dim
