"""What the values of a run's config have to be together; what each has to be by itself stands at its key."""

from __future__ import annotations

import re

from radial import Fitted, RadialError
from radial.cli.settings import check_value
from radial.errors import Mistake
from train.config.keys import value_of
from train.config.schema import KEYS, ModelConfig, RunConfig
from train.errors import UserError


def validate(config: RunConfig) -> None:
    """Checks what types alone cannot: the choices and bounds of each key, then the rules between keys.

    Raises:
        UserError: naming the key, its value and what is possible.
    """
    _check_keys(config)
    _check_data(config)
    _check_experts(config.model)
    config.shift()
    _check_attention(config)
    _check_parallel(config)
    _check_objective(config)
    if config.report.clips and config.report.short_frames > config.clip.frames:
        raise UserError(f"report.short_frames is {config.report.short_frames}, expected at most clip.frames")
    if config.lora is None and config.optim.lora_plus != 1:
        raise UserError(
            f"optim.lora_plus is {config.optim.lora_plus:g} with lora=null, which has no A and B: leave it out"
        )
    if config.lora is not None and config.lora.targets is not None:
        if config.lora.text:
            raise UserError("lora.text is true, but lora.targets names all modules: put those of the text into it")
        try:
            re.compile(config.lora.targets)
        except re.error as error:
            raise UserError(
                f"lora.targets is {config.lora.targets!r}, expected a regular expression: {error}"
            ) from error
    try:
        config.grid()
    except RadialError as error:
        raise UserError(f"clip.{error}") from error
    try:
        pattern = config.pattern()
        if isinstance(pattern, Fitted):
            pattern.masks.about.check_grid(config.grid(), config.attention.block)
    except RadialError as error:
        raise UserError(f"attention.{error}") from error


def check_model(model: ModelConfig) -> None:
    """Checks a model without a run: the choices and bounds of its keys, and the rules between them.

    Raises:
        UserError: naming the key, its value and what is possible.
    """
    _check_keys(model, "model.")
    _check_experts(model)


def _check_keys(config: RunConfig | ModelConfig, section: str = "") -> None:
    try:
        for name, key in KEYS.items():
            if name.startswith(section):
                value = value_of(config, name.removeprefix(section))
                if key.is_path and "" in (value if isinstance(value, list) else [value]):
                    raise Mistake(f"{name} is empty, expected a path; is a variable of the shell not set?")
                check_value(name, key.field, value)
    except Mistake as error:
        raise UserError(str(error)) from None


def _check_data(config: RunConfig) -> None:
    data, places = config.data, len(config.data.places)
    if data.shards is not None and not places:
        raise UserError("data.shards is empty, expected a folder or URL of shards; is a variable of the shell not set?")
    if data.weights and len(data.weights) != places:
        raise UserError(f"data.weights has {len(data.weights)} numbers, expected one for each of {places} data.shards")
    for key, value in (("frames", data.frames), ("holdout", data.holdout)):
        if value and not places:
            raise UserError(f"data.{key} is {value:g}, but data.shards is not set: set it, or leave data.{key} out")
    if data.holdout and config.validation.shards is not None:
        raise UserError(
            f"data.holdout is {data.holdout:g} and validation.shards {config.validation.shards}, expected one of them"
        )
    if data.holdout >= 1 and data.holdout % 1:
        raise UserError(f"data.holdout is {data.holdout:g}, expected a whole number of samples, or a share below 1")


def _check_experts(model: ModelConfig) -> None:
    if (model.expert is None) != (model.boundary is None):
        raise UserError(
            f"model.expert is {model.expert} and model.boundary {model.boundary}: a model of two experts has both, any "
            "other neither"
        )


def _check_objective(config: RunConfig) -> None:
    objective, dropout = config.objective, config.caption_dropout()
    weight, teacher = objective.distilled_guidance, objective.dense_teacher
    for name, value in (("distilled_guidance", weight), ("dense_teacher", teacher)):
        if value and config.lora is None:
            raise UserError(f"objective.{name} is {value:g}, but lora is null: it needs the frozen model, train a LoRA")
    if teacher and config.model.native_frames is None:
        raise UserError(f"objective.dense_teacher is {teacher:g}, which needs model.native_frames, it is not set")
    if weight is not None and config.model.guidance not in (None, [1.0]):
        raise UserError(
            f"objective.distilled_guidance is {weight:g}, but the model is sampled with guidance (model.guidance is "
            f"{config.model.guidance}): it is for models that give the guided velocity in one pass, model.guidance=[1]"
        )
    if weight is not None and dropout:
        raise UserError(
            f"objective.distilled_guidance is {weight:g} and the share of samples with the empty prompt {dropout:g}, "
            "but those have no guidance to keep: set objective.caption_dropout=0"
        )


