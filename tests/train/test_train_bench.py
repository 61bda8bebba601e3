"""``python -m train.bench`` on a tiny model: every figure is there, for one and for two processes."""

import json
import os
import subprocess
import sys

import pytest

from train.bench import main
from train.errors import UserError

TINY = ["model=shapes_random", "frames=5", "clip.height=32", "clip.width=64", "attention.block=16", "steps=1"]


@pytest.mark.parametrize("counts", [[2], pytest.param([1, 2], marks=pytest.mark.slow)])
def test_the_figures_of_a_step(tmp_path, counts):
    file = tmp_path / "bench.json"
    settings = [
        *TINY,
        "lora.rank=8",
        f"sp={','.join(map(str, counts))}",
        "pattern=released,dense",
        "trainer.precision=fp32",
    ]
    settings += ["parallel.activations=selective", "trainer.compile=false", "--json", str(file)]
    command = [sys.executable, "-m", "train.bench", *settings]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("faster than dense with sp=") == len(counts)
    results = json.loads(file.read_text())["results"]
    assert [(row["pattern"], row["sp"]) for row in results] == [
        (pattern, sp) for sp in counts for pattern in ("released", "dense")
    ]
    for row in results:
        assert (row["tokens"], row["blocks"]) == (5 * 8 * 16, 2)
        assert row["step"] == pytest.approx(2 * row["block"])
        assert row["tflops"] > 0
        assert row["compile"] == 0
        assert row["mfu"] is None
        assert set(row["parts"]) == {"copies", "attention", "linear", "communication", "other", "waiting"}
        assert row["parts"]["linear"] > 0
        assert row["parts"]["attention"] > 0
        assert (row["parts"]["communication"] > 0) == (row["sp"] == 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["blocks=some"], "blocks is 'some', expected a whole number"),
        (["frames=320"], "clip.frames is 320, expected 4 x k"),
        (["model=shapes"], "model=shapes has no dimensions"),
        (["--json"], "--json needs a file name"),
        (["pattern=spiral", *TINY], "attention.pattern is 'spiral'"),
    ],
)
def test_mistakes_stop_before_anything_runs(words, message):
    with pytest.raises(UserError, match=message):
        main(words)
