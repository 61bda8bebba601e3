"""Predictions beside measurements: the command, and the plan's own targets on every measured file there is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from radial.errors import Mistake
from train.bench.compare import cases, main
from train.errors import UserError

MEASURED = sorted((Path(__file__).parent / "measured").glob("*.json"))
"""Files of ``python -m train.bench --json`` from GPUs; the README shows their comparison."""

PARTS = {"copies": 0.0, "attention": 4.1, "linear": 1.4, "communication": 0.0, "other": 0.5, "waiting": 0.1}
RESULT = {
    "pattern": "released",
    "sp": 1,
    "layers": 2,
    "tokens": 291_600,
    "device": "NVIDIA H200",
    "first_step": 90,
    "compile": 60.0,
    "step": 6.1,
    "layer": 3.05,
    "parts": PARTS,
    "memory": 60.0,
    "tflops": 1.0,
    "mfu": 0.5,
}


def written(tmp_path, *results, arguments=("frames=321", "trainer.compile=true", "parallel.activations=full")):
    file = tmp_path / "bench.json"
    about = {"torch": "2.11", "arguments": list(arguments), "cpu_memory": 2.0**37}
    file.write_text(json.dumps({**about, "results": list(results)}), encoding="utf-8")
    return file


def test_the_comparison(tmp_path, capsys):
    other = {**RESULT, "pattern": "dense", "sp": 2, "memory": 30.0, "step": 14.0}
    file = written(tmp_path, RESULT, other, {**RESULT, "device": "cpu"})
    ours, dense = cases(file)
    assert ours.memory_off == pytest.approx(ours.predicted_memory / 60 - 1)
    assert ours.seconds_off == pytest.approx(ours.predicted_seconds / 6.1 - 1)
    assert 0.4 < ours.predicted_memory / dense.predicted_memory / 2 < 1  # the second shares the clip
    assert dense.predicted_seconds > 1.5 * ours.predicted_seconds
    assert dense.predicted_parts["communication"] > 0 == ours.predicted_parts["communication"]
    main([str(file)])
    out = capsys.readouterr().out
    assert out.count("\n| released, 2 layers, 291,600 tokens, 1 GPU, full, compiled | 60.0 |") == 1
    assert "seconds measured (predicted): attention 4.1 (" in out


def test_a_chosen_policy_is_the_one_that_ran(tmp_path):
    """Another calibration, or another machine, may choose otherwise."""
    auto = ("frames=321", "trainer.compile=true", "parallel.activations=auto")
    ran = [{"names": ["full", last], "offload": 2.0**30} for last in ("full", "selective")]
    full, mixed = cases(written(tmp_path, *({**RESULT, "chosen": chosen} for chosen in ran), arguments=auto))
    assert "1 GPU, full, compiled" in full.name and "1 GPU, 1 full + 1 selective, compiled" in mixed.name
    assert mixed.predicted_seconds < full.predicted_seconds


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "bench.json: not a file of python -m train.bench --json"),
        ("{}", "not a file of python -m train.bench"),
        (json.dumps({"arguments": [], "cpu_memory": 1, "results": [{**RESULT, "device": "cpu"}]}), "nothing in it was"),
    ],
)
def test_files_that_are_none(tmp_path, content, message):
    file = tmp_path / "bench.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        main([str(file)])


def test_no_file_is_given():
    with pytest.raises(Mistake, match="files is not set, give it"):
        main([])


def test_there_are_measurements():
    assert len(MEASURED) >= 4


@pytest.mark.parametrize("file", MEASURED, ids=lambda file: file.stem)
def test_predictions_hold(file):
    """Within 15 % of the measured memory and 25 % of the measured time."""
    for case in cases(file):
        assert abs(case.memory_off) < 0.15, case
        assert abs(case.seconds_off) < 0.25, case


@pytest.mark.parametrize(("of_released", "share"), [("0.6", 0.0978), ("0.4", 0.0652)])
def test_predictions_hold_for_masks_of_each_head(tmp_path, of_released, share):
    masks = tmp_path / "masks.safetensors"
    fit = [sys.executable, "-m", "radial", "fit", "known=wan_4x", "layers=2", f"share={share}", f"out={masks}"]
    subprocess.run(fit, check=True, capture_output=True)
    measured = MEASURED[0].parent.with_name("measured_fitted") / f"h200_321_{of_released}.json"
    content = measured.read_text(encoding="utf-8")
    file = tmp_path / "measured.json"
    file.write_text(content.replace("masks.safetensors", str(masks)), encoding="utf-8")
    (case,) = cases(file)
    assert abs(case.memory_off) < 0.10 and abs(case.seconds_off) < 0.10, case
