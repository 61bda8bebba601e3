"""The default run, as a newcomer starts it, in three seeds: minutes each."""

import json
import subprocess
import sys

import pytest
from PIL import Image


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_tuning_buys_back_what_the_mask_costs(tmp_path, seed):
    """Positions are the same in every row. Tuned, the loss under the mask is below that of the untuned model under
    the mask and under as many random blocks, paired over the held-out clips; most of the mask's cost is gone."""
    done = subprocess.run(
        [sys.executable, "-m", "train", f"seed={seed}", f"runs={tmp_path}"], capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    folder = next((tmp_path / "shapes_4x").iterdir())
    rows = {row["name"]: row for row in json.loads((folder / "report.json").read_text(encoding="utf-8"))}
    untuned = ["base, dense", "base, released", "base, random"]
    assert [name for name, row in rows.items() if row["frames"] == 64] == [*untuned, "released + LoRA"]
    gains = {name: rows[name]["tuned_minus_this"] for name in untuned}
    print(f"seed {seed}: {gains}")
    for name in ("base, released", "base, random"):
        assert gains[name]["mean"] + gains[name]["half_width_95"] < 0, f"{name}: {gains[name]}"
    cost = rows["base, released"]["flow_loss"] - rows["base, dense"]["flow_loss"]
    assert rows["released + LoRA"]["flow_loss"] - rows["base, dense"]["flow_loss"] < cost / 4
    assert rows["released + LoRA"]["attention_gflops"] < rows["base, dense"]["attention_gflops"]
    with Image.open(folder / "clips.gif") as animation:
        assert animation.n_frames == 64
