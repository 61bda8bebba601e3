"""MiniMax-H3's video without sound, of any length, which diffusers' modular pipeline cannot be asked for.

Its `MiniMaxH3PrepareLayoutStep` refuses clips outside of 5 to 15 s, which the properties `min_duration` and
`max_duration` of `MiniMaxH3ModularPipeline` hold, and packs rows of sound for the length of the video. The rest is
diffusers' own: the scheduler, the VAE, and the text encoder up to the layer that the modular pipeline reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, MiniMaxH3Scheduler, MiniMaxH3Transformer3DModel
from diffusers.modular_pipelines.minimax_h3.modular_pipeline import video_latent_num_frames
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from data.encoders.minimax_h3 import EMPTY, first_layers, text_states, token_ids
from data.encoders.tokens import open_tokenizer
from train.errors import UserError


def check_prompts(folder: Path, prompts: Iterable[str], tokens: int) -> None:
    """Counts the tokens of prompts, before the text encoder is loaded.

    Args:
        folder: of the pipeline.
        tokens: the most that a prompt may have, ``model.text_tokens``.

    Raises:
        UserError: a prompt has more.
    """
    tokenizer = open_tokenizer(folder / "tokenizer")
    for prompt in prompts:
        count = len(token_ids(tokenizer, prompt))
        if count > tokens:
            raise UserError(
                f"a prompt has {count:,} tokens, expected at most model.text_tokens, {tokens:,}: shorten what begins "
                f"with {prompt[:40]!r}"
            )


class MiniMaxH3VideoPipeline(DiffusionPipeline):  # type: ignore[misc]
    """What generates a latent: `train.sample` puts its attention between it and the transformer.

    Args:
        transformer: takes a latent (`train.sample.denoise`), which the adapter packs.
        vae: of which only the shapes are asked for.
        scheduler: of the video; sound has another.
        text_encoder: a whole Qwen3-VL, or None.
        tokenizer: its tokenizer, or None.
    """

    transformer: Any
    vae: Any
    scheduler: Any
    text_encoder: Any
    tokenizer: Any
    progress_bar: Any
    register_modules: Any

    def __init__(self, transformer: Any, vae: Any, scheduler: Any, text_encoder: Any, tokenizer: Any) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, vae=vae, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer
        )

    @classmethod
    def from_pretrained(cls, folder: str, *, torch_dtype: torch.dtype, **parts: Any) -> MiniMaxH3VideoPipeline:
        """Loads what is not among ``parts`` from the subfolder of its name; VAE and text encoder have to be."""
        place = Path(folder)
        if "transformer" not in parts:
            parts["transformer"] = MiniMaxH3Transformer3DModel.from_pretrained(
                place, subfolder="transformer", torch_dtype=torch_dtype, use_safetensors=True
            )
        if "tokenizer" not in parts:
            parts["tokenizer"] = open_tokenizer(place / "tokenizer")
        return cls(**parts, scheduler=MiniMaxH3Scheduler.from_pretrained(place, subfolder="scheduler"))

    def encode_prompt(self, prompt: str, device: torch.device) -> Tensor:
        """The prompt as the transformer sees it, (1, tokens, D), in the text encoder's dtype; the empty one as shards
        have it."""
        return text_states(first_layers(self.text_encoder), self.tokenizer, prompt or EMPTY, device)[None]

    @torch.no_grad()
    def __call__(
        self,
        *,
        prompt_embeds: Tensor,
        height: int,
        width: int,
        num_frames: int,
        num_inference_steps: int,
        generator: torch.Generator,
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], Any],
    ) -> Tensor:
        """The latent of a clip, (1, C, f, h, w) float32.

        Args:
            prompt_embeds: (1, tokens, D), on the device to compute on.
            height, width: pixels.
            num_frames: of the video.
            num_inference_steps: passes of the transformer: one less than the modular pipeline counts.
            generator: of the noise, which is the modular pipeline's: it draws the video's before the sound's.
            callback_on_step_end: is called after each step.
        """
        device, vae = prompt_embeds.device, self.vae
        frames = video_latent_num_frames(num_frames, vae.config.clip_length, vae.tokens_chunk_size)
        sides = (side // vae.spatial_compression_ratio for side in (height, width))
        shape = (1, self.transformer.config.in_channels, frames, *sides)
        latent: Tensor = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        self.scheduler.set_timesteps(num_inference_steps + 1, device=device)  # it counts the last noise level, 0
        for step, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            velocity = self.transformer(
                hidden_states=latent, encoder_hidden_states=prompt_embeds, timestep=timestep, return_dict=False
            )[0]
            latent = self.scheduler.step(velocity, timestep, latent, return_dict=False)[0]
            callback_on_step_end(self, step, timestep, {})
        return latent
