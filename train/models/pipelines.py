"""What generating takes of a family's pipeline in diffusers, beside the transformer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
from torch import Tensor

from train.config.schema import ModelConfig, RunConfig
from train.errors import UserError

StepEnd = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]
"""What the pipelines call after each denoising step: pipeline, number of the step, timestep, tensors."""


class PipelineTraits:
    """The pipeline's part of a `ModelAdapter`; a family without one trains, and cannot generate."""

    family: ClassVar[str]
    """The name that ``model.family`` has in a YAML."""
    model_class: ClassVar[Any]
    """The diffusers class of the transformer."""

    pipeline_name: ClassVar[str | None] = None
    """The diffusers pipeline from text, which `train.sample.extend` takes; None: there is none."""
    image_pipeline_name: ClassVar[str | None] = None
    """The one from a first frame, where there is one."""
    vae_in_bf16: ClassVar[bool] = False
    """Whether its authors run the VAE in bf16 beside a bf16 transformer; else it is fp32."""
    decodes_tiled: ClassVar[bool]
    """Whether its VAE decodes frames in squares, as `data.encoders.decoding.TILED` says of its encoder."""
    negative_prompt: ClassVar[str] = ""
    """Its authors' own, where they give none."""
    fewest_steps: ClassVar[int] = 1
    """Denoising steps that its scheduler needs."""
    guided_by_prompt: ClassVar[bool] = True
    """Whether guidance takes a pass with the negative prompt; else the model takes the weight as an input."""
    distilled: ClassVar[bool] = False
    """Whether the model gives the velocity guided at a weight of its own, and no other can be set."""
    index: ClassVar[str] = "model_index.json"
    """The file of a pipeline's folder that names the class of each part."""
    files: ClassVar[list[str] | None] = None
    """What of a repository of the hub makes up the pipeline, as patterns; None: all of it."""

    @classmethod
    def generates(cls) -> bool:
        """Whether `train.sample` can generate with the family."""
        return cls.pipeline_name is not None

    @classmethod
    def part_class(cls, index: Mapping[str, Any], name: str) -> tuple[str, str | None]:
        """Library and class of a pipeline's part in its `index`; no class where it has no such part."""
        library, kind = index.get(name) or ("", None)
        return library, kind

    @classmethod
    def pipeline_class(cls, *, image: bool = False) -> Any:
        """The class, imported only here: pipelines bring the encoders' libraries, which training does without."""
        name = cls.image_pipeline_name if image else cls.pipeline_name
        assert name is not None, f"{cls.__name__} names no pipeline"
        return getattr(diffusers, name)

    @classmethod
    def from_image(cls, config: Mapping[str, Any]) -> bool:
        """Whether a model needs a first frame.

        Args:
            config: of its class; the class's defaults hold for what it lacks.
        """
        own = inspect.signature(cls.model_class.__init__).parameters
        taken, given = (
            config.get(name, own[name].default if name in own else None) for name in ("in_channels", "out_channels")
        )
        return bool(taken != (given or taken))

    @classmethod
    def negative_of(cls, model: ModelConfig) -> str:
        """The negative prompt that the model's authors give it."""
        return cls.negative_prompt

    @classmethod
    def takes_negative(cls, guidance: float) -> bool:
        """Whether a clip of that guidance takes a negative prompt."""
        return guidance > 1 and cls.guided_by_prompt

    @classmethod
    def check_guidance(cls, name: str, weight: float | None) -> None:
        """Looks at a weight of guidance before anything is loaded.

        Args:
            name: of the key that sets it.
            weight: None: no weight is set.

        Raises:
            UserError: the model is distilled for guidance, and the weight is another than 1, one pass without any.
        """
        if cls.distilled and weight not in (None, 1):
            raise UserError(
                f"{name} is {weight:g}, but {cls.family} is distilled for guidance: leave it out, or set it to 1"
            )

    @classmethod
    def check_samples(cls, config: RunConfig) -> None:
        """Looks at the weights of guidance that a run's generated clips may have.

        Raises:
            UserError: as `check_guidance`.
        """
        cls.check_guidance("validation.samples_guidance", config.validation.samples_guidance)
        for weight in config.model.guidance or []:
            cls.check_guidance("model.guidance", weight)

    @classmethod
    def vae_dtype(cls, dtype: torch.dtype) -> torch.dtype:
        """The VAE's dtype, beside a transformer of ``dtype``."""
        return torch.bfloat16 if cls.vae_in_bf16 and dtype == torch.bfloat16 else torch.float32

    @classmethod
    def check_prompts(cls, folder: Path, prompts: Iterable[str], tokens: int) -> None:
        """Looks at prompts before anything is loaded; most pipelines take any, and cut long ones.

        Args:
            folder: of the pipeline.
            tokens: that a prompt is padded to.

        Raises:
            UserError: a prompt that the family's does not take.
        """

    @classmethod
    def encode_prompt(
        cls, pipeline: Any, prompt: str, negative: str, guided: bool, **settings: Any
    ) -> dict[str, Tensor | None]:
        """What a call of the pipeline takes instead of a prompt.

        Args:
            pipeline: with text encoders.
            negative: is encoded too where the clip is ``guided``.
            settings: ``max_sequence_length`` and ``device``.
        """
        found = pipeline.encode_prompt(prompt, negative, do_classifier_free_guidance=guided, **settings)
        return dict(zip(("prompt_embeds", "negative_prompt_embeds"), found, strict=True))

    @classmethod
    def negative_inputs(cls, encoded: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the transformer is given for the negative prompt, where the pipeline asks for both prompts one by one.

        Args:
            encoded: as `encode_prompt` gives it.
        """
        found = encoded.get("negative_prompt_embeds")
        return {} if found is None else {"encoder_hidden_states": found}

    @classmethod
    def call(cls, pipeline: Any, guidance: float | None, tokens: int, step_end: StepEnd, **settings: Any) -> Tensor:
        """The latent of a clip, (1, C, f, h, w), by the pipeline's own call.

        Args:
            tokens: that a prompt is padded to.
            step_end: is called after each step.
            settings: further arguments of the call.
        """
        latent: Tensor = pipeline(
            guidance_scale=guidance,
            max_sequence_length=tokens,
            callback_on_step_end=step_end,
            output_type="latent",
            return_dict=False,
            **settings,
        )[0]
        return latent
