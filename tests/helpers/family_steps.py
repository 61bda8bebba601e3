"""One LoRA step of a family's longest run file, cut to two layers: on a GPU at its real shapes, on a CPU tiny."""

from __future__ import annotations

from dataclasses import replace

from train.bench.case import Result, run_case
from train.config.compose import compose_run, finish, run_names
from train.config.schema import ClipConfig, RunConfig
from train.models.families import ADAPTERS


def longest_runs() -> dict[str, str]:
    """Family -> the run file with the longest clip, of the largest model among those; families without one are left."""
    found: dict[str, tuple[float, str]] = {}
    for name in run_names():
        config = finish(compose_run({"conf": name}))
        if config.model.dimensions is None:
            continue
        heads = config.model.dimensions["num_attention_heads"]
        found[config.model.family] = max(
            found.get(config.model.family, (0.0, "")), (config.grid().video_tokens * heads, name)
        )
    return {family: name for family, (_, name) in found.items()}


def config_of(name: str) -> RunConfig:
    """A run file as a benchmark takes it: every layer runs the pattern."""
    return finish(
        compose_run(
            {"conf": name, "attention.dense_layers": "0", "trainer.compile": "true", "parallel.activations": "full"}
        )
    )


def shrunk(config: RunConfig) -> RunConfig:
    """The same with the family's tiny model, a few dozen tokens, and nothing compiled."""
    vae = config.model.vae
    architecture = dict(ADAPTERS[config.model.family].tiny_config)
    patch = list(ADAPTERS[config.model.family].from_config(architecture, text_tokens=20).patch)
    sides = [5 * size * step for size, step in zip(vae, patch, strict=True)]
    return replace(
        config,
        model=replace(config.model, architecture=architecture, patch=patch, text_tokens=20),
        clip=ClipConfig(frames=4 * vae[0] * patch[0] + 1, height=sides[1], width=sides[2]),
        attention=replace(config.attention, block=16),
        trainer=replace(config.trainer, compile=False, precision="fp32"),
    )


def step_of_two_layers(config: RunConfig) -> Result:
    """Seconds and peak memory of a step on one device; stops where loss or gradients are not finite."""
    return run_case(config, sp=1, layers=2, steps=2)