def _check_attention(config: RunConfig) -> None:
    attention, steps = config.attention, config.model.steps
    if attention.dense_sigma is not None and attention.dense_steps:
        raise UserError(
            f"attention.dense_steps is {attention.dense_steps} and attention.dense_sigma {attention.dense_sigma}, "
            "expected one: set attention.dense_steps=0 or attention.dense_sigma=null"
        )
    if attention.dense_steps and steps is None:
        raise UserError(
            f"attention.dense_steps is {attention.dense_steps}, and the model has no sampling steps of its own "
            "(model.steps): set model.steps, or attention.dense_steps=0"
        )
    if steps is not None and attention.dense_steps >= steps:
        raise UserError(
            f"attention.dense_steps is {attention.dense_steps}, expected fewer than the model's sampling steps "
            f"(model.steps={steps}); attention=dense makes all of them dense"
        )


def _check_parallel(config: RunConfig) -> None:
    parallel = config.parallel
    if config.model.expert == "both" and parallel.strategy != "ddp":
        raise UserError(
            f"parallel.strategy is {parallel.strategy}, which steps on all weights, but model.expert=both leaves one "
            "expert alone: set parallel=ddp, or train them in two runs, model.expert=high and model.expert=low"
        )
    if config.model.expert == "both" and config.lora is None:
        raise UserError("lora=null trains all weights, of one expert at a time: set model.expert=high or low")
    for key, allowed in (
        ("offload_optimizer", ("zero1", "zero2", "zero3")),
        ("offload_parameters", ("zero3",)),
    ):
        if getattr(parallel, key) and parallel.strategy not in allowed:
            raise UserError(f"parallel.{key} needs parallel.strategy={' or '.join(allowed)}, it is {parallel.strategy}")
    if config.trainer.fp8 and (config.lora is None or parallel.strategy == "zero3"):
        found = "lora=null" if config.lora is None else "parallel=zero3, which takes weights apart"
        raise UserError(f"trainer.fp8 is true with {found}, expected a LoRA and whole frozen weights on each GPU")
    if config.model.storage is not None and (config.lora is None or parallel.strategy == "zero3"):
        found = "lora=null" if config.lora is None else "parallel=zero3, which takes weights apart"
        raise UserError(
            f"model.storage is {config.model.storage} with {found}, expected a LoRA and whole frozen weights"
        )
    if config.model.storage is not None and config.trainer.fp8:
        raise UserError(
            f"model.storage is {config.model.storage} and trainer.fp8 true: stored weights compute in float8 by "
            "themselves where the GPU does, leave trainer.fp8 out"
        )
    if config.lora is not None and config.lora.dora:
        clashes = {
            "trainer.fp8": config.trainer.fp8,
            "model.storage=fp8": config.model.storage is not None,
            "parallel=zero3": parallel.strategy == "zero3",
        }
        for name in (name for name, there in clashes.items() if there):
            raise UserError(f"lora.dora is true with {name}: DoRA needs whole frozen weights in 16 or 32 bits; set one")
        if config.optim.weight_decay:
            raise UserError(
                f"lora.dora is true with optim.weight_decay={config.optim.weight_decay:g}, which would shrink the "
                "norms of the weights towards 0, and with them the frozen model: set optim.weight_decay=0"
            )
    if parallel.offload_weights and (config.lora is None or parallel.strategy == "zero3"):
        found = "lora=null, which trains them" if config.lora is None else "parallel=zero3, which spreads them"
        raise UserError(
            f"parallel.offload_weights is true with {found}: expected a LoRA over frozen weights, whole in CPU memory"
        )
    if parallel.offload_gib is not None and not (parallel.offload_activations or parallel.activations == "auto"):
        raise UserError(
            f"parallel.offload_gib is {parallel.offload_gib}, it needs parallel.offload_activations=true or "
            "parallel.activations=auto"
        )
    if parallel.offload_activations and parallel.activations not in ("full", "selective"):
        raise UserError(
            "parallel.offload_activations needs parallel.activations=full or selective, it is "
            f"{parallel.activations}" + (", which offloads what it has to" if parallel.activations == "auto" else "")
        )
