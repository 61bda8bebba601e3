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
    any_clip = {"clip.frames": "1", "clip.height": "480", "clip.width": "832"}
    config = finish(compose_run({"conf": "wan_2x", "model": name, **any_clip}))
    model = config.model
    (height, width), lengths = model.native_size, {"1x": model.native_frames, **model.longer}

    def grid(frames):
        clip = replace(config, clip=ClipConfig(frames, height, width))
        validate(clip)
        return clip.grid()

    stride = model.vae[0]
    for times, frames in lengths.items():
        assert grid(frames).frames * model.patch[0] == (frames - 1) // stride + 1
        assert grid(frames).frames / grid(lengths["1x"]).frames == pytest.approx(float(times[:-1]), rel=0.05)
        with pytest.raises(UserError, match=rf"clip.frames is {frames + 1}, .* use {frames} or {frames + stride}$"):
            grid(frames + 1)
