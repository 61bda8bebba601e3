"""The sections of a run's config for what it gives out: validation, logs, the report, exports."""

from __future__ import annotations

from dataclasses import dataclass

from radial.cli.settings import POSITIVE, Bound, at_least
from train.config.keys import key

TOOL_KEYS = (
    "released_hunyuan",
    "released_wan",
    "released_wan22",
    "wanvideowrapper",
    "lightx2v",
    "wan2gp",
    "radialattn",
)
"""What ``export.tools`` may name; `train.export.tools` holds what each tool runs."""
_TOOLS = Bound(f"some of {', '.join(TOOL_KEYS)}", lambda value: set(value) <= set(TOOL_KEYS))
_SIGMAS = Bound("noise levels between 0 and 1", lambda value: all(0 < sigma < 1 for sigma in value))
_REPORTED = Bound("0 or at least 12 for an honest interval", lambda value: value == 0 or value >= 12)


@dataclass
class ValidationConfig:
    """What is measured during training: the loss on held-out clips at fixed noise levels, clips of fixed prompts."""

    every: int = key("distance of two validations; 0: none", 0, unit="optimizer steps", must=at_least(0))
    shards: str | None = key(
        "held-out clips, a place as in data.shards; null: new synthetic ones where data.synthetic_clips is set", None,
        path=True,
    )  # fmt: skip
    clips: int = key("how many of the held-out clips are used, the first ones", 8, must=at_least(1))
    sigmas: list[float] | None = key(
        "noise levels to validate at; null: quantiles of those that the run trains at", None, must=_SIGMAS
    )
    samples_every: int = key("distance of two generations of the prompts' clips; 0: none", 0, unit="optimizer steps",
                             must=at_least(0))  # fmt: skip
    prompts: list[str] = key("what is generated during training", [])
    images: list[str] = key("a first frame for each prompt, for models that take one", [], path=True)
    samples_steps: int | None = key("denoising steps of these clips; null: the model's own, else 30", None,
                                    must=at_least(1))  # fmt: skip
    samples_guidance: float | None = key(
        "weight of guidance of these clips; null: the model's own, else 5, and 1 where the model is distilled for it",
        None, must=POSITIVE,
    )  # fmt: skip


@dataclass
class LogConfig:
    """Where figures are logged: metrics.csv always, TensorBoard and Weights & Biases on request, by the same names."""

    every: int = key("distance of two logged steps", 1, unit="optimizer steps", must=at_least(1))
    norms_every: int = key("distance of two logs of the LoRA's norms by layer; 0: none", 25, unit="optimizer steps",
                           must=at_least(0))  # fmt: skip
    tensorboard: bool = key("write TensorBoard's event files into the run folder", False)
    wandb: str = key("mode of Weights & Biases", "disabled", ("disabled", "offline", "online"))
    project: str = key("project of Weights & Biases", "radial-lora")


@dataclass
class ReportConfig:
    """What a run measures at its end on held-out synthetic clips; only where data.synthetic_clips made the data."""

    clips: int = key("held-out clips in the table of results; 0: no report", 0, must=_REPORTED)
    sampling_steps: int = key("denoising steps of the animation", 12, must=at_least(1))
    guidance: float = key("weight of classifier-free guidance of the animation", 1.0, must=POSITIVE)
    short_frames: int = key("also measure the base at this length, its own; 0: not", 0, unit="frames",
                            must=at_least(0))  # fmt: skip


@dataclass
class ExportConfig:
    """What the LoRA is for: a run warns at its start, and at its export, of what the named tools cannot run."""

    tools: list[str] = key("public tools that the LoRA is to run in: [wanvideowrapper,lightx2v]", [], must=_TOOLS)
