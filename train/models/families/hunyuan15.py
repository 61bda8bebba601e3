"""HunyuanVideo-1.5, text- and image-to-video: diffusers' HunyuanVideo15Transformer3DModel with radial joint attention.

54 layers, in which video and text have weights of their own; what the last makes of the text nothing reads. The text is
two encoders' tokens in one sequence, Qwen2.5-VL's of the caption and byT5's of what the caption quotes (the glyphs that
the video shows), each padded with a mask of its own; before them stand the image encoder's tokens of a first frame. The
model puts what is valid first, image, glyphs, words, and what is padding last. A text-to-video model has no image: its
pipeline passes zeros, which the model masks out whole.

Beside the noised latent the model takes the latents of given frames and a mask that is 1 there: the first frame's, or
zeros. It predicts the velocity eps - x0 at timestep 1000 sigma, and is guided by a pass with another prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import HunyuanVideo15Transformer3DModel
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15TransformerBlock
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from data.shards.sample import TextTokens
from radial import VideoGrid
from train.errors import UserError
from train.flow import shifted
from train.models.base import ModelAdapter
from train.models.conditions import Conditions
from train.models.joint import JointAttention
from train.models.pipelines import StepEnd
from train.models.rope import geometric

_IMAGE_TOKENS = 729  # of the image encoder: 27 x 27 patches
_INPUTS = {
    "prompt_embeds": "encoder_hidden_states",
    "prompt_embeds_mask": "encoder_attention_mask",
    "prompt_embeds_2": "encoder_hidden_states_2",
    "prompt_embeds_mask_2": "encoder_attention_mask_2",
}
"""What the pipeline calls both texts and their masks, and what the transformer does."""
_Last: Any = type(HunyuanVideo15TransformerBlock.__name__, (HunyuanVideo15TransformerBlock,), {})
"""The last layer's class: its text may carry fewer LoRAs, which makes it a graph of its own for the compiler."""


