"""The VAE and the text encoders of a run's model, for prompts on the way in and frames on the way out."""

from __future__ import annotations

import torch

from data.encoders import load_encoder
from data.encoders.base import Encoder, EncoderSettings
from train.config.schema import RunConfig
from train.models.loading import encoder_of
from train.planning import resolve_precision
from train.planning.prompts import encoder_dtypes


def encoder_for(config: RunConfig, device: torch.device, *, images: bool = False, vae_only: bool = False) -> Encoder:
    """The encoder of a run's model, its weights on the device in the precision that the run's model has there.

    Args:
        images: with what image conditions need.
        vae_only: without text encoders.

    Raises:
        DataError: a part of it is missing in the model's folder.
    """
    family, folder = encoder_of(config.model)
    precision = resolve_precision(config.trainer.precision)
    vae_dtype, text_dtype = encoder_dtypes(config, precision, cpu=device.type == "cpu")
    return load_encoder(family, EncoderSettings(folder, device, vae_dtype, text_dtype, images, vae_only))
