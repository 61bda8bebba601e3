"""MiniMax-H3, text-to-video: diffusers' MiniMaxH3Transformer3DModel with radial attention.

50 layers over one packed sequence of text, audio and video tokens, all with the same weights; what a token is decides
its modulation alone. The class leaves the sequence to its caller, who gives each row its kind, position and noise
level. Where a row stands makes no difference to attention, so the adapter packs a sample as [video, text, padding].
Only distances between positions count, too: the video's time begins at 0, and the text counts back from there, its last
word first, so that positions do not depend on how long the text is.

The samples of a batch are packed one behind the other, since the class has one layout for a whole batch. They become a
batch again around each attention, where padding is masked. Under sequence parallelism a rank packs its own stretch of
each video, and all of the text.

Audio is left out. The class takes any number of audio rows, none too; shards hold no sound, and noise cannot stand for
it: the pipeline denoises sound beside the video, on noise levels of its own.

Time runs from noise to data: the model's input is 1 - sigma, its output x0 - eps. It is distilled for guidance, and
takes no weight of it as an input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import MiniMaxH3Transformer3DModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from data.shards.sample import TextTokens
from radial import VideoGrid
from train.flow import shifted
from train.models.base import ModelAdapter
from train.models.conditions import Conditions
from train.models.layout_attention import LayoutAttention
from train.models.pipelines import StepEnd

_VIDEO, _TEXT = 0, 1  # kinds of rows
_SPANS = (1, 4, 4, 4, 4)  # frames of the video in each latent frame, over and over
_TIME = 5 / 3  # of the model's time in a frame: 40 units a second
_SIDE = 32  # units of place in the square root of a frame's area


class MiniMaxH3Attention(LayoutAttention):
    """Attention processor of one layer."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, rotary_emb: tuple[Tensor, Tensor], attention_mask: Tensor
    ) -> Tensor:
        """Attention's output.

        Args:
            attn: the module with the projections.
            hidden_states: (batch, this rank's video tokens + all text tokens, dim).
            rotary_emb: cosines and sines, (tokens, rotated channels), the channels of a pair half of them apart.
            attention_mask: (batch, 1, 1, tokens), False on padding.
        """
        assert self.layout is not None
        q, k, v = (layer(hidden_states).unflatten(2, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v))
        q, k = (_rotated(x, *rotary_emb).type_as(v) for x in (attn.norm_q(q), attn.norm_k(k)))
        text = attention_mask[:, 0, 0, hidden_states.shape[1] - self.layout.grid.text_tokens :]
        out = self.attend(q, k, v, text.sum(1)).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))  # type: ignore[no-any-return]


