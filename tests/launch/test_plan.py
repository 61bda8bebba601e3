"""``python -m launch plan``: what a person sees."""

import re
import subprocess
import sys

import pytest

from launch.plan import main
from radial.errors import Mistake


def lines(capsys, *words):
    main(list(words))
    return capsys.readouterr().out.splitlines()


def row(output, name):
    """The numbers of a row of the table."""
    line = next(line for line in output if line.strip().startswith(name))
    return [float(word.rstrip("%").replace(",", "")) for word in line.strip()[len(name) :].split()]


def test_the_plan_of_the_largest_run(capsys):
    output = lines(capsys, "conf=wan_4x", "gpus=8", "gpu=h200", "parallel.activations=full")
    text = "\n".join(output)
    assert "wan_4x on 8 x NVIDIA H200, 1024 GiB of CPU memory a node" in text
    assert "321 frames of 720 x 1280: 291,600 tokens" in text
    assert row(output, "sparsity") == [83.8, 0.0]
    ours, dense = row(output, "FLOPs of a clip's step")
    assert dense > 3 * ours
    assert row(output, "weights") == [26.7, 26.7]
    assert row(output, "hours of 2,500 steps")[1] > 2 * row(output, "hours of 2,500 steps")[0]
    assert "the first 2 of 40 layers are dense in every step" in text
    assert "3.0% of the steps, at noise levels from 0.9938, run dense" in text
    assert "does not fit as it is" in text
    best = output[next(n for n, line in enumerate(output) if line.startswith("fastest here (8 GPUs)")) + 1]
    assert re.search(r"trainer.devices=8 .*parallel.sequence=\d .*parallel.activations=auto", best)
    assert any(line.startswith("fewest GPUs (1 GPU)") for line in output)
    assert "were measured" not in text and "was measured" not in text  # these are the GPUs that were

    settings = best.split()
    again = lines(capsys, "conf=wan_4x", "gpus=8", *settings)
    assert "fits as it is" in again


def test_clips_are_shared_within_a_node_as_train_has_it(capsys):
    text = "\n".join(lines(capsys, "conf=wan_4x", "nodes=5", "gpus=8"))
    assert {int(size) for size in re.findall(r"parallel.sequence=(\d+)", text)} <= {1, 2, 4, 8}


def test_groups_that_do_not_divide_a_node_are_told_with_those_that_do(capsys):
    output = lines(capsys, "conf=hunyuan_2x", "gpus=4")  # the run file says 8
    assert output[0] == (
        "does not fit as it is: parallel.sequence is 8, expected a divisor of a node's 4 GPUs: 1, 2, 4"
    )
    best = next(n for n, line in enumerate(output) if line.startswith("fastest here (4 GPUs)"))
    assert "parallel.sequence=4" in output[best + 1]
    assert not any(line.startswith("memory of a GPU") for line in output)


def test_gpus_that_cannot_share_the_clips_of_a_step_are_told_how_they_can(capsys):
    output = lines(capsys, "conf=wan_4x", "nodes=4", "gpus=8")
    assert output[0].startswith("does not fit as it is: optim.global_batch is 8 clips a step over all GPUs, but ")
    best = next(n for n, line in enumerate(output) if line.startswith("fastest here (32 GPUs)"))
    assert re.search(r"parallel.sequence=[48]\b", output[best + 1]) and "accumulate" not in output[best + 1]
    shared = lines(capsys, "conf=wan_4x", "nodes=4", "gpus=8", "parallel.sequence=4")
    assert "clips: 8 a step: 1 x 32 processes / 4 a clip, 1 micro-batch" in shared
    more = lines(capsys, "conf=wan_4x", "gpus=8", "optim.global_batch=16")
    assert "clips: 16 a step: 1 x 8 processes, 2 micro-batches; conf/wan_4x.yaml has 8 a step" in more


def test_where_nothing_fits(capsys):
    text = "\n".join(lines(capsys, "conf=wan_4x", "gpu=rtx5090", "gpus=2", "cpu_memory=64"))
    assert "no setting fits these GPUs; what would:" in text
    assert "GPUs of this kind" in text
    assert "clip.frames=" in text
    assert "times are scaled from an H200 by peak FLOP/s and bandwidth" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gpu=h300"], "gpu is 'h300', expected one of h200, h100, a100, rtx5090, rtx4090"),
        (["gpus=none"], "gpus is 'none', expected a whole number"),
        (["conf=wan_4x", "stpes=3"], "stpes is not a known key"),
        (["model.path=hub:a/b"], "the dimensions of hub:a/b are not known"),
    ],
)
def test_mistakes(words, message):
    with pytest.raises(Mistake, match=message):
        main(words)


@pytest.mark.slow
def test_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "launch", "plan", "conf=wan_2x"], capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert "hours of 2,500 steps" in done.stdout
    help_text = subprocess.run(
        [sys.executable, "-m", "launch", "plan", "--help"], capture_output=True, encoding="utf-8"
    )
    assert help_text.returncode == 0
    assert "cpu_memory" in help_text.stdout
