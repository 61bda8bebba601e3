"""Several processes generate the clip that one generates, whichever way they share the work."""

import os
import subprocess
import sys

import numpy as np
import pytest

from tests.helpers import sample_ranks
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_pipelines import save_pipeline
from train.errors import UserError
from train.sample.ranks import Split

FOLDERS = {}


def folder_of(family, tmp_path_factory):
    if family not in FOLDERS:
        FOLDERS[family] = save_pipeline(family, tmp_path_factory.mktemp("ranks") / family)
    return FOLDERS[family]


@pytest.mark.parametrize(
    ("world", "changes", "shares"),
    [
        (2, {}, [(0, None), (1, None)]),
        (2, {"split_guidance": "false"}, [(0, 0), (0, 1)]),
        (2, {"guidance": 1}, [(0, 0), (0, 1)]),
        (4, {}, [(0, 0), (0, 1), (1, 0), (1, 1)]),
    ],
)
def test_wan(world, changes, shares, tmp_path_factory):
    compare("wan", world, {"dense_steps": 1, "dense_layers": 1, "decay": 0.4, **changes}, shares, tmp_path_factory)


def compare(family, world, changes, shares, tmp_path_factory):
    folder = folder_of(family, tmp_path_factory)
    expected = sample_ranks.clip(folder, {**changes, "split_guidance": None})["latent"].numpy()
    ranks = run_ranks(world, sample_ranks.clip, folder, changes)
    assert [(rank["branch"], rank["share"]) for rank in ranks] == shares
    for rank in ranks:
        np.testing.assert_allclose(rank["latent"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_tasks_of_an_srun_are_one_run():
    """With what SLURM sets for two tasks of a step, and nothing of torchrun's."""
    program = "from train.sample.ranks import Ranks; r = Ranks.join(); print(r.world, r.rank, r.share(f'of {r.rank}'))"
    bare = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "3", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "127.0.0.1"}
    started = []
    for task in ("0", "1"):
        environment = {**bare, **step, "SLURM_PROCID": task, "SLURM_LOCALID": task}
        started.append(
            subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, encoding="utf-8")
        )
    assert [process.communicate(timeout=300)[0] for process in started] == ["2 0 of 0\n", "2 1 of 0\n"]


@pytest.mark.parametrize(
    ("world", "size", "guidance", "guided", "heads", "message"),
    [
        (2, 4, None, True, 4, "sequence is 4 on 2 ranks, expected 1 or 2"),
        (4, 4, True, True, 4, "sequence is 4 on 4 ranks, expected 2"),
        (3, None, True, True, 3, "sequence is 3 on 3 ranks, expected an even number"),
        (2, None, True, False, 2, "split_guidance is true, but guidance is off"),
        (6, None, None, True, 4, "sequence is 3, expected a divisor of the model's 4 heads: 1, 2, 4"),
    ],
)
def test_splits_that_cannot_be(world, size, guidance, guided, heads, message):
    with pytest.raises(UserError, match=message):
        Split.of(world, 0, size, guidance, guided, heads)
