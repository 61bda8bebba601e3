"""What a run on synthetic clips shows at its end: losses on held-out clips, measured here, and pictures."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

from data.shards.batch import collate
from data.shards.manifest import Manifest
from data.shards.sample import Sample
from data.shards.stages import load_stages
from data.shards.stream import read_samples
from radial import Pattern, Random, Released, build_layout
from radial.draw import draw_layout
from train.attention.step import StepAttention
from train.config.schema import RunConfig
from train.flow import noise_like
from train.measures.euler import generate
from train.measures.losses import clip_losses
from train.measures.results import Row, write_results
from train.report.pictures import animate, draw_loss, film_strip
from train.step.module import LengthExtensionModule
from train.storage.unfinished import Unfinished


def write_report(
    config: RunConfig,
    module: LengthExtensionModule,
    folder: Path,
    shards: Manifest,
    held_out: Callable[[int, int], Manifest],
    precision: Callable[[], AbstractContextManager[None]],
    parts: Unfinished,
) -> None:
    """Draws the loss curve; with ``report.clips`` also evaluates, prints the table and animates.

    Args:
        held_out: gives the shards of that many held-out clips of that many latent frames.
        precision: the autocast context that training ran in.
        parts: of the table and the animation that were finished before, and what asks for a stop.

    Raises:
        Asked: the run was asked to stop.
    """
    if (folder / "metrics.csv").exists():
        draw_loss(folder / "metrics.csv", folder / "loss.png")
    if not config.report.clips:
        return
    count, short_frames = config.report.clips, config.report.short_frames
    stages = load_stages(config.data.stages)
    clips = list(read_samples(held_out(count, config.clip.frames), stages=stages))
    short = list(read_samples(held_out(count, short_frames), stages=stages)) if module.lora and short_frames else []
    module.transformer.eval()
    with precision():
        rows = _measure(config, module, clips, short, parts)
        write_results(rows, folder)
        _show(config, module, clips[0], folder, parts)


def draw_mask(module: LengthExtensionModule, shards: Manifest, folder: Path) -> None:
    """Draws the mask of the shards' clips to ``mask.png``."""
    latent = torch.empty(1, *shards.samples[0].shape)
    attention = module.recipes.own.attention
    layout = build_layout(attention.pattern, module.adapter.grid(latent), attention.block)
    draw_layout(layout, folder / "mask.png")


def _measure(
    config: RunConfig, module: LengthExtensionModule, clips: list[Sample], short: list[Sample], parts: Unfinished
) -> list[Row]:
    adapter = module.adapter
    shape = adapter.attention_shape

    def row(name: str, of: list[Sample], attention: Callable[[Tensor, float], StepAttention]) -> Row:
        def watched(latent: Tensor, sigma: float) -> StepAttention:
            parts.check()
            return attention(latent, sigma)

        def measure() -> Tensor:
            losses = clip_losses(adapter, of, watched, module.recipes.own.schedule, module.objective, label=name)
            return torch.tensor(losses, dtype=torch.float64)

        losses = parts.part(f"row {name}", measure).tolist()
        flops = attention(of[0].latent[None], 0.0).attention_flops(*shape)
        return Row(name, of[0].latent.shape[1], losses, flops / 1e9)

    def under(pattern: Pattern) -> Callable[[Tensor, float], StepAttention]:
        return functools.partial(module.attention_at, pattern=pattern)

    rows = []
    own = module.recipes.own.attention.pattern
    name, dense, trained = config.pattern_in_words(), functools.partial(_dense, module), module.attention_at
    if module.lora:
        module.transformer.disable_adapters()
        if short:
            rows.append(row("base, dense, own length", short, dense))
        rows.append(row("base, dense", clips, dense))
        if name != "dense":
            rows.append(row(f"base, {name}", clips, trained))
        if isinstance(own, Released):
            rows.append(row("base, random", clips, under(Random(own))))
        module.transformer.enable_adapters()
        rows.append(row(f"{name} + LoRA", clips, trained))
    else:
        rows.append(row(f"trained, {name}", clips, trained))
    return rows


def _dense(module: LengthExtensionModule, latent: Tensor, sigma: float) -> StepAttention:
    recipe = module.recipes.own.attention.dense()
    return recipe.step(module.adapter.grid(latent), dense=False, sequence=module.sequence)


def _show(config: RunConfig, module: LengthExtensionModule, clip: Sample, folder: Path, parts: Unfinished) -> None:
    """Generates the clip's caption with and without the LoRA from the same noise, and draws them beside the truth."""
    device = next(module.transformer.parameters()).device
    batch = collate([clip], 0).to(device)
    conditions, empty = module.objective.both(batch)
    noise = noise_like(batch.latent, config.seed, "animation")

    def clip_of(label: str, attention: Callable[[Tensor, float], StepAttention]) -> Tensor:
        def watched(sigma: float) -> StepAttention:
            parts.check()
            return attention(noise, sigma)

        def make() -> Tensor:
            return generate(
                module.adapter,
                noise,
                conditions,
                empty,
                watched,
                steps=config.report.sampling_steps,
                shift=config.shift(),
                guidance=config.report.guidance,
                label=label,
            )[0].cpu()

        return parts.part(label, make)

    frames = clip.latent.shape[1]
    name = module.recipes.own.attention.pattern.name
    trained = module.attention_at
    panels = {f"truth: {clip.caption}": clip.latent.float()}
    if module.lora:
        module.transformer.disable_adapters()
        panels[f"base at {frames} frames, dense attention"] = clip_of(
            "Generating, base, dense", functools.partial(_dense, module)
        )
        if name != "dense":
            panels[f"base at {frames} frames, {name} attention"] = clip_of(f"Generating, base, {name}", trained)
        module.transformer.enable_adapters()
        panels[f"tuned at {frames} frames, {name} attention + LoRA"] = clip_of("Generating, tuned", trained)
    else:
        panels[f"trained model at {frames} frames"] = clip_of("Generating", trained)
    animate(panels, config.conf, folder / "clips.gif")
    film_strip(panels, config.conf, folder / "clips.png")
