"""`python -m data.prepare` on GPUs: videos are decoded on the CPU while the device encodes; the CPU's samples."""

import os
import subprocess
import sys

import pytest
import torch

from data.shards.stream import read_samples
from tests.helpers.tiny_models import save_wan

pytest.importorskip("av", reason="needs PyAV to write videos")
from tests.helpers.prepared import LENGTHS, write_six

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
CLIPS = ["frames=9", "size=64x96", "text_dtype=fp32", "shard_gb=0.0002", "cuts=keep"]


def run(*command, **environment):
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def prepare(tmp_path, name, start=(sys.executable,), **environment):
    words = [f"source={tmp_path / 'videos'}", f"weights={tmp_path / 'weights'}", f"out={tmp_path / name}", *CLIPS]
    told = run(*start, "-m", "data.prepare", *words, **environment)
    return told, {
        (sample.meta["source"], sample.meta["clip_start"]): sample for sample in read_samples(tmp_path / name)
    }


@pytest.mark.parametrize(
    "start",
    [
        [sys.executable],
        pytest.param(TORCHRUN, marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")),
    ],
    ids=["one", "two"],
)
def test_the_command_on_gpus_writes_what_the_cpu_writes(tmp_path, start):
    write_six(tmp_path / "videos")
    save_wan(tmp_path / "weights")
    told, expected = prepare(tmp_path, "cpu", CUDA_VISIBLE_DEVICES="")
    assert "onto cpu" in told
    told, found = prepare(tmp_path, "gpu", start)
    assert "onto cuda:0" in told
    assert "100%" in told and "clip/s" in told
    assert found.keys() == expected.keys()
    assert {name for name, _ in found} == set(LENGTHS)
    for key, sample in found.items():
        assert sample.caption == expected[key].caption
        torch.testing.assert_close(sample.latent, expected[key].latent, rtol=2e-2, atol=2e-2)
        assert sample.text.keys() == expected[key].text.keys()
        for name, text in sample.text.items():
            other = expected[key].text[name]
            assert torch.equal(text.mask, other.mask)
            torch.testing.assert_close(text.tokens, other.tokens, rtol=2e-2, atol=2e-2)
    sheet = tmp_path / "sheet.png"
    words = [str(tmp_path / "gpu"), "--contact-sheet", f"weights={tmp_path / 'weights'}", f"png={sheet}"]
    assert f"{len(expected)} of {len(expected)} whole" in run(sys.executable, "-m", "data.check", *words)
    assert sheet.stat().st_size > 0