class MiniMaxH3Adapter(ModelAdapter):
    """Adapter of MiniMax-H3; shards hold ``text.text`` (Qwen3-VL)."""

    family = "minimax_h3"
    model_class = MiniMaxH3Transformer3DModel
    processor_class = MiniMaxH3Attention
    idle_weights = True  # the head of the sound
    lora_targets = r"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)"
    index = "modular_model_index.json"
    files = [index, *(f"{part}/*" for part in ("transformer", "vae", "text_encoder", "tokenizer", "scheduler"))]  # noqa: RUF012
    distilled = True
    riflex = "time, height and width share their frequencies, so that none is temporal"
    tiny_config = {  # noqa: RUF012
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "hidden_size": 32,
        "num_layers": 3,
        "num_refiner_layers": 1,
        "ffn_dim": 48,
        "in_channels": 4,
        "audio_in_channels": 6,
        "text_dim": 24,
        "freq_dim": 16,
        "time_embed_hidden_dim": 32,
        "time_embed_dim": 16,
        "rope_freq_dim": 2,
    }

    def __init__(self, transformer: Any, text_tokens: int) -> None:
        super().__init__(transformer, text_tokens)
        self._valid = torch.empty(0)  # of the forward in work: (batch, 1, 1, rows of a sample), False on padding
        transformer.rope.register_forward_hook(lambda _, inputs, tables: self._with_mask(tables))
        for layer in self.layers():
            self.self_attention(layer).register_forward_pre_hook(_unpacked)
            self.self_attention(layer).register_forward_hook(_packed)
        for layer in transformer.token_refiner.refiner_blocks:
            layer.attn.register_forward_pre_hook(lambda _, inputs: self._texts(inputs[0]))
            layer.attn.register_forward_hook(_packed)

    @classmethod
    def generates(cls) -> bool:
        return True

    @classmethod
    def pipeline_class(cls, *, image: bool = False) -> Any:
        from train.models.minimax_h3_pipeline import MiniMaxH3VideoPipeline

        return MiniMaxH3VideoPipeline

    @classmethod
    def part_class(cls, index: Mapping[str, Any], name: str) -> tuple[str, str | None]:
        library, kind = index[name][2]["type_hint"] if name in index else ("", None)
        return library, kind

    @classmethod
    def check_prompts(cls, folder: Path, prompts: Iterable[str], tokens: int) -> None:
        from train.models.minimax_h3_pipeline import check_prompts

        check_prompts(folder, prompts, tokens)

    @classmethod
    def encode_prompt(
        cls, pipeline: Any, prompt: str, negative: str, guided: bool, **settings: Any
    ) -> dict[str, Tensor | None]:
        return {"prompt_embeds": pipeline.encode_prompt(prompt, settings["device"])}

    @classmethod
    def call(cls, pipeline: Any, guidance: float | None, tokens: int, step_end: StepEnd, **settings: Any) -> Tensor:
        latent: Tensor = pipeline(callback_on_step_end=step_end, **settings)
        return latent

    def layers(self) -> list[nn.Module]:
        return list(self.transformer.transformer_blocks)

    def self_attention(self, layer: nn.Module) -> Any:
        return layer.attn

    def feed_forwards(self) -> list[nn.Module]:
        return [layer.ff for layer in self.transformer.transformer_blocks]

    def grid(self, latent: Tensor) -> VideoGrid:
        return VideoGrid.from_latent(*latent.shape[2:], patch=self.patch, text_tokens=self.text_tokens)

    def hook_tokens(self) -> Sequence[RemovableHandle]:
        """None: `velocity` packs no more of the video than this rank's own, in the layers' order."""
        return ()

    def velocity(self, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        return -self._prediction(self.transformer, x, 1 - sigma.float(), conditions)

    def predicted(self, forward: Callable[..., Any], given: Mapping[str, Any]) -> Tensor:
        """For a latent, (1, C, F, H, W), and a prompt without padding, as `MiniMaxH3VideoPipeline` gives them."""
        x, words = given["hidden_states"], given["encoder_hidden_states"]
        mask = torch.ones(words.shape[:2], dtype=torch.bool, device=words.device)
        seen = Conditions({"text": TextTokens(words, mask)})
        return self._prediction(forward, x, given["timestep"].expand(len(x)), seen)

    def _prediction(self, forward: Callable[..., Any], x: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """The model's own velocity, x0 - eps, at its own times, (batch,), 1 being clean."""
        (grid, batch), (t, h, w) = (self.grid(x), len(x)), self.patch
        words, lengths = conditions.packed_text("text", self.text_tokens)
        cells = x.unflatten(4, (-1, w)).unflatten(3, (-1, h)).unflatten(2, (-1, t))
        video = self.to_layers(cells.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(batch, grid.video_tokens, -1))
        own = video.shape[1]
        size = own + self.text_tokens  # rows of a sample
        rows = torch.arange(batch * size, device=x.device).view(batch, size)
        count = torch.arange(self.text_tokens, device=x.device)
        valid = count < lengths[:, None]
        self._valid = F.pad(valid, (own, 0), value=True)[:, None, None]
        last_first = torch.where(valid, lengths[:, None] - 1 - count, count)
        places = torch.cat([self.to_layers(self._places(grid, x.device), dim=0), self._places_of_text(x.device)])
        out = forward(
            video.flatten(0, 1)[None],
            video.new_zeros(1, 0, self.transformer.config.audio_in_channels),
            words.flatten(0, 1)[None],
            timestep=time,
            timestep_indices=(rows // size).flatten(),
            token_tags=torch.where(rows % size < own, _VIDEO, _TEXT).flatten(),
            position_ids=places.repeat(batch, 1),
            video_indices=rows[:, :own].flatten(),
            audio_indices=rows[0, :0],
            text_indices=rows[:, own:].gather(1, last_first).flatten(),
            return_dict=False,
        )[0]
        cells = self.from_layers(out.view(video.shape)).view(
            batch, *(grid.frames, grid.height, grid.width), -1, t, h, w
        )
        return cells.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(x.shape).float()

    def _with_mask(self, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """The model's cosines and sines for one sample's rows, with the mask, which layers hand to their attention."""
        cos, sin = (table[: self._valid.shape[3]] for table in tables)
        return cos, sin, self._valid

    def _texts(self, packed: Tensor) -> tuple[Tensor, None, Tensor]:
        """What the attention of the text's own layers takes: each sample's text apart, and which of it is padding."""
        texts = packed.view(len(self._valid), self.text_tokens, -1)
        return texts, None, self._valid[..., -self.text_tokens :]

    def _places_of_text(self, device: torch.device) -> Tensor:
        """(text tokens, 3) float64: time, height and width, the last word first."""
        times = -1 - torch.arange(self.text_tokens, dtype=torch.float64, device=device)
        return F.pad(times[:, None], (0, 2))

    def _places(self, grid: VideoGrid, device: torch.device) -> Tensor:
        """(video tokens, 3) float64: time, height and width."""
        spans = torch.tensor([_SPANS[frame % len(_SPANS)] for frame in range(grid.frames)], dtype=torch.float64)
        times = _TIME * (spans.cumsum(0) - spans)
        moved = self.rope.positions(grid.frames)  # between latent frames with rope=interpolate
        times = torch.lerp(times[moved.floor().long()], times[moved.ceil().long()], moved.frac())
        sides = grid.height * self.patch[1], grid.width * self.patch[2]
        of_height, of_width = (
            _SIDE * ((1 - ratio) / 2 + ratio / tokens * torch.arange(tokens, dtype=torch.float64))
            for ratio, tokens in zip(
                (side / math.sqrt(math.prod(sides)) for side in sides), (grid.height, grid.width), strict=True
            )
        )
        return torch.cartesian_prod(times, of_height, of_width).to(device)

    @classmethod
    def noise_levels(cls, steps: int, shift: float) -> list[float]:
        """Those of its scheduler for ``steps + 1`` points, of which the last is 0."""
        return [shifted(1 - step / steps, shift) for step in range(steps)]

    def random_conditions(self, latent: Tensor) -> Conditions:
        shape = (len(latent), self.text_tokens, self.transformer.config.text_dim)
        tokens = torch.randn(shape, device=latent.device)
        return Conditions({"text": TextTokens(tokens, torch.ones(shape[:2], dtype=torch.bool, device=latent.device))})

    def linear_flops(self, grid: VideoGrid) -> float:
        config, n, text = self.transformer.config, grid.tokens, grid.text_tokens
        dim, inner = config.hidden_size, config.num_attention_heads * config.attention_head_dim
        token = 8 * dim * inner + 6 * dim * config.ffn_dim  # Q, K, V, O and a gated MLP
        layers = config.num_layers * (n * token + 36 * dim * config.time_embed_dim)
        refiner = config.num_refiner_layers * (text * token + 4 * text**2 * inner) + 2 * text * config.text_dim * dim
        cells = math.prod(self.patch) * config.in_channels
        ends = 2 * dim * (grid.video_tokens * cells + n * (cells + config.audio_in_channels))
        return float(layers + refiner + ends + 4 * dim * config.time_embed_dim)

    @property
    def patch(self) -> tuple[int, int, int]:
        t, h, w = self.transformer.config.patch_size
        return t, h, w

    @property
    def latent_channels(self) -> int:
        return int(self.transformer.config.in_channels)

    @property
    def attention_shape(self) -> tuple[int, int, int]:
        config = self.transformer.config
        return config.num_layers, config.num_attention_heads, config.attention_head_dim


def _unpacked(attn: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a layer's attention takes: each sample apart, its cosines and sines, and which rows are padding."""
    packed, (cos, sin, valid), *_ = inputs
    return packed.view(len(valid), valid.shape[3], -1), (cos, sin), valid


def _packed(attn: nn.Module, inputs: tuple[Any, ...], out: Tensor) -> Tensor:
    """Attention's output with the samples one behind the other again."""
    return out.flatten(0, 1)[None]


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first channels of each head, computed in float32.

    Args:
        x: (batch, tokens, heads, head_dim).
        cos, sin: (tokens, rotated channels).
    """
    turned, rest = x.float().split([cos.shape[1], x.shape[3] - cos.shape[1]], dim=3)
    low, high = turned.chunk(2, dim=3)
    return torch.cat([turned * cos[:, None] + torch.cat([-high, low], dim=3) * sin[:, None], rest], dim=3)
