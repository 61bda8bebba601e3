"""The public tools that run radial attention: which file each loads, and what makes its attention a run's own.

A LoRA is loaded as well where attention is another than it was trained with; and only the clips show it. So an export
prints it, and a run that names its tools (``export.tools``) is warned before it trains. Read in the tools' code between
March 2025 and August 2026 (the released scripts: commit 72788d4).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from radial import Released, build_layout
from train.config.schema import RunConfig
from train.export.formats import formats_of
from train.models.families import family_of
from train.step.clip_recipe import clip_recipe


@dataclass(frozen=True)
class Tool:
    """A public tool that runs radial attention; what is None its user sets.

    Attributes:
        key: what ``export.tools`` calls it.
        format: of the export's files, the one that it reads.
        family: of the models that it runs.
        experts: whether it runs models of two experts, or those of one transformer; None: both.
        image: whether it runs image-to-video models too.
        place: where its user sets attention, or switches it on.
        options: what it calls the settings there.
        never: why its mask is none of ours whatever is set; None: it may be.
        rule: of the released mask (`radial.Released`).
        block: tokens of a block.
        whole_sides: whether it refuses clips whose height or width in pixels is no multiple of the block.
    """

    key: str
    name: str
    format: str
    family: str
    rule: str
    block: int = 128
    whole_sides: bool = False
    experts: bool | None = None
    image: bool = True
    decay: float | None = None
    dense_layers: int | None = None
    dense_steps: int | None = None
    place: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    never: str | None = None

    def serves(self, config: RunConfig) -> bool:
        """Whether it runs the run's model."""
        model = config.model
        image = family_of(model).from_image(model.dimensions or {})
        fits = self.experts is None or self.experts == (model.expert is not None)
        return self.family == model.family and fits and (self.image or not image)


_SCRIPT = {"decay": "--decay_factor", "dense_layers": "--dense_layers", "dense_steps": "--dense_timesteps"}
TOOLS = (
    Tool(
        "released_hunyuan", "the released HunyuanVideo script", "released", "hunyuan", "hunyuan",
        place="flags.txt", options=_SCRIPT,
    ),
    Tool(
        "released_wan", "the released Wan2.1 script", "diffusers", "wan", "wan", experts=False, image=False,
        place="its arguments", options=_SCRIPT,
    ),
    Tool(
        "released_wan22", "the released Wan2.2 script", "diffusers", "wan", "wan", block=64, experts=True, image=False,
        place="its arguments", options=_SCRIPT,
    ),
    Tool(
        "wanvideowrapper", "WanVideoWrapper", "comfyui", "wan", "ports", whole_sides=True,
        place="a radial attention mode in its model loader, and the node WanVideoSetRadialAttention",
        options={"decay": "decay_factor", "dense_layers": "dense_blocks", "dense_steps": "dense_timesteps",
                 "block": "block_size"},
    ),
    Tool(
        "lightx2v", "LightX2V", "comfyui", "wan", "ports", decay=0.2, dense_layers=0, dense_steps=0,
        place='"self_attn_1_type": "radial_attn" in its JSON',
    ),
    Tool(
        "wan2gp", "Wan2GP", "comfyui", "wan", "ports", decay=1.0, dense_layers=0, dense_steps=0,
        place="the attention mode radial, with --betatest",
    ),
    Tool(
        "radialattn", "ComfyUI-RadialAttn", "comfyui", "wan", "ports", place="the node PatchRadialAttn",
        never="it also keeps the corner blocks of every pair of frames",
    ),
)  # fmt: skip
"""`train.config.output_sections.TOOL_KEYS` has their keys."""


def differences(config: RunConfig, kind: str) -> list[str]:
    """A line for each tool that reads this format and runs another attention than the run was trained with."""
    if config.attention.pattern == "dense":
        return []
    return [_difference(tool, parts) for tool, parts in _compared(config, kind) if parts]


