"""Generating on a GPU: the CPU's clip, with every way of offloading, and less memory with some."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.helpers import HELPERS
from tests.helpers.tiny_pipelines import HEADER, save_lora, save_pipeline, words
from train.sample.generate import Generator
from train.sample.jobs import jobs
from train.sample.pipeline import pipeline_class
from train.sample.ranks import Ranks
from train.sample.settings import parse_settings


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return save_pipeline("wan", tmp_path_factory.mktemp("gpu") / "wan")


def clip(folder, device, **changes):
    settings, model = parse_settings(
        words(folder, backend="torch", decay=0.4, dense_layers=1, dense_steps=1, **changes)
    )
    todo = jobs(settings)
    ranks = Ranks(1, 0, torch.device(device))
    made = Generator(settings, model, str(folder), pipeline_class(str(folder), False), ranks, todo)
    result = made.denoise(todo[0], made.prompts[0], made.attention)
    return result.latent, next(made.transformers[0].parameters()).device


@pytest.mark.parametrize("offload", ["none", "model", "layer"])
def test_the_gpus_clip_is_the_cpus(wan, tmp_path, offload):
    lora = save_lora(wan, tmp_path / "mine.safetensors", header=HEADER)
    expected, _ = clip(wan, "cpu", lora=lora)
    got, device = clip(wan, "cuda", lora=lora, offload=offload)
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)
    assert device.type == "cuda"


def test_bf16_is_near(wan):
    expected, _ = clip(wan, "cpu")
    got, _ = clip(wan, "cuda", dtype="bf16")
    assert (got - expected).abs().mean() < 0.1 * expected.std()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("split_guidance", ["true", "false"])
def test_two_gpus_make_one_gpus_video(wan, tmp_path, split_guidance):
    """Through the command: the GPUs share the two prompts, or each clip's tokens."""
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    shared = {"backend": "torch", "decay": 0.4, "dense_layers": 1, "dense_steps": 1}
    script = str(HELPERS / "sample_frames.py")
    videos = []
    for name, start, changes in (("one", [sys.executable], {}), ("two", two, {"split_guidance": split_guidance})):
        out = tmp_path / name / "clip.mp4"
        done = subprocess.run(
            [*start, script, *words(wan, out=out, **shared, **changes)], capture_output=True, encoding="utf-8"
        )
        assert done.returncode == 0, done.stderr
        assert out.is_file()
        videos.append(np.load(out.with_name("frames.npy")).astype(int))
        assert json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))["gpus"] == len(videos)
    assert videos[0].shape == (33, 32, 48, 3)
    assert np.abs(videos[0] - videos[1]).mean() < 0.05  # of 255
