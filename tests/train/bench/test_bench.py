"""``python -m train.bench`` on a tiny model: every figure is there, for one and for two processes."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from radial.errors import Mistake
from train.bench import case as cases
from train.bench.__main__ import main
from train.bench.case import Result
from train.bench.steps import case_of, config_of, speed_up
from train.config.check import validate

TINY = ["model=shapes_random", "frames=5", "clip.height=32", "clip.width=64", "attention.block=16", "steps=1"]


@pytest.mark.slow
def test_the_figures_of_a_step(tmp_path):
    counts = [1, 2]
    file = tmp_path / "bench.json"
    settings = [
        *TINY,
        "lora.rank=8",
        f"sp={','.join(map(str, counts))}",
        "pattern=released,dense",
        "trainer.precision=fp32",
    ]
    settings += ["parallel.activations=auto", "trainer.compile=false", "--json", str(file)]
    command = [sys.executable, "-m", "train.bench", *settings]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert re.findall(r"faster than dense with sp=(\d) \(2 dense layers measured\): released [\d.]+x", done.stdout) == [
        str(count) for count in counts
    ]
    assert done.stdout.count("  layers keep none\n") == len(counts)
    results = json.loads(file.read_text(encoding="utf-8"))["results"]
    assert [(row["pattern"], row["sp"]) for row in results] == [
        (pattern, sp) for sp in counts for pattern in ("released", "dense")
    ]
    for row in results:
        assert (row["tokens"], row["layers"]) == (5 * 8 * 16, 2)
        assert row["step"] == pytest.approx(2 * row["layer"])
        assert row["tflops"] > 0
        chosen = {"names": ["none", "none"], "offload": 0.0}  # this machine has room for all
        assert row["chosen"] == (chosen if row["pattern"] == "released" else None)
        assert row["compile"] == 0
        assert row["mfu"] is None
        assert set(row["parts"]) == {"copies", "attention", "linear", "communication", "other", "waiting"}
        assert row["parts"]["linear"] > 0
        assert row["parts"]["attention"] > 0
        assert (row["parts"]["communication"] > 0) == (row["sp"] == 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["layers=some"], "layers is 'some', expected a whole number"),
        (["frames=320"], "clip.frames is 320, expected 4 x k"),
        (["model=shapes"], "model=shapes has no dimensions"),
        (["conf=shapes_base"], "conf=shapes_base trains all weights"),
        (["parallel=zero3"], "parallel=zero3: leave it out"),
        (["data.batch_size=2"], "data.batch_size is 2, expected 1: steps of one clip"),
        (["objective.dense_teacher=0.1"], "objective.dense_teacher is 0.1, expected 0"),
        (["--json"], "--json needs a value"),
        (["pattern=spiral", *TINY], "attention.pattern is 'spiral'"),
    ],
)
def test_mistakes_stop_before_anything_runs(words, message):
    with pytest.raises(Mistake, match=message):
        main(words)


def test_a_full_memory_is_one_line(monkeypatch):
    def fill(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 22.77 GiB. GPU 0 has a total capacity of 1")

    monkeypatch.setattr(cases, "_rank", fill)
    monkeypatch.setattr(cases, "ProcessPoolExecutor", lambda count, mp_context: ThreadPoolExecutor(count))
    said = (
        r"^out of memory: .* Tried to allocate 22\.77 GiB\. It was pattern=released sp=1: parallel\.ffn_chunk=.* fits$"
    )
    with pytest.raises(Mistake, match=said):
        main([*TINY, "pattern=released"])


def test_the_baseline_is_dense_attention_with_full_checkpointing():
    moved = ["parallel.offload_activations=true", "parallel.offload_gib=20"]
    config = config_of(["parallel.activations=selective", *moved])
    dense, released = case_of(config, "dense"), case_of(config, "released")
    validate(dense), validate(released)
    assert (dense.parallel.activations, released.parallel.activations) == ("full", "selective")
    assert dense.attention.dense_layers == released.attention.dense_layers == 0
    assert config.attention.dense_layers == 2


def test_the_plan_beside_a_measured_step_is_of_one_clip_too():
    assert config_of(["conf=study_4x"]).data.batch_size == 1


def test_the_recipes_speed_up():
    """13.9 s and 2.6 s a layer: 5.3 times faster, and 4.4 times where 2 of 40 layers are dense."""
    about = {"sp": 1, "tokens": 1, "device": "", "first_step": 0, "compile": 0, "parts": {}, "memory": 0, "tflops": 0}
    dense = Result(pattern="dense", layers=4, step=55.6, layer=13.9, mfu=None, **about)
    released = Result(pattern="released", layers=40, step=104, layer=2.6, mfu=None, **about)
    told = speed_up(dense, released, 2, 40)
    assert "4 dense layers measured" in told
    assert "released 5.35x in every layer, with 2 of 40 dense 4.39x" in told
