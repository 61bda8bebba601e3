"""What the values of a run's config have to be, beyond their types."""

from __future__ import annotations

import math
import re
from typing import Any

from radial import RadialError
from radial.backends import BACKENDS
from train.config.schema import ROPE_KINDS, RunConfig
from train.errors import UserError

_CHOICES = {
    "objective.density": ("uniform", "logit_normal"),
    "optim.decay": ("constant", "cosine"),
    "trainer.precision": ("bf16", "fp32", "auto"),
    "model.rope": ROPE_KINDS,
    "model.expert": (None, "both", "high", "low"),
    "parallel.strategy": ("ddp", "zero1", "zero2", "zero3"),
    "parallel.activations": ("none", "full", "selective", "auto"),
    "log.wandb": ("disabled", "offline", "online"),
}
_AT_LEAST: dict[str, float] = {
    "seed": 0,
    "attention.dense_layers": 0,
    "attention.dense_steps": 0,
    "lora.rank": 1,
    "data.batch_size": 1,
    "data.workers": 0,
    "data.max_bad": 0,
    "data.shuffle_window": 1,
    "data.synthetic_clips": 0,
    "optim.warmup": 0,
    "optim.accumulate": 1,
    "optim.global_batch": 1,
    "trainer.steps": 1,
    "trainer.nodes": 1,
    "trainer.devices": 1,
    "trainer.checkpoint_every": 1,
    "trainer.checkpoint_minutes": 0,
    "trainer.keep": 1,
    "trainer.max_skipped": 0,
    "parallel.sequence": 1,
    "parallel.ffn_chunk": 1,
    "log.every": 1,
    "log.norms_every": 0,
    "validation.every": 0,
    "validation.clips": 1,
    "validation.samples_every": 0,
    "validation.samples_steps": 1,
    "report.clips": 0,
    "report.sampling_steps": 1,
    "report.short_frames": 0,
    "model.text_tokens": 1,
    "model.native_frames": 1,
    "model.steps": 1,
    "optim.weight_decay": 0,
}
_POSITIVE = (
    "attention.decay",
    "attention.reach",
    "lora.alpha",
    "objective.shift",
    "objective.std",
    "objective.guidance",
    "optim.lr",
    "optim.clip",
    "parallel.offload_gib",
    "trainer.timeout",
)


def validate(config: RunConfig) -> None:
    """Checks what types alone cannot.

    Raises:
        UserError: naming the key, its value and what is possible.
    """

    def value(key: str) -> Any:
        item: Any = config
        for part in key.split("."):
            item = None if item is None else getattr(item, part)
        return item

    for key, choices in _CHOICES.items():
        if value(key) not in choices:
            raise UserError(f"{key} is {value(key)!r}, expected one of {', '.join(map(str, choices))}")
    for key, least in _AT_LEAST.items():
        if value(key) is not None and not value(key) >= least:
            raise UserError(f"{key} is {value(key)}, expected at least {least}")
    if config.seed >= 2**32:
        raise UserError(f"seed is {config.seed}, expected less than 2^32")
    for key in _POSITIVE:
        if value(key) is not None and not 0 < value(key) < math.inf:
            raise UserError(f"{key} is {value(key)}, expected a positive number")
    for key, low, high in (
        ("objective.caption_dropout", 0, 1),
        ("model.caption_dropout", 0, 1),
        ("objective.first_frame", 0, 1),
        ("attention.dense_sigma", 0, 1),
    ):
        if value(key) is not None and not low <= value(key) <= high:
            raise UserError(f"{key} is {value(key)}, expected a number from {low} to {high}")
    for sigma in config.validation.sigmas or []:
        if not 0 < sigma < 1:
            raise UserError(f"validation.sigmas has {sigma}, expected noise levels between 0 and 1")
    if 0 < config.report.clips < 12:
        raise UserError(f"report.clips is {config.report.clips}, expected 0 or at least 12 for an honest interval")
    if config.report.clips and config.report.short_frames > config.clip.frames:
        raise UserError(f"report.short_frames is {config.report.short_frames}, expected at most clip.frames")
    if config.lora is not None and config.lora.targets is not None:
        if config.lora.text:
            raise UserError("lora.text is true, but lora.targets names all modules: put those of the text into it")
        try:
            re.compile(config.lora.targets)
        except re.error as error:
            raise UserError(
                f"lora.targets is {config.lora.targets!r}, expected a regular expression: {error}"
            ) from error
    parallel = config.parallel
    for key, allowed in (
        ("offload_optimizer", ("zero1", "zero2", "zero3")),
        ("offload_parameters", ("zero3",)),
    ):
        if getattr(parallel, key) and parallel.strategy not in allowed:
            raise UserError(f"parallel.{key} needs parallel.strategy={' or '.join(allowed)}, it is {parallel.strategy}")
    if config.trainer.fp8 and (config.lora is None or parallel.strategy == "zero3"):
        found = "lora=null" if config.lora is None else "parallel=zero3, which takes weights apart"
        raise UserError(f"trainer.fp8 is true with {found}, expected a LoRA and whole frozen weights on each GPU")
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
    backend = config.attention.backend
    if backend is not None and backend not in BACKENDS:
        raise UserError(f"attention.backend is {backend!r}, expected one of {', '.join(BACKENDS)}")
    for key in ("model.vae", "model.patch"):
        if len(value(key)) != 3 or min(value(key)) < 1:
            raise UserError(f"{key} is {value(key)}, expected three sizes (time, height, width) of at least 1")
    if len(config.optim.betas) != 2 or not all(0 <= b < 1 for b in config.optim.betas):
        raise UserError(f"optim.betas is {config.optim.betas}, expected two numbers from 0 up to 1")
    if config.model.boundary is not None and not 0 < config.model.boundary < 1:
        raise UserError(f"model.boundary is {config.model.boundary}, expected a noise level between 0 and 1")
    if (config.model.expert is None) != (config.model.boundary is None):
        raise UserError(
            f"model.expert is {config.model.expert} and model.boundary {config.model.boundary}: a model of two experts "
            "has both, any other neither"
        )
    if any(not 0 < shift < math.inf for shift in config.model.shifts.values()):
        raise UserError(f"model.shifts is {config.model.shifts}, expected positive numbers")
    config.shift()
    attention = config.attention
    if attention.dense_sigma is not None and attention.dense_steps:
        raise UserError(
            f"attention.dense_steps is {attention.dense_steps} and attention.dense_sigma {attention.dense_sigma}, "
            "expected one: set attention.dense_steps=0 or attention.dense_sigma=null"
        )
    steps = config.model.steps
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
    if attention.block < 16 or attention.block & (attention.block - 1):
        raise UserError(f"attention.block is {attention.block}, expected a power of two such as 64 or 128")
    try:
        config.grid()
    except RadialError as error:
        raise UserError(f"clip.{error}") from error
    try:
        config.pattern()
    except RadialError as error:
        raise UserError(f"attention.{error}") from error
