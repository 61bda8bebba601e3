"""A model card for the hub, written from a run: how the LoRA was trained, what it reaches, how to run it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from data.io.files import write_utf8
from radial import Dense
from train.config.global_batch import clips_a_step
from train.config.schema import RunConfig
from train.export.formats import WEIGHTS, formats_of
from train.export.tools import differences, ways
from train.lora.file_checks import NONE
from train.measures.results import TEXT
from train.models.families import family_of
from train.models.pretrained import public_name
from train.step.clip_recipe import clip_recipe

NAME = "README.md"
_KNOWN = ("apache-2.0", "mit")  # licences that the hub has a name for


def write_card(run: Path, config: RunConfig, step: int, out: Path, formats: Sequence[str] | None) -> str:
    """Writes the card of a run's export, and returns a line.

    Args:
        run: the run folder, whose table of results is put into the card where it has one of this step.
        config: of the run.
        step: the optimizer step of what is exported.
        out: the folder of the export.
        formats: that are in it; None: all that there are for its model.
    """
    if formats is None:
        formats = formats_of(family_of(config.model).model_class.__name__, dora=_is_dora(config))
    base = base_model(config)
    data = ModelCardData(
        base_model=base,
        library_name="diffusers",
        pipeline_tag="image-to-video" if takes_image(config) else "text-to-video",
        tags=["lora", "radial-attention", "video", config.model.family],
        **_licence(config, base),
    )
    results = run / TEXT
    # they were measured at the run's end: of an earlier checkpoint they say nothing
    measured = step == config.trainer.steps and results.is_file()
    table = results.read_text(encoding="utf-8").strip() if measured else ""
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {config.conf}: {base or public_name(config.model)} at {config.clip.frames} frames",
        f"A {_kind(config)} that was trained with dense attention."
        if isinstance(config.pattern(), Dense)
        else f"A {_kind(config)} that was trained under a static sparse attention mask (radial attention, arXiv "
        "2506.19852). It belongs to that mask: under another one its clips are worse.",
        "## Trained with\n\n" + _settings(config, step),
        "" if not table else f"## Held-out losses\n\n```\n{table}\n```",
        "## Running it\n\n" + _running(config, formats),
    ]
    write_utf8(out / NAME, "\n\n".join(part for part in parts if part) + "\n")
    return f"{NAME}  the model card"


def base_model(config: RunConfig) -> str | None:
    """The base model's name on the hub; None where it has none."""
    path = config.model.path or ""
    if path.startswith("hub:"):
        return path.removeprefix("hub:")
    named = re.search(r"hf download (\S+/\S+)", config.model.weights or "")
    return named[1] if named else None


def takes_image(config: RunConfig) -> bool:
    """Whether the model starts a clip from an image."""
    return family_of(config.model).from_image(config.model.dimensions or {})


def _licence(config: RunConfig, base: str | None) -> dict[str, Any]:
    name = config.model.license
    if name in _KNOWN:
        return {"license": name}
    found = {"license": "other"} | ({"license_name": name} if name else {})
    return found | ({"license_link": f"https://huggingface.co/{base}/blob/main/LICENSE"} if name and base else {})


def _settings(config: RunConfig, step: int) -> str:
    attention, clip, recipe = config.attention, config.clip, clip_recipe(config)
    dense = f"the first {attention.dense_layers} layers"
    if recipe.attention.dense_sigma is not None:
        dense += f", and all from noise level {recipe.attention.dense_sigma:.4g} on"
    rate = f"{config.optim.lr:g}"
    if config.optim.lora_plus != 1:
        rest = "B and the norms" if _is_dora(config) else "B"
        rate += f" of A, {config.optim.lr * config.optim.lora_plus:g} of {rest} (LoRA+)"
    masked = {"mask": f"`{config.pattern()}`, blocks of {attention.block} tokens", "dense": dense}
    rows = ({} if isinstance(config.pattern(), Dense) else masked) | {
        "clips": f"{clip.frames} frames of {clip.height} x {clip.width} pixels",
        "temporal positions": config.model.rope,
        "shift of the noise levels": f"{config.shift():g}",
        _kind(config): _lora(config),
        "steps": f"{step} of {clips_a_step(config):g} clips",
        "learning rate": rate,
    }
    if config.optim.ema is not None:
        rows["weights"] = f"a moving average over the steps, decay {config.optim.ema:g}"
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])


def _running(config: RunConfig, formats: Sequence[str]) -> str:
    expert = config.model.expert
    both = expert == "both"
    folder = "high_noise/" if both else ""
    lines = []
    if not _is_dora(config) and family_of(config.model).pipeline_name is not None:
        files = {
            None: f'"{formats[0]}"',
            "both": f'"{folder}{formats[0]}", lora_2="low_noise/{formats[0]}"',
            "high": f'"{formats[0]}", lora_2="{NONE}"',
            "low": f'"{NONE}", lora_2="{formats[0]}"',
        }
        lines += [
            "In diffusers, with the attention of the file's header:",
            f"```python\nfrom train.sample import extend\n\nextend(pipeline, {files[expert]})\n```",
        ]
    elif "diffusers" in formats:
        lines += ["In diffusers, with its own dense attention:", "```python"]
        parts = [("transformer_2" if expert == "low" else "transformer", folder)]
        for part, place in [*parts, *([("transformer_2", "low_noise/")] if both else [])]:
            lines.append(f'pipeline.{part}.load_lora_adapter("{place}diffusers", weight_name="{WEIGHTS}")')
        lines.append("```")
    if _is_dora(config):
        lines.append("With its mask it runs merged into the base model: `python -m train.export run=RUN merge=true`.")
    for kind in formats:
        lines += [f"- `{folder}{kind}/`: {line}" for line in (*ways(config, kind), *differences(config, kind))]
    return "\n".join(lines)


def _is_dora(config: RunConfig) -> bool:
    return config.lora is not None and config.lora.dora


def _kind(config: RunConfig) -> str:
    return "DoRA" if _is_dora(config) else "LoRA"


def _lora(config: RunConfig) -> str:
    if config.lora is None:
        return "none"
    kind = ", scaled by alpha / sqrt(rank)" if config.lora.rslora else ""
    return f"rank {config.lora.rank}, alpha {config.lora.alpha} (in the weights){kind}"