class Hunyuan15Attention(JointAttention):
    """Attention processor of one layer."""

    def text_lengths(self, mask: Tensor, text_tokens: int) -> Tensor:
        """The mask is (batch, text tokens)."""
        return mask.sum(1)

    def pairs(self, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The tables are (tokens, head_dim), each angle stored twice."""
        cos, sin = rotary
        return cos[:, None, 0::2], sin[:, None, 0::2]


class Hunyuan15Adapter(ModelAdapter):
    """Adapter of HunyuanVideo-1.5; shards hold ``text.text`` (Qwen2.5-VL) and ``text.glyphs`` (byT5).

    Those for image-to-video hold ``image.condition``, (C, 1, H, W), and ``image.vision``, (tokens, width), too.
    ``text_tokens`` is the length of both texts, and of the image's tokens, together.
    """

    family = "hunyuan15"
    pipeline_name = "HunyuanVideo15Pipeline"
    image_pipeline_name = "HunyuanVideo15ImageToVideoPipeline"
    model_class = HunyuanVideo15Transformer3DModel
    processor_class = Hunyuan15Attention
    idle_weights = True  # of the last layer, those of the text behind its attention
    lora_targets = r"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)"
    text_lora_targets = r"transformer_blocks\.\d+\.attn\.(add_q_proj|add_k_proj|add_v_proj|to_add_out)"
    tiny_config = {  # noqa: RUF012
        "in_channels": 9,
        "out_channels": 4,
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "num_layers": 3,
        "num_refiner_layers": 1,
        "mlp_ratio": 2.0,
        "text_embed_dim": 24,
        "text_embed_2_dim": 12,
        "image_embed_dim": 8,
        "rope_axes_dim": (4, 6, 6),
        "task_type": "t2v",
    }

    def __init__(self, transformer: Any, text_tokens: int) -> None:
        """Raises a UserError for a model of the class that is none of these."""
        config = transformer.config
        if config.in_channels != 2 * config.out_channels + 1 or config.use_meanflow:
            raise UserError(
                f"the model has use_meanflow={config.use_meanflow}, {config.in_channels} channels in and "
                f"{config.out_channels} out, expected HunyuanVideo-1.5's text- or image-to-video weights: no meanflow "
                "(step-distilled models have it), twice the channels out and one in"
            )
        super().__init__(transformer, text_tokens)
        transformer.transformer_blocks[-1].__class__ = _Last
        if not self.image_to_video:
            transformer.register_forward_pre_hook(_without_image, with_kwargs=True)
        transformer.rope.register_forward_hook(lambda _, inputs, tables: self._extended(inputs[0], tables))
        # it gives a transposed view, whose strides every sum with it would inherit, layer after layer
        transformer.x_embedder.register_forward_hook(lambda _, inputs, tokens: tokens.contiguous())
        # the class would round the timestep to the weights' precision; its sines are rounded instead
        transformer.time_embed.timestep_embedder.register_forward_pre_hook(
            lambda layer, inputs: (inputs[0].to(layer.linear_1.weight.dtype), *inputs[1:])
        )

    def targets(self, *, text: bool) -> str:
        last = self.transformer.config.num_layers - 1  # what its text becomes is not read
        return rf"(?!transformer_blocks\.{last}\.attn\.(add_q_proj|to_add_out)$)({super().targets(text=text)})"

    @property
    def image_to_video(self) -> bool:
        """Whether the model takes a first frame."""
        return self.from_image(self.transformer.config)

    @classmethod
    def from_image(cls, config: Mapping[str, Any]) -> bool:
        return bool(config.get("task_type", "i2v") == "i2v")

    @classmethod
    def encode_prompt(
        cls, pipeline: Any, prompt: str, negative: str, guided: bool, **settings: Any
    ) -> dict[str, Tensor | None]:
        room = settings["max_sequence_length"] - pipeline.tokenizer_2_max_length
        if type(pipeline).__name__ == cls.image_pipeline_name:
            room -= pipeline.vision_num_semantic_tokens
        if room < 1:
            asked = settings["max_sequence_length"]
            raise UserError(f"model.text_tokens is {asked}, expected more than the {asked - room} of glyphs and image")
        pipeline.tokenizer_max_length = room
        found: dict[str, Tensor | None] = {}
        for side, text in (("", prompt), ("negative_", negative))[: 1 + guided]:
            encoded = pipeline.encode_prompt(text, device=settings["device"])
            found |= dict(zip((f"{side}{name}" for name in _INPUTS), encoded, strict=True))
        return found

    @classmethod
    def negative_inputs(cls, encoded: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {theirs: encoded.get(f"negative_{name}") for name, theirs in _INPUTS.items()}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @classmethod
    def call(cls, pipeline: Any, guidance: float | None, tokens: int, step_end: StepEnd, **settings: Any) -> Tensor:
        """Its pipeline has the guidance in a part of its own, and tells nobody of its steps but the scheduler."""
        pipeline.guider = pipeline.guider.new(guidance_scale=max(1.0, guidance or 1.0))  # it takes less than 1 for on
        if "image" in settings:  # whose size and the model's decide the clip's, unless they are told
            size = settings.pop("height"), settings.pop("width")
            pipeline.video_processor.calculate_default_height_width = lambda *_, **__: size
            pipeline.vae.enable_tiling()  # as clips are encoded
            pipeline.image_encoder.to(pipeline.device)  # where its picture goes
        step = pipeline.scheduler.step

        def stepped(*inputs: Any, **named: Any) -> Any:
            out = step(*inputs, **named)
            step_end(pipeline, pipeline.scheduler.step_index - 1, inputs[1], {})
            return out

        pipeline.scheduler.step = stepped
        try:
            latent: Tensor = pipeline(output_type="latent", return_dict=False, **settings)[0]
        finally:
            del pipeline.scheduler.step
        return latent

    def _extended(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The model's cosines and sines for its input x, (batch, C, F, H, W), past the native length by `rope`."""
        rope = self.transformer.rope
        return self.rope.extend(tables, geometric(rope.theta, rope.rope_dim[0]), self.grid(x))

    def layers(self) -> list[nn.Module]:
        return list(self.transformer.transformer_blocks)

    def self_attention(self, layer: nn.Module) -> Any:
        return layer.attn

    def feed_forwards(self) -> list[nn.Module]:
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
        config, batch = self.transformer.config, len(x)
        dtype = self.transformer.x_embedder.proj.weight.dtype
        given = x.new_zeros(batch, config.in_channels - x.shape[1], *x.shape[2:])
        image = x.new_zeros(batch, 0, config.image_embed_dim)
        if self.image_to_video:
            given[:, :-1, :1] = conditions.named("image", "condition").to(x)
            given[:, -1, 0] = 1
            image = conditions.named("image", "vision")
        words, length = conditions.packed_text("text", self.text_tokens)
        glyphs = words.new_zeros(batch, 0, config.text_embed_2_dim)
        shown = torch.zeros(batch, 0, dtype=torch.bool, device=words.device)
        if "glyphs" in conditions.text:  # where no caption of a folder quotes anything, it may lack them
            glyphs, shown = conditions.text["glyphs"].tokens, conditions.text["glyphs"].mask
        others, found = glyphs.shape[1] + image.shape[1], conditions.text["text"].tokens.shape[1]
        room = self.text_tokens - others
        if found > room:
            raise UserError(
                f"the shards' text has {found} tokens and {others} of glyphs and image, model.text_tokens is "
                f"{self.text_tokens} for all of them"
            )
        return self.transformer(
            torch.cat([x, given], dim=1).to(dtype),
            1000 * sigma,
            words[:, :room].to(dtype),
            torch.arange(room, device=length.device) < length[:, None],
            encoder_hidden_states_2=glyphs.to(dtype),
            encoder_attention_mask_2=shown,
            image_embeds=image.to(dtype),
            return_dict=False,
        )[0].float()

    @classmethod
    def noise_levels(cls, steps: int, shift: float) -> list[float]:
        return [shifted(1 - step / steps, shift) for step in range(steps)]

    def random_conditions(self, latent: Tensor) -> Conditions:
        """Captions that quote nothing, as most do."""
        config, batch, device = self.transformer.config, len(latent), latent.device
        image = {}
        if self.image_to_video:
            image["condition"] = torch.randn_like(latent[:, :, :1], dtype=torch.float32)
            image["vision"] = torch.randn(batch, _IMAGE_TOKENS, config.image_embed_dim, device=device)
        tokens = torch.randn(batch, self._words, config.text_embed_dim, device=device)
        text = TextTokens(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=device))
        return Conditions({"text": text}, image=image)

    @property
    def _words(self) -> int:
        """Room for the texts.

        Raises:
            UserError: the image's tokens leave none.
        """
        words = self.text_tokens - (_IMAGE_TOKENS if self.image_to_video else 0)
        if words < 1:
            raise UserError(
                f"model.text_tokens is {self.text_tokens}, expected more than {_IMAGE_TOKENS}: image-to-video's image "
                "takes so many, and the prompt the rest"
            )
        return words

    def check(self, latent: Tensor, conditions: Conditions) -> None:
        super().check(latent, conditions)
        glyphs, width = conditions.text.get("glyphs"), self.transformer.config.text_embed_2_dim
        if glyphs is not None and glyphs.tokens.shape[2] != width:
            raise UserError(
                f"the shards' text glyphs is (tokens, width) {tuple(glyphs.tokens.shape[1:])}, the model takes a "
                f"width of {width}: it was made by another text encoder"
            )

    def linear_flops(self, grid: VideoGrid) -> float:
        config, n, text = self.transformer.config, grid.tokens, self._words
        dim, wide = config.num_attention_heads * config.attention_head_dim, config.mlp_ratio
        # Q, K, V, O and the MLP of each token in the weights of its stream; two modulations
        layers = config.num_layers * ((8 + 4 * wide) * n * dim**2 + 24 * dim**2)
        refiner = config.num_refiner_layers * (24 * text * dim**2 + 4 * text**2 * dim + 4 * dim**2)
        refiner += 2 * text * config.text_embed_dim * dim
        refiner += 2 * (self.text_tokens - text) * config.image_embed_dim * (config.image_embed_dim + dim)
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
        return config.num_layers, config.num_attention_heads, config.attention_head_dim


def _without_image(model: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A call without the image states, which a text-to-video model masks out whole: its text is so much shorter."""
    return inputs, {**named, "image_embeds": named["image_embeds"][:, :0]}
