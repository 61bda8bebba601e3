"""Radial attention and a LoRA on a stock diffusers pipeline, for its own calls.

    from train.sample import extend

    pipeline = WanPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-14B-Diffusers", torch_dtype=torch.bfloat16).to("cuda")
    extend(pipeline, "wan_4x.safetensors")
    frames = pipeline("a boat", num_frames=321, height=720, width=1280).frames

The LoRA's header holds how it was trained: pattern, decay, rule, block, dense layers and dense steps, temporal
positions and the noise shift. ``python -m train.sample`` generates by the same class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from radial import RadialError
from train.config.compose import compose_run, group_options
from train.config.schema import ModelConfig
from train.errors import UserError
from train.lora.file_checks import NONE, notes
from train.models.base import ModelAdapter
from train.models.families import ADAPTERS, adapter_of, family_of
from train.models.loading import temporal_rope
from train.models.rope import TemporalRope
from train.sample.denoise import Denoiser, has_denoiser
from train.sample.pipeline import load_loras, transformers_of
from train.sample.ranks import Split
from train.sample.settings import Settings, complete, recipe_of, slots

# what belongs to a pipeline or a transformer is kept in it, to be freed with it
_EXTENSION, _ADAPTER = "radial_extension", "radial_adapter"
_SETTINGS = (
    *("pattern", "masks", "rule", "decay", "reach", "per_head", "block", "dense_layers", "dense_steps", "dense_sigma"),
    *("rope", "shift", "backend", "height", "width", "add_2"),
)
"""Those of `train.sample.settings.Settings` that `extend` takes; for the others the pipeline's call has arguments."""


def extend(
    pipeline: Any,
    lora: str | Path | None = None,
    *,
    strength: float = 1.0,
    lora_2: str | Path | None = None,
    add: str | None = None,
    model: str | ModelConfig | None = None,
    **settings: Any,
) -> Any:
    """Puts a LoRA and its attention on a pipeline, whose own calls then generate as ``python -m train.sample`` does.

    Offloading, compiling (``pipeline.transformer.compile_repeated_blocks()``) and further LoRAs
    (``pipeline.load_lora_weights``, then ``set_adapters``) come after it.

    Args:
        pipeline: of diffusers: Wan2.1, Wan2.2, HunyuanVideo, HunyuanVideo-1.5 or Mochi-1, text- or image-to-video.
        lora: a file in any format, or an export's folder; None: attention alone, that of its header and with its masks
            where the pipeline was loaded from a merged export's folder.
        strength: of the LoRA.
        lora_2: that of the expert for low noise levels (Wan2.2-A14B), unless ``lora`` is a folder with both.
        add: further LoRAs, as ``add=`` of ``python -m train.sample``.
        model: one of conf/model, where the pipeline fits several or none.
        settings: instead of the header's: ``pattern``, ``masks``, ``rule``, ``decay``, ``reach``, ``per_head``,
            ``block``, ``dense_layers``, ``dense_steps``, ``dense_sigma``, ``rope``, ``shift``, ``backend``; ``height``
            and ``width`` where the clips have another size than the LoRA was trained on, which decides the noise shift
            of some models; ``add_2`` for the expert for low noise levels.

    Returns:
        The pipeline.

    Raises:
        UserError: it is extended or offloaded already, is of no known model, or the LoRA does not fit it; or a setting
            that is none of these. The pipeline is then as it was.
    """
    for name in settings.keys() - set(_SETTINGS):
        raise UserError(
            f"extend takes no {name}, expected some of {', '.join(_SETTINGS)}: frames, steps, guidance and prompts are "
            "arguments of the pipeline's own call"
        )
    if hasattr(pipeline, _EXTENSION):
        raise UserError("the pipeline is extended already: call unextend(pipeline) first")
    if any(hasattr(transformer, "_hf_hook") for transformer in transformers_of(pipeline)):
        # after each clip diffusers removes accelerate's hooks, and all that lies over them
        raise UserError(
            "the pipeline is offloaded already: call pipeline.remove_all_hooks(), extend it, and offload it after that"
        )
    if any(map(has_denoiser, transformers_of(pipeline))):
        raise UserError("another pipeline that shares this one's transformer is extended: call unextend(it) first")
    config = model if isinstance(model, ModelConfig) else model_of(pipeline, model)
    if family_of(config).pipeline_name is None:
        other = ", but python -m train.sample generates with it" if family_of(config).generates() else ""
        raise UserError(f"{type(pipeline).__name__} is of the family {config.family}, which cannot be extended{other}")
    first, second = (file if file in (None, NONE) else f"{file}:{strength}" for file in (lora, lora_2))
    if settings.get("masks") is not None:
        settings["masks"] = Path(settings["masks"]).expanduser()
    given = Settings(prompt="", lora=first, lora_2=second, add=add, **settings)
    extension = Extension(pipeline, complete(given, _with_folder(config, pipeline)), config)
    for line in extension.loaded:
        print(line)
    setattr(pipeline, _EXTENSION, extension)
    return pipeline


def unextend(pipeline: Any) -> Any:
    """Takes back what `extend` has put on a pipeline, and returns it.

    Raises:
        UserError: it is not extended, or was offloaded since; nothing is taken back then.
    """
    if not hasattr(pipeline, _EXTENSION):
        raise UserError("the pipeline is not extended: there is nothing to take back")
    getattr(pipeline, _EXTENSION).remove()
    delattr(pipeline, _EXTENSION)
    return pipeline


