"""What the public tools that run radial attention do differently from a run's training.

A LoRA is loaded as well where attention is another than it was trained with; and only the clips show it. So an export
prints it. Read in the tools' code in August 2026 (the released scripts: commit 72788d4).
"""

from __future__ import annotations

from dataclasses import dataclass

from radial import Released, build_layout
from train.clip_recipe import clip_recipe
from train.config.schema import RunConfig
from train.models.families import family_of


@dataclass(frozen=True)
class Tool:
    """A public tool that runs radial attention; what is None its user sets.

    Attributes:
        format: of the export's files, the one that it reads.
        family: of the models that it runs.
        experts: whether it runs models of two experts, or those of one transformer; None: both.
        image: whether it runs image-to-video models too.
        rule: of the released mask (`radial.Released`).
        block: tokens of a block.
    """

    name: str
    format: str
    family: str
    rule: str
    block: int = 128
    experts: bool | None = None
    image: bool = True
    decay: float | None = None
    dense_layers: int | None = None
    dense_steps: int | None = None

    def serves(self, config: RunConfig) -> bool:
        """Whether it runs the run's model."""
        model = config.model
        image = (model.dimensions or {}).get("in_channels", 16) != (model.dimensions or {}).get("out_channels", 16)
        fits = self.experts is None or self.experts == (model.expert is not None)
        return self.family == model.family and fits and (self.image or not image)


TOOLS = (
    Tool("the released HunyuanVideo script", "released", "hunyuan", "hunyuan"),
    Tool("the released Wan2.1 script", "diffusers", "wan", "wan", experts=False, image=False),
    Tool("the released Wan2.2 script", "diffusers", "wan", "wan", block=64, experts=True, image=False),
    Tool("WanVideoWrapper", "comfyui", "wan", "ports"),
    Tool("LightX2V", "comfyui", "wan", "ports", decay=0.2, dense_layers=0, dense_steps=0),
    Tool("Wan2GP", "comfyui", "wan", "ports", decay=1.0, dense_layers=0, dense_steps=0),
)


def differences(config: RunConfig, kind: str) -> list[str]:
    """A line for each tool that reads this format and runs another attention than the run was trained with."""
    if config.attention.pattern == "dense":
        return []
    found = []
    for tool in TOOLS:
        if tool.format == kind and tool.serves(config):
            parts = _parts(tool, config)
            if parts:
                found.append(f"{tool.name} runs other attention than the LoRA was trained with: {', '.join(parts)}")
    return found


def _parts(tool: Tool, config: RunConfig) -> list[str]:
    attention, pattern = config.attention, config.pattern()
    if not isinstance(pattern, Released):
        return [f"the released mask, not {pattern.name}"]
    parts = []
    if tool.rule != pattern.rule:
        parts.append(f"rule {tool.rule}, not {pattern.rule}")
    if tool.block != attention.block:
        why = "; training's fastest kernel has blocks of 128 only" if attention.block == 128 else ""
        parts.append(f"blocks of {tool.block}, not {attention.block}{why}")
    if tool.decay is not None and tool.decay != pattern.decay:
        parts.append(f"decay {tool.decay:g}, not {pattern.decay:g}")
    for name, own in (("dense_layers", attention.dense_layers), ("dense_steps", dense_steps(config))):
        its = getattr(tool, name)
        if its is not None and its != own:
            parts.append(f"{its or 'no'} {name.replace('_', ' ')}, not {own}")
    if tool.rule == pattern.rule == "hunyuan":
        layout = build_layout(pattern, config.grid(), attention.block)
        if layout.filled_rows:
            parts.append(f"{layout.filled_rows} of {layout.complete_blocks} query blocks see the text alone")
    return parts


def dense_steps(config: RunConfig) -> int:
    """How many of the model's own sampling steps are dense in the run."""
    if config.attention.dense_sigma is None:
        return config.attention.dense_steps
    if config.model.steps is None:
        return 0
    recipe = clip_recipe(config)
    levels = family_of(config.model).noise_levels(config.model.steps, recipe.schedule.shift)
    return sum(map(recipe.attention.is_dense, levels))


def script_flags(config: RunConfig) -> str:
    """The released HunyuanVideo script's arguments that set attention and clip as in training, a line each."""
    attention, clip, pattern = config.attention, config.clip, config.pattern()
    decay = pattern.decay if isinstance(pattern, Released) else attention.decay
    flags = {"pattern": "dense" if attention.pattern == "dense" else "radial"}
    flags |= {"dense_layers": f"{attention.dense_layers}", "dense_timesteps": f"{dense_steps(config)}"}
    flags |= {"decay_factor": f"{decay:g}", "num_frames": f"{clip.frames}"}
    flags |= {"height": f"{clip.height}", "width": f"{clip.width}"}
    if config.model.steps is not None:
        flags["num_inference_steps"] = f"{config.model.steps}"
    return "".join(f"--{name} {value}\n" for name, value in flags.items())
