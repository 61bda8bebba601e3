"""Every public model at 1x, 2x and 4x of its native length, against its VAE's strides."""

from dataclasses import replace

import pytest

from train.config.check import validate
from train.config.compose import compose_run, finish, group_options
from train.config.schema import ClipConfig
from train.errors import UserError

PUBLIC = [name for name in group_options()["model"] if not name.startswith(("shapes", "study"))]


@pytest.mark.parametrize("name", PUBLIC)
def test_native_2x_and_4x_fit_the_vae_and_other_lengths_do_not(name):
    chosen = {"conf": "wan_2x", "model": name, "clip.height": "480", "clip.width": "832"}
    native = compose_run(chosen).model.native_frames
    config = finish(compose_run({**chosen, "clip.frames": str(native)}))
    model = config.model
    (height, width), lengths = model.native_size, {"1x": model.native_frames, **model.longer}

    def grid(frames):
        clip = replace(config, clip=ClipConfig(frames, height, width))
        validate(clip)
        return clip.grid()

    stride = 17 if name == "minimax_h3" else model.vae[0]  # its VAE makes 5 latent frames of 17, and 2 of the last 5
    for times, frames in lengths.items():
        latents = (frames - 5) // 17 * 5 + 2 if name == "minimax_h3" else (frames - 1) // stride + 1
        assert grid(frames).frames * model.patch[0] == latents
        assert grid(frames).frames / grid(lengths["1x"]).frames == pytest.approx(float(times[:-1]), rel=0.05)
        with pytest.raises(UserError, match=rf"clip.frames is {frames + 1}, .* use {frames} or {frames + stride}$"):
            grid(frames + 1)