def model_of(pipeline: Any, name: str | None = None) -> ModelConfig:
    """The file of conf/model that a pipeline is of.

    Args:
        name: of the file; None looks for the one whose family, dimensions and number of experts are the pipeline's.

    Raises:
        UserError: there is none, or several, and which they are.
    """
    names = group_options()["model"]
    if name is not None:
        if name not in names:
            raise UserError(f"model is {name!r}, expected one of {', '.join(names)}")
        return _model_config(name)
    found = transformers_of(pipeline)
    family = adapter_of(type(found[0]).__name__) if found else None
    if family is None:
        raise UserError(
            f"{type(pipeline).__name__} has no transformer of a known family, expected one of {', '.join(ADAPTERS)}"
        )
    fitting = [name for name in names if _fits(_model_config(name), pipeline)]
    if len(fitting) != 1:
        which = f"fits {', '.join(fitting)}" if fitting else "has dimensions of none of the known models"
        raise UserError(f"the pipeline {which}: give model=, one of {', '.join(fitting or names)}")
    return _model_config(fitting[0])


def _model_config(name: str) -> ModelConfig:
    config = OmegaConf.to_object(compose_run({"conf": "wan_4x", "model": name}).model)
    assert isinstance(config, ModelConfig)
    return config


def _with_folder(model: ModelConfig, pipeline: Any) -> ModelConfig:
    """The model with the pipeline's own folder: a merged one's says how it was trained, and holds its masks."""
    folder = Path(str(transformers_of(pipeline)[0].config.get("_name_or_path")))
    if folder.name != "transformer" or not folder.is_dir():  # of the hub, or put together by hand
        return model
    return replace(model, path=str(folder.parent))


def _fits(model: ModelConfig, pipeline: Any) -> bool:
    family, (first, *others) = family_of(model), transformers_of(pipeline)
    if family.model_class is not type(first) or model.architecture is not None or not model.dimensions:
        return False
    return (
        all(first.config.get(name) == value for name, value in model.dimensions.items())
        and family.from_image(first.config) == family.from_image(model.dimensions)
        and len(others) == (0 if model.expert is None else 1)
        and pipeline.config.get("boundary_ratio") == model.boundary
        and bool(pipeline.config.get("expand_timesteps")) == family.takes_first_frame
    )


class Extension:
    """What generating changes in a pipeline: LoRAs, attention, temporal positions, the scheduler's shift.

    Args:
        pipeline: with its transformers loaded, wherever they are.
        settings: complete.
        model: of the pipeline.
        split: of several GPUs.
        bring: called with the transformer that runs next.

    Attributes:
        loaded: what was loaded, in words.
        denoiser: what stands between the pipeline and its transformers.
        adapters: our attention on each transformer.

    Raises:
        UserError: a LoRA that does not fit; the pipeline is then as it was.
    """

    def __init__(
        self,
        pipeline: Any,
        settings: Settings,
        model: ModelConfig,
        *,
        split: Split | None = None,
        bring: Callable[[Any], None] = lambda transformer: None,
    ) -> None:
        self.pipeline = pipeline
        self._changes: list[Callable[[], None]] = []
        try:
            self.loaded = self._load_loras(settings, model)
            self._shift(settings.shift)
            self.adapters = [
                self._adapter(t, replace(model, rope=str(settings.rope))) for t in transformers_of(pipeline)
            ]
            recipe = recipe_of(settings)
            for adapter in self.adapters:
                layers, heads, _ = adapter.attention_shape
                recipe.check_model(layers, heads)
        except RadialError as error:
            self.remove()
            raise UserError(str(error)) from error
        except BaseException:
            self.remove()
            raise
        self.denoiser = Denoiser(
            pipeline=pipeline,
            adapters=self.adapters,
            attention=recipe,
            split=split or Split(),
            bring=bring,
        )
        self._changes.append(self.denoiser.leave)

    def remove(self) -> None:
        """Takes everything back, the last change first."""
        while self._changes:
            self._changes[-1]()
            self._changes.pop()

    def _load_loras(self, settings: Settings, model: ModelConfig) -> list[str]:
        found = slots(settings, model)
        said = notes(found, model)
        for transformer, slot in zip(transformers_of(self.pipeline), found, strict=True):
            files = slot.files()
            if files and getattr(transformer, "peft_config", None):
                raise UserError(
                    "the pipeline has LoRAs already: extend it first, then load others with load_lora_weights"
                )
            said += load_loras(transformer, files, undo=self._changes)
        return said

    def _shift(self, shift: float | None) -> None:
        if shift is None:
            return
        before = self.pipeline.scheduler
        key = "flow_shift" if "flow_shift" in before.config else "shift"
        self.pipeline.scheduler = type(before).from_config(before.config, **{key: shift})
        self._changes.append(lambda: setattr(self.pipeline, "scheduler", before))

    def _adapter(self, transformer: Any, model: ModelConfig) -> ModelAdapter:
        """Our attention, and the temporal positions of ``model.rope``, on a transformer."""
        family = family_of(model)
        before = _processors(transformer)
        adapter: ModelAdapter | None = getattr(transformer, _ADAPTER, None)
        if adapter is None:  # once for each transformer: it hooks the positions
            adapter = family(transformer, model.text_tokens)
            setattr(transformer, _ADAPTER, adapter)
        else:
            adapter.install_processors()
        adapter.rope = temporal_rope(model)

        def back(adapter: ModelAdapter = adapter) -> None:
            adapter.rope = TemporalRope()
            adapter.unset_attention()
            for module, processor in before.items():
                module.processor = processor

        self._changes.append(back)
        return adapter


def _processors(transformer: Any) -> Mapping[Any, Any]:
    return {module: module.processor for module in transformer.modules() if hasattr(module, "processor")}
