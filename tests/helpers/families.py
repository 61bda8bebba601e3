"""Every registered family as a tiny model, for the tests that hold for all of them."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.encoders import fingerprint
from data.shards.sample import Prompt, Sample, TextTokens
from data.shards.writer import ShardWriter
from radial import Dense, Released, SlidingTile
from train.models.base import ModelAdapter
from train.models.conditions import Conditions
from train.models.families import ADAPTERS

PATTERNS = {"dense": Dense(), "released": Released(), "tiles": SlidingTile()}  # the last has its own order of tokens
TEXT = 20  # tokens that prompts are padded to


def randomised(model: Any, seed: int = 0) -> Any:
    """The model with every parameter away from its start, where norms and tables are trivial."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def build(family: str) -> ModelAdapter:
    """The family's tiny model, the same at each call."""
    torch.manual_seed(1)
    cls = ADAPTERS[family]
    adapter = cls.from_config(cls.tiny_config, text_tokens=TEXT)
    randomised(adapter.transformer)
    return adapter


def stock(family: str) -> ModelAdapter:
    """The same weights with the processors that diffusers gives the model."""
    adapter = build(family)
    for ours, theirs in zip(adapter.layers(), _unwrapped(adapter), strict=True):
        adapter.self_attention(ours).processor = theirs
    return adapter


def _unwrapped(adapter: ModelAdapter) -> list[Any]:
    model = type(adapter).model_class(**type(adapter).tiny_config)
    bare: Any = copy.copy(adapter)
    bare.transformer = model
    return [adapter.self_attention(layer).processor for layer in bare.layers()]


def latents(adapter: ModelAdapter, tokens: tuple[int, int, int], samples: int = 2) -> Tensor:
    """Random latents of ``tokens`` = (frames, height, width) tokens, the same at each call."""
    cells = [count * step for count, step in zip(tokens, adapter.patch, strict=True)]
    return torch.randn(samples, adapter.latent_channels, *cells, generator=torch.Generator().manual_seed(2))


def conditions(adapter: ModelAdapter, latent: Tensor) -> Conditions:
    """Random conditions; sample i's prompt has 3 + 5 i tokens, what follows is garbage behind the mask."""
    torch.manual_seed(3)
    drawn = adapter.random_conditions(latent)
    lengths = 3 + 5 * torch.arange(len(latent))
    text = {
        name: TextTokens(entry.tokens, torch.arange(entry.tokens.shape[1]) < lengths[:, None])
        for name, entry in drawn.text.items()
    }
    return dataclasses.replace(drawn, text=text)


def shards(family: str, folder: Path, tokens: tuple[int, int, int], samples: int = 4) -> dict[str, str]:
    """Shards of random clips and the tiny model on disk; the settings of a run on them, as the command line takes them.

    Latents are declared to be pixels, so that the family needs no encoder.
    """
    adapter = build(family)
    adapter.transformer.save_pretrained(folder / "model")
    latent = latents(adapter, tokens, samples + 1)
    drawn = conditions(adapter, latent)

    def prompt(row: int) -> Prompt:
        text = {name: TextTokens(entry.tokens[row], entry.mask[row]) for name, entry in drawn.text.items()}
        return Prompt(text, {name: vector[row] for name, vector in drawn.pooled.items()})

    about = {"fps": 8.0, "encoder": fingerprint("pixels", None), "latent": "random", "text": "random", "arguments": {}}
    with ShardWriter(folder / "shards", empty_prompt=prompt(samples), **about) as writer:
        for row in range(samples):
            own, image = prompt(row), {name: x[row].clone() for name, x in drawn.image.items()}
            writer.write(Sample(f"clip-{row}", latent[row].clone(), own.text, own.pooled, image, {"caption": "a ball"}))
    settings = {
        "model.family": family,
        "model.path": folder / "model",
        "model.patch": list(adapter.patch),
        "model.text_tokens": TEXT,
        "data.shards": folder / "shards",
        "data.workers": 0,
        "runs": folder / "runs",
        "clip.frames": latent.shape[2],
        "clip.height": latent.shape[3],
        "clip.width": latent.shape[4],
        "attention.block": 16,
        "attention.dense_layers": 1,
        "lora.rank": 4,
        "trainer.steps": 2,
        "trainer.checkpoint_every": 2,
        "report.clips": 0,
    }
    return {key: str(value) for key, value in settings.items()}


class Perfect:
    """Stands in for a model's forward: notes what it is told and gives what a perfect model would.

    Args:
        adapter: whose model it stands in for.
        output: that output, in the model's own convention.
    """

    def __init__(self, adapter: ModelAdapter, output: Tensor) -> None:
        self.output = output
        self.told: dict[str, Any] = {}
        self._names = list(inspect.signature(type(adapter.transformer).forward).parameters)[1:]
        adapter.transformer.forward = self

    def __call__(self, *values: Any, **named: Any) -> tuple[Tensor]:
        self.told = {**dict(zip(self._names, values, strict=False)), **named}
        return (self.output,)


def given_to_the_decoder(pipeline: Any, latent: Tensor, **settings: Any) -> Tensor:
    """What a pipeline hands its VAE's decoder, if its model changes nothing of the latent that it starts from."""
    seen: list[Tensor] = []

    def decode(x: Tensor, **_: Any) -> tuple[Tensor]:
        seen.append(x)
        return (torch.zeros(1, 3, 1, 8, 8),)

    pipeline.vae.decode = decode
    pipeline.transformer.forward = lambda *_, **named: (torch.zeros_like(named["hidden_states"][:, : len(latent)]),)
    pipeline.set_progress_bar_config(disable=True)
    pipeline(latents=latent[None].float(), num_inference_steps=2, output_type="pt", **settings)
    return seen[0]