def ways(config: RunConfig, kind: str) -> list[str]:
    """A line for each tool that reads this format and can run the attention of the run, with the settings that do."""
    if config.attention.pattern == "dense":
        return []
    found = [f"{t.name} runs this attention: {_way(t, config)}" for t, parts in _compared(config, kind) if not parts]
    if kind == "comfyui" and config.model.family in ("wan", "wan22_5b", "hunyuan") and config.model.rope == "default":
        found.append("ComfyUI runs this attention with the node Load Radial LoRA of radial/comfyui")
    return found


def warnings(config: RunConfig) -> list[str]:
    """A line for each tool of ``export.tools`` that cannot run what the run trains."""
    found, model_class = [], family_of(config.model).model_class.__name__
    dora = config.lora is not None and config.lora.dora
    for tool in TOOLS:
        if tool.key in config.export.tools:
            if not tool.serves(config):
                found.append(f"warning: export.tools has {tool.key}: {tool.name} does not run the run's model")
            elif dora and tool.format not in formats_of(model_class, dora=True):
                found.append(
                    f"warning: export.tools has {tool.key}: {tool.name} loads {tool.format}/, which a DoRA (lora.dora) "
                    "is not exported to: merge it (merge=true), or train a LoRA"
                )
            elif config.attention.pattern != "dense" and (parts := _parts(tool, config)):
                found.append(f"warning: export.tools has {tool.key}: {_difference(tool, parts)}")
    return found


def table() -> list[str]:
    """The rows of the manual's table: for each tool its file, and what makes its mask a run's."""
    rows = []
    for tool in TOOLS:
        fixed = {"decay": tool.decay, "dense_layers": tool.dense_layers, "dense_steps": tool.dense_steps}
        needed = [f"rule={tool.rule}", f"block={tool.block}" if "block" not in tool.options else ""]
        needed += [f"{name}={value:g}" for name, value in fixed.items() if value is not None]
        own = ", ".join(f"`{its}` = {ours}" for ours, its in tool.options.items())
        train = f"none: {tool.never}" if tool.never else " ".join(f"`attention.{each}`" for each in needed if each)
        train += ", height and width multiples of the block" if tool.whole_sides else ""
        rows.append(f"| {tool.name} | `{tool.key}` | `{tool.format}/` | {train} | {tool.place}{own and ': '}{own} |")
    return rows


def _compared(config: RunConfig, kind: str) -> list[tuple[Tool, list[str]]]:
    return [(tool, _parts(tool, config)) for tool in TOOLS if tool.format == kind and tool.serves(config)]


def _difference(tool: Tool, parts: list[str]) -> str:
    return f"{tool.name} runs other attention than the LoRA was trained with: {', '.join(parts)}"


def _way(tool: Tool, config: RunConfig) -> str:
    pattern, attention = config.pattern(), config.attention
    assert isinstance(pattern, Released)
    values = {"decay": f"{pattern.decay:g}", "dense_layers": f"{attention.dense_layers}"}
    values |= {"dense_steps": f"{dense_steps(config)}", "block": f"{attention.block}"}
    return ", ".join([tool.place, *(f"{its} {values[ours]}" for ours, its in tool.options.items())])


def _parts(tool: Tool, config: RunConfig) -> list[str]:
    attention, pattern = config.attention, config.pattern()
    if not isinstance(pattern, Released):
        return [f"the released mask, not {pattern.name}"]
    parts = [] if tool.never is None else [tool.never]
    if tool.rule != pattern.rule:
        parts.append(f"rule {tool.rule}, not {pattern.rule}")
    if "block" in tool.options:
        if attention.block not in (64, 128):
            parts.append(f"blocks of 64 or 128, not {attention.block}")
        elif attention.block == 64:
            parts.append("far frames thinned out from 64 tokens on, not from 128")
    elif tool.block != attention.block:
        why = "; training's fastest kernel has blocks of 128 only" if attention.block == 128 else ""
        parts.append(f"blocks of {tool.block}, not {attention.block}{why}")
    clip = config.clip
    if tool.whole_sides and (clip.height % attention.block or clip.width % attention.block):
        parts.append(f"it refuses {clip.height} x {clip.width} pixels, no multiples of the block {attention.block}")
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
