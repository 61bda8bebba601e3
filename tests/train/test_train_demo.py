"""The default run, as a newcomer starts it, in three seeds: minutes each."""

import json
import subprocess
import sys

import pytest
from PIL import Image


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_tuned_model_beats_the_dense_base_at_4x(tmp_path, seed):
    """Against the base with its own, dense attention: paired over 32 held-out clips, the interval excludes zero."""
    done = subprocess.run(
        [sys.executable, "-m", "train", f"seed={seed}", f"runs={tmp_path}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    folder = next((tmp_path / "shapes_4x").iterdir())
    rows = {row["name"]: row for row in json.loads((folder / "report.json").read_text())}
    assert [name for name, row in rows.items() if row["frames"] == 64] == [
        "base, dense",
        "base, released",
        "released + LoRA",
    ]
    tuned, untuned = rows["released + LoRA"], rows["base, dense"]
    gain = untuned["tuned_minus_this"]
    assert len(untuned["losses"]) >= 32
    assert gain["mean"] + gain["half_width_95"] < 0
    # on this tiny model the mask alone repairs the base; the LoRA must at least not cost anything
    assert tuned["flow_loss"] < 1.01 * rows["base, released"]["flow_loss"]
    assert rows["released + LoRA"]["attention_gflops"] < rows["base, dense"]["attention_gflops"]
    with Image.open(folder / "clips.gif") as animation:
        assert animation.n_frames == 64
