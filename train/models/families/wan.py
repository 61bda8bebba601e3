"""Wan2.1, text- and image-to-video: diffusers' WanTransformer3DModel with radial self-attention.

The class stays as diffusers ships it. Each layer's ``attn1`` gets a `WanSelfAttention` processor, the cross-attention
``attn2`` keeps its own. The model predicts the velocity eps - x0 at timestep 1000 sigma; text is zero-padded to 512
tokens and not masked, as in the family's own training.

An image-to-video model takes, beside the noised latent, a mask that is 1 in the first latent frame, and a condition:
the latent of the first frame followed by grey. Wan2.1's also attends to the image encoder's tokens, before the text's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from data.shards.sample import TextTokens
from radial import VideoGrid
from train.config.schema import ModelConfig
from train.errors import UserError
from train.flow import shifted
from train.models.base import ModelAdapter
from train.models.conditions import Conditions
from train.models.layout_attention import LayoutAttention
from train.models.rope import geometric

_IMAGE_TEXT_TOKENS = 512  # WanAttnProcessor counts on it
_IMAGE_TOKENS = 257  # of the image encoder: 16 x 16 patches and the class token
_MASK_CHANNELS = 4  # of image-to-video: one for each frame of a latent frame


class WanSelfAttention(LayoutAttention):
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
            q, k = rotate(q, *rotary_emb), rotate(k, *rotary_emb)
        out = self.attend(q.type_as(v), k.type_as(v), v)
        return attn.to_out[1](attn.to_out[0](out.flatten(2)))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
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
    """Adapter of Wan2.1 (1.3B, 14B, image-to-video), of one expert of Wan2.2, and any small model of the class."""

    family = "wan"
    pipeline_name = "WanPipeline"
    image_pipeline_name = "WanImageToVideoPipeline"
    negative_prompt = (
        "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"  # noqa: RUF001
        "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"  # noqa: RUF001
        "杂乱的背景，三条腿，背景人很多，倒着走"  # noqa: RUF001
    )
    shaky_camera = "镜头晃动，"  # noqa: RUF001
    """What Wan2.1's image-to-video models have before it (`wan/configs/wan_i2v_14B.py`), and Wan2.2's have not."""
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
    riflex = 6  # as RIFLEx's authors found it for Wan2.1: github.com/thu-ml/RIFLEx, issue 8

    @classmethod
    def negative_of(cls, model: ModelConfig) -> str:
        """Wan2.1's image-to-video models, which read the first frame with an image encoder, have a word more."""
        return (cls.shaky_camera if (model.dimensions or {}).get("image_dim") else "") + cls.negative_prompt

    def __init__(self, transformer: Any, text_tokens: int) -> None:
        """Raises a UserError for a model of the class that is none of these."""
        super().__init__(transformer, text_tokens)
        config = transformer.config
        beside = config.in_channels - self.latent_channels
        self.mask_channels = beside - self.latent_channels if beside else 0
        # others with more channels in take something else there: Wan2.1-Fun-Control a video to follow
        expected = _MASK_CHANNELS if beside else 0
        if self.mask_channels != expected or config.pos_embed_seq_len is not None:
            raise UserError(
                f"the model takes {config.in_channels} channels and gives {self.latent_channels}"
                + (", from first and last frames" if config.pos_embed_seq_len is not None else "")
                + ": expected Wan's text-to-video, or image-to-video from the first frame, which takes twice the "
                f"channels that it gives and {_MASK_CHANNELS}"
            )
        if config.added_kv_proj_dim is not None and text_tokens != _IMAGE_TEXT_TOKENS:
            raise UserError(
                f"model.text_tokens is {text_tokens}, image cross-attention needs {_IMAGE_TEXT_TOKENS} (diffusers' "
                "class splits image and text tokens there)"
            )
        transformer.rope.register_forward_hook(lambda _, inputs, tables: self._extended(inputs[0], tables))

    @property
    def image_to_video(self) -> bool:
        """Whether the model takes a first frame."""
        return self.transformer.config.in_channels != self.latent_channels

    def layers(self) -> list[nn.Module]:
        return list(self.transformer.blocks)

    def self_attention(self, layer: nn.Module) -> Any:
        return layer.attn1

    def feed_forwards(self) -> list[nn.Module]:
        return [layer.ffn for layer in self.transformer.blocks]

    def grid(self, latent: Tensor) -> VideoGrid:
        return VideoGrid.from_latent(*latent.shape[2:], patch=self.patch)

    def hook_tokens(self) -> Sequence[RemovableHandle]:
        model = self.transformer
        return (
            model.rope.register_forward_hook(lambda _, inputs, angles: tuple(self.to_layers(x) for x in angles)),
            # (batch, dim, F, H, W) -> (batch, dim, tokens): the model flattens the last dimensions next
            model.patch_embedding.register_forward_hook(lambda _, inputs, patches: self._own_patches(patches)),
            model.condition_embedder.register_forward_pre_hook(self._own_timesteps, with_kwargs=True),
            model.proj_out.register_forward_hook(lambda _, inputs, tokens: self.from_layers(tokens)),
        )

    def _own_patches(self, patches: Tensor) -> Tensor:
        return self.to_layers(patches.flatten(2), dim=2)

    def _own_timesteps(self, module: Any, inputs: Any, settings: Any) -> tuple[Any, Any]:
        """Timesteps of each token, (batch x tokens,), follow the tokens; those of each sample stay."""
        tokens = settings["timestep_seq_len"]
        if tokens is None:
            return inputs, settings
        own = self.to_layers(inputs[0].unflatten(0, (-1, tokens)))
        return (own.flatten(), *inputs[1:]), {**settings, "timestep_seq_len": own.shape[1]}

    def _extended(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The model's cosines and sines for its input x, (batch, C, F, H, W), past the native length by `rope`."""
        return self.rope.extend(tables, geometric(10000, self.transformer.rope.t_dim), self.grid(x))

    def velocity(self, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        return self.predict(x, 1000 * sigma, conditions)

    def predict(self, x: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        """`velocity` at a timestep of each sample, (batch,), or of each token, (batch, tokens)."""
        dtype = self.transformer.patch_embedding.weight.dtype
        text = conditions.named("text", "text").tokens
        if text.shape[1] > self.text_tokens:
            raise UserError(f"the shards' text has {text.shape[1]} tokens, model.text_tokens is {self.text_tokens}")
        text = F.pad(text, (0, 0, 0, self.text_tokens - text.shape[1]))
        clip = None
        if self.image_to_video:
            condition = conditions.named("image", "condition")
            mask = x.new_zeros(len(x), self.mask_channels, *x.shape[2:])
            mask[:, :, 0] = 1
            x = torch.cat([x, mask, condition.to(x)], dim=1)
            if self.transformer.config.image_dim is not None:
                clip = conditions.named("image", "clip").to(dtype)
        return self.transformer(x.to(dtype), timestep, text.to(dtype), clip, return_dict=False)[0].float()

    @classmethod
    def noise_levels(cls, steps: int, shift: float) -> list[float]:
        # of the UniPC sampler of its pipelines
        return [shifted(1 - 0.999 * step / steps, shift) for step in range(steps)]

    def random_conditions(self, latent: Tensor) -> Conditions:
        batch, config, device = len(latent), self.transformer.config, latent.device
        tokens = torch.randn(batch, self.text_tokens, config.text_dim, device=device)
        text = TextTokens(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=device))
        image = {}
        if self.image_to_video:
            image["condition"] = torch.randn_like(latent, dtype=torch.float32)
        if config.image_dim is not None:
            image["clip"] = torch.randn(batch, _IMAGE_TOKENS, config.image_dim, device=device)
        return Conditions({"text": text}, image=image)

    def linear_flops(self, grid: VideoGrid) -> float:
        config, n = self.transformer.config, grid.tokens
        image = _IMAGE_TOKENS if config.image_dim is not None else 0
        text = self.text_tokens + image  # the image's tokens have keys and values of their own, of the same size
        dim, patch = config.num_attention_heads * config.attention_head_dim, math.prod(config.patch_size)
        projections = 12 * n * dim**2 + 4 * text * dim**2  # Q, K, V, O of both attentions; text only as K and V
        cross_attention, feed_forward = 4 * n * text * dim, 4 * n * dim * config.ffn_dim
        ends = 2 * n * dim * patch * (config.in_channels + config.out_channels)
        embedding = 2 * self.text_tokens * dim * (config.text_dim + dim)
        embedding += 2 * image * config.image_dim * (config.image_dim + dim) if image else 0
        return float(config.num_layers * (projections + cross_attention + feed_forward) + ends + embedding)

    @property
    def patch(self) -> tuple[int, int, int]:
        return tuple(self.transformer.config.patch_size)

    @property
    def attention_shape(self) -> tuple[int, int, int]:
        config = self.transformer.config
        return config.num_layers, config.num_attention_heads, config.attention_head_dim
