"""The default run, as a newcomer starts it, in three seeds: minutes each."""

import json
import subprocess
import sys

import pytest
from PIL import Image


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_tuned_model_beats_the_untuned_one_at_4x(tmp_path, seed):
    """Under either attention: paired over 32 held-out clips, the interval of the difference excludes zero."""
    done = subprocess.run(
        [sys.executable, "-m", "train", f"seed={seed}", f"runs={tmp_path}"], capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    folder = next((tmp_path / "shapes_4x").iterdir())
    rows = {row["name"]: row for row in json.loads((folder / "report.json").read_text(encoding="utf-8"))}
    untuned = ["base, dense", "base, released"]
    assert [name for name, row in rows.items() if row["frames"] == 64] == [*untuned, "released + LoRA"]
    for name in untuned:
        gain = rows[name]["tuned_minus_this"]
        assert len(rows[name]["losses"]) >= 32
        assert gain["mean"] + gain["half_width_95"] < 0, f"{name}: {gain}"
        print(f"seed {seed}, {name}: {gain['mean']:+.4f} ± {gain['half_width_95']:.4f}")
    assert rows["released + LoRA"]["attention_gflops"] < rows["base, dense"]["attention_gflops"]
    with Image.open(folder / "clips.gif") as animation:
        assert animation.n_frames == 64
