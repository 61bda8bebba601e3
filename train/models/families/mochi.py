"""Mochi-1 text-to-video: diffusers' MochiTransformer3DModel with radial joint attention.

48 layers, in which the text has a narrower stream with weights of its own; the last has no text output. The model's
own convention runs time from noise to data: its input is 1000 (1 - sigma), its output x0 - eps. Its rotary angles are
learned mixtures of the three axes, other ones in each head. Its sampler takes half of its steps above sigma 0.975.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import MochiTransformer3DModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from data.shards.sample import TextTokens
from radial import VideoGrid
from train.flow import shifted
from train.models.base import ModelAdapter
from train.models.conditions import Conditions
from train.models.joint import JointAttention


class MochiJointAttention(JointAttention):
    """Attention processor of one layer."""

    def text_lengths(self, mask: Tensor, text_tokens: int) -> Tensor:
        """The mask is (batch, text tokens)."""
        return mask.sum(1)

    def pairs(self, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The tables are (tokens, heads, head_dim / 2)."""
        return rotary


class MochiAdapter(ModelAdapter):
    """Adapter of Mochi-1; shards hold ``text.text`` (T5)."""

    family = "mochi"
    pipeline_name = "MochiPipeline"
    vae_in_bf16 = True
    fewest_steps = 2  # its noise levels have a linear and a quadratic half
    model_class = MochiTransformer3DModel
    processor_class = MochiJointAttention
    lora_targets = r"transformer_blocks\.\d+\.attn1\.(to_q|to_k|to_v|to_out\.0)"
    text_lora_targets = r"transformer_blocks\.\d+\.attn1\.(add_q_proj|add_k_proj|add_v_proj|to_add_out)"
    riflex = "its frequencies are learned mixtures of time, height and width, so that none is temporal"
    tiny_config = {  # noqa: RUF012
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "num_layers": 3,
        "pooled_projection_dim": 24,
        "in_channels": 4,
        "text_embed_dim": 32,
        "time_embed_dim": 16,
    }

    def __init__(self, transformer: Any, text_tokens: int) -> None:
        super().__init__(transformer, text_tokens)
        transformer.rope.register_forward_hook(lambda _, inputs, tables: self._extended(inputs, tables))

    def targets(self, *, text: bool) -> str:
        last = self.transformer.config.num_layers - 1  # what its text asks for goes nowhere: it has no text output
        return rf"(?!transformer_blocks\.{last}\.attn1\.add_q_proj$)({super().targets(text=text)})"

    @classmethod
    def encode_prompt(
        cls, pipeline: Any, prompt: str, negative: str, guided: bool, **settings: Any
    ) -> dict[str, Tensor | None]:
        names = [f"{kind}{name}" for kind in ("", "negative_") for name in ("prompt_embeds", "prompt_attention_mask")]
        found = pipeline.encode_prompt(prompt, negative, do_classifier_free_guidance=guided, **settings)
        return dict(zip(names, found, strict=True))

    def _extended(self, inputs: Any, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The model's cosines and sines with the frames at other positions: (tokens, heads, pairs) each.

        Args:
            inputs: of the model's rope: frequencies (axes, heads, pairs), then the grid's frames, height and width.
        """
        frequencies, frames, height, width = inputs
        if not self.rope.changes(frames):
            return tables
        moves = self.rope.positions(frames) - torch.arange(frames)
        moves = moves.repeat_interleave(height * width).to(frequencies.device)
        cos, sin = tables
        turns = moves.float()[:, None, None] * frequencies[0].float()
        return cos * turns.cos() - sin * turns.sin(), sin * turns.cos() + cos * turns.sin()

    def layers(self) -> list[nn.Module]:
        return list(self.transformer.transformer_blocks)

    def self_attention(self, layer: nn.Module) -> Any:
        return layer.attn1

    def feed_forwards(self) -> list[nn.Module]:
        return [layer.ff for layer in self.transformer.transformer_blocks]

    def grid(self, latent: Tensor) -> VideoGrid:
        return VideoGrid.from_latent(*latent.shape[2:], patch=self.patch, text_tokens=self.text_tokens)

    def hook_tokens(self) -> Sequence[RemovableHandle]:
        model = self.transformer
        return (
            model.rope.register_forward_hook(lambda _, inputs, angles: tuple(self.to_layers(x, dim=0) for x in angles)),
            model.patch_embed.register_forward_hook(lambda _, inputs, patches: self._own_patches(patches)),
            model.proj_out.register_forward_hook(lambda _, inputs, tokens: self.from_layers(tokens)),
        )

    def _own_patches(self, patches: Tensor) -> Tensor:
        """(batch x frames, tokens a frame, dim) -> (batch, own tokens, dim): the model joins frames to samples next."""
        assert self._attention is not None, "hooked for an attention"
        frames = self._attention.pattern_layout.grid.frames
        return self.to_layers(patches.unflatten(0, (-1, frames)).flatten(1, 2))

    def velocity(self, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        dtype = self.transformer.patch_embed.proj.weight.dtype
        tokens, lengths = conditions.packed_text("text", self.text_tokens)
        mask = torch.arange(self.text_tokens, device=lengths.device) < lengths[:, None]
        timestep = 1000 * (1 - sigma)
        return -self.transformer(x.to(dtype), tokens.to(dtype), timestep, mask, return_dict=False)[0].float()

    @classmethod
    def noise_levels(cls, steps: int, shift: float) -> list[float]:
        from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule

        levels = linear_quadratic_schedule(steps, 0.025) if steps > 1 else [1.0]
        return [shifted(level, shift) for level in levels]

    def random_conditions(self, latent: Tensor) -> Conditions:
        shape = (len(latent), self.text_tokens, self.transformer.config.text_embed_dim)
        tokens = torch.randn(shape, device=latent.device)
        return Conditions({"text": TextTokens(tokens, torch.ones(shape[:2], dtype=torch.bool, device=latent.device))})

    def linear_flops(self, grid: VideoGrid) -> float:
        config, n, text = self.transformer.config, grid.video_tokens, grid.text_tokens
        dim, narrow, source = (
            config.num_attention_heads * config.attention_head_dim,
            config.pooled_projection_dim,
            config.text_embed_dim,
        )
        video = (8 + 16) * n * dim**2 + 8 * dim**2  # Q, K, V, O and a gated MLP of 8/3 the width; modulation
        words = 8 * text * narrow * dim + 16 * text * narrow**2 + 8 * dim * narrow
        last = 6 * text * narrow * dim + 2 * dim * narrow  # its text is read only
        layers = config.num_layers * video + (config.num_layers - 1) * words + last
        embedding = 2 * text * source * narrow + 4 * text * source**2
        channels = config.in_channels + (config.out_channels or config.in_channels)
        return float(layers + embedding + 2 * n * dim * self.patch[1] * self.patch[2] * channels)

    @property
    def patch(self) -> tuple[int, int, int]:
        size = self.transformer.config.patch_size
        return 1, size, size

    @property
    def attention_shape(self) -> tuple[int, int, int]:
        config = self.transformer.config
        return config.num_layers, config.num_attention_heads, config.attention_head_dim
