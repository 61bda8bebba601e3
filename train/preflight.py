"""What stops a run before anything is loaded, made or written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from data.encoders import check_encoder, encoder_class
from data.errors import DataError
from data.io.remote import scheme_of
from data.shards.batch import collate
from data.shards.manifest import Manifest
from data.shards.stages import Stage, load_stages
from data.shards.stream import read_samples
from radial.cli.ranks import Rank
from train.attention.recipe import AttentionRecipe
from train.attention.sequence import check_heads
from train.config.compose import read_config
from train.config.global_batch import micro_batches
from train.config.schema import RunConfig
from train.errors import UserError
from train.lora.initial import check_initial
from train.lora.layers import check_saved, inject_lora, lora_parameters
from train.memory.fp8 import check_fp8
from train.models.base import ModelAdapter
from train.models.conditions import Conditions, check_guidance
from train.models.families import family_of
from train.models.loading import describe_model, encoder_of, sigma_range, temporal_rope
from train.planning import Budget, training_backend
from train.planning.full_memory import check_memory
from train.shards import training_shards, validation_shards
from train.step.clip_recipe import check_expert
from train.storage.checkpoints import checkpoints_of, weight_shapes
from train.storage.inputs import hold_inputs
from train.storage.resuming import check_changes
from train.storage.run_folder import going_on


def preflight(config: RunConfig, *, elsewhere: bool = False, offline: bool = False) -> None:
    """Stops a run that cannot work.

    Args:
        elsewhere: the run is for other machines, whose GPUs cannot be seen from here.
        offline: nothing is asked over the network: `remote_shards` are not looked at.

    Raises:
        UserError: weights or shards are missing or do not suit the model, or settings do not fit together or this
            machine.
    """
    family = family_of(config.model)
    temporal_rope(config.model)
    if config.model.architecture is not None and config.model.path is not None:
        raise UserError(f"model.path is {config.model.path}, but model.architecture asks for random weights: unset one")
    if config.model.architecture is not None and config.lora is not None:
        raise UserError(
            "model.architecture asks for random weights, a LoRA needs trained ones: choose another model= or lora=null"
        )
    if config.lora is not None and config.lora.init is not None:
        check_initial(config.lora.init, config.model)
    adapter = describe_model(config.model)
    check_parallel(config, elsewhere)
    if adapter is not None:
        check_heads(config.parallel.sequence, adapter.attention_shape[1])
        AttentionRecipe.of(config).check_model(*adapter.attention_shape[:2])
        check_guidance(config.objective.guidance, adapter.takes_guidance)
    if config.objective.first_frame and not family.takes_first_frame:
        raise UserError(
            f"objective.first_frame is {config.objective.first_frame}, but family {config.model.family} takes no first "
            "frame by itself: leave it 0"
        )
    if config.data.shards is None and not config.data.synthetic_clips:
        raise UserError(
            "data.shards is not set, expected a folder of latent shards with a manifest.json "
            "(what python -m data.prepare makes; README, 'From videos to clips')"
        )
    check_expert(config)
    stages = load_stages(config.data.stages)
    unseen = remote_shards(config) if offline else {}
    if config.data.shards is not None and "data.shards" not in unseen:
        shards = training_shards(config)
        check_encoder(shards, *encoder_of(config.model))
        check_shapes(config, shards)
        if adapter is not None:
            _check_sample(adapter, shards, stages)
    if config.validation.every:
        held = "data.shards" if config.data.holdout else "validation.shards"
        _check_validation(config, adapter, held not in unseen)
    if config.validation.samples_every:
        _check_prompts(config, adapter)
    if config.report.clips and config.model.expert in ("high", "low"):
        raise UserError(f"report.clips needs both experts, model.expert is {config.model.expert}: set report.clips=0")
    if config.report.clips and config.data.shards is not None:
        raise UserError("report.clips needs synthetic data, set report.clips=0 or leave data.shards unset")
    if config.data.synthetic_clips and (tuple(config.model.vae) != (1, 1, 1)):
        raise UserError("data.synthetic_clips are pixels, they serve a model without a VAE only (model=shapes)")
    if not elsewhere:
        check_backend(config)
        check_memory(config)


def remote_shards(config: RunConfig) -> dict[str, str]:
    """The keys of shards that are read over the network or from a command, and what they are."""
    named = {"data.shards": config.data.places}
    if config.validation.every and config.validation.shards is not None:
        named["validation.shards"] = [config.validation.shards]
    remote = {key: [url for url in urls if scheme_of(url) != "file"] for key, urls in named.items()}
    return {key: ", ".join(urls) for key, urls in remote.items() if urls}


def preflight_resume(
    config: RunConfig, folder: Path, *, elsewhere: bool = False, offline: bool = False, override: bool = False
) -> RunConfig:
    """Stops a run that cannot go on with ``config``, before anything of its folder is changed.

    Args:
        elsewhere, offline: as `preflight`.
        override: shards, base weights and an initial LoRA may be others than the run was started with.

    Returns:
        What it goes on with (`train.storage.run_folder.going_on`).

    Raises:
        UserError: as `preflight`; or the newest checkpoint holds other weights than would be trained, or cannot follow
            what has changed (`train.storage.resuming.check_changes`); or what it reads was replaced
            (`train.storage.inputs`).
    """
    check_changes(read_config(folder), config, folder)
    config = going_on(config, folder)
    preflight(config, elsewhere=elsewhere, offline=offline)
    adapter, saved = describe_model(config.model), checkpoints_of(folder / "checkpoints")
    if adapter is not None and saved:
        trained = dict(adapter.transformer.named_parameters())
        if config.lora is not None:
            lora = config.lora
            targets = lora.targets or adapter.targets(text=lora.text)
            inject_lora(adapter.transformer, lora.rank, lora.alpha, targets, config.seed, dora=lora.dora)
            trained = lora_parameters(adapter.transformer)
        try:
            shapes = weight_shapes(saved[-1])
        except UserError:
            shapes = None  # damaged: one before it is taken
        if shapes is not None:
            check_saved(trained, shapes)
    seen = config.data.shards is not None and not (offline and "data.shards" in remote_shards(config))
    shards = training_shards(config) if seen else None
    first = Rank.here().index == 0
    for line in hold_inputs(config, folder, shards, accept=override, write=override and first):
        if first:
            print(f"replaced since the run was started: {line}")
    return config


def _check_sample(adapter: ModelAdapter, shards: Manifest, stages: Sequence[Stage]) -> None:
    """Holds the first sample, as the stages make it, against what the model takes.

    Of a `pipe:` nothing is read, since that would read a whole shard.
    """
    if scheme_of(shards.home) == "pipe":
        return
    try:
        (sample,) = read_samples(shards, 1)
    except DataError:
        return  # training names what is damaged, and bears some of it
    for stage in stages:
        sample = stage(sample)
    batch = collate([sample], 0)
    adapter.check(batch.latent, Conditions.of(batch))


def _check_validation(config: RunConfig, adapter: ModelAdapter | None, seen: bool) -> None:
    """Raise a UserError unless losses on held-out clips can be measured, with shards that can be `seen`."""
    given = config.validation
    low, high = sigma_range(config.model)
    if given.sigmas is not None and not any(low <= sigma < high for sigma in given.sigmas):
        raise UserError(
            f"validation.sigmas {given.sigmas} has no noise level of model.expert={config.model.expert}, "
            f"{low:g} to {high:g}: give some"
        )
    if given.shards is None and not config.data.holdout:
        if config.data.shards is None:
            return  # new synthetic ones
        raise UserError(
            f"validation.every is {given.every}, but validation.shards is not set: give shards of videos that "
            "data.shards does not have, hold some of its own out with data.holdout=64, or set validation.every=0"
        )
    if not seen:
        return
    shards = validation_shards(config)
    assert shards is not None
    check_encoder(shards, *encoder_of(config.model))
    for info in shards.samples[: given.clips]:
        if tuple(info.shape[1:]) != config.latent_size():
            raise UserError(
                f"validation.shards: {shards.home} has latents of (frames, height, width) {tuple(info.shape[1:])}, but "
                f"clip is {config.latent_size()}: make them of the run's clip (shorter ones are cut from them)"
            )
    if adapter is not None:
        _check_sample(adapter, shards, load_stages(config.data.stages))


def _check_prompts(config: RunConfig, adapter: ModelAdapter | None) -> None:
    """Raise a UserError unless clips of ``validation.prompts`` can be generated."""
    given = config.validation
    if not given.prompts:
        raise UserError("validation.samples_every needs prompts: validation.prompts='[a boat, a fox]'")
    if given.images and len(given.images) != len(given.prompts):
        raise UserError(
            f"validation.images has {len(given.images)} pictures, expected one for each of the "
            f"{len(given.prompts)} prompts"
        )
    for file in given.images:
        if not Path(file).is_file():
            raise UserError(f"validation.images: {file} is no file")
    if config.model.expert in ("high", "low"):
        raise UserError(
            f"validation.samples_every needs both experts, model.expert is {config.model.expert}: set it to 0"
        )
    family = family_of(config.model)
    family.check_samples(config)
    takes, needs = family.takes_first_frame, False
    if adapter is not None:
        latent = torch.empty(1, adapter.latent_channels, 2, 8, 8, device="meta")
        needs = bool(adapter.random_conditions(latent).image)
    if needs and not given.images:
        raise UserError("the model starts from a picture: give one for each prompt, validation.images='[first.png]'")
    if given.images and not needs and not takes and adapter is not None:
        raise UserError("validation.images is set, but the model takes no first frame: leave it out")
    encoder, folder = encoder_of(config.model)
    parts = sum(encoder_class(encoder).parts.values(), ())
    missing = [part for part in parts if folder is not None and not (folder / part).is_dir()]
    if missing:
        raise UserError(
            f"validation.prompts are encoded and decoded by the model's own parts, but {folder} has no "
            f"{', '.join(missing)}: give the whole diffusers folder, or set validation.samples_every=0"
        )


def check_shapes(config: RunConfig, shards: Manifest) -> None:
    """The shards hold the configured clip, and beside it shorter and smaller ones at most: the plan is made for it.

    Raises:
        UserError: they do not, or larger ones too.
    """
    cells = config.latent_size()
    found = sorted({tuple(info.shape[1:]) for info in shards.samples}, key=math.prod)
    if cells not in found or math.prod(found[-1]) > math.prod(cells):
        raise UserError(
            f"{shards.home} has latents of (frames, height, width) {', '.join(map(str, found))}, but clip is {cells}, "
            "expected the largest of them: set clip.frames, clip.height, clip.width or data.shards"
        )
    for _, height, width in found:
        if height % config.model.patch[1] or width % config.model.patch[2]:
            raise UserError(
                f"{shards.home} has latents of {height} x {width} cells, which model.patch {list(config.model.patch)} "
                "does not divide: make the shards anew"
            )


def check_backend(config: RunConfig) -> None:
    """Refuses an ``attention.backend`` that cannot train the run on this machine.

    Raises:
        UserError: with the backend's reason.
    """
    budget = None if config.attention.backend is None else Budget.here(config)
    if budget is not None:
        training_backend(budget)


def check_parallel(config: RunConfig, elsewhere: bool) -> None:
    """Refuses a number of processes, a strategy or a precision that cannot train here.

    Args:
        elsewhere: the run is for another machine, whose devices are not asked about.

    Raises:
        UserError: in words.
    """
    if config.trainer.fp8 and not elsewhere and not torch.cuda.is_available():
        check_fp8(torch.device("cpu"))
    parallel, devices = config.parallel, config.trainer.devices
    if devices % parallel.sequence:
        sizes = ", ".join(str(size) for size in range(1, devices + 1) if devices % size == 0)
        raise UserError(
            f"parallel.sequence is {parallel.sequence}, expected a divisor of trainer.devices={devices}: {sizes}"
        )
    micro_batches(config)
    if parallel.strategy != "ddp" and not elsewhere and not torch.cuda.is_available():
        raise UserError(
            f"parallel.strategy is {parallel.strategy}, but DeepSpeed trains on NVIDIA GPUs only and none is here: "
            "set parallel=ddp"
        )
