"""Evaluating runs: rows against the run's own validation, intervals, clips, what is missing, stopping and going on."""

import csv
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, save_file

from data.synth.clips import synthesize
from radial.patterns.ultravico import UltraViCo
from train.errors import UserError
from train.evaluate.alignment import TextAlignment
from train.evaluate.model import EvaluatedModel
from train.evaluate.results import Row, cells, tuned_of
from train.evaluate.run import run_evaluation
from train.evaluate.settings import Job, Settings, variants
from train.loggers.csv_file import read_metrics
from train.measures.losses import Interval
from train.storage.run_folder import RunFolder

FRAMES = {"model__native_frames": 4, "clip__frames": 16, "clip__width": 32, "model__longer": "{2x: 8, 4x: 16}"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny run of 16 frames, four times its model's own length, validated at its end."""
    from tests.helpers.tiny import run_config
    from train.run import train

    root = tmp_path_factory.mktemp("evaluated")
    config = run_config(root, validation__every=4, validation__clips=3, lora__rank=2, trainer__steps=4, **FRAMES)
    folder = RunFolder.create(config)
    train(config, folder)
    return folder.path


def job(run, tmp_path, **changes):
    given = {"held_out": 3, "clips": 1, "steps": 1, "lengths": "1,4", "out": tmp_path / "out", **changes}
    return Job.of(Settings(run=run, **given))


@pytest.fixture(scope="module")
def evaluated(run, tmp_path_factory):
    one = job(run, tmp_path_factory.mktemp("results"))
    return one, run_evaluation(one)


def results(of):
    return json.loads((of.out / "results.json").read_text(encoding="utf-8"))


def test_the_tuned_rows_losses_are_those_of_the_runs_validation(run, evaluated):
    last = read_metrics(run / "metrics.csv")[-1]
    for row in results(evaluated[0])["rows"]:
        if row["tuned"]:
            for level, found in row["by_noise_level"].items():
                logged = float(last[f"validation/{row['frames']}_frames/sigma_{level}"])
                assert found["loss"]["mean"] == pytest.approx(logged, rel=1e-5)


def test_rows_lengths_and_what_is_missing(evaluated):
    one, text = evaluated
    found = results(one)
    names = ["held-out clips", "base, released", "base, dense", "tuned, released"]
    assert [(row["name"], row["times"]) for row in found["rows"]] == [(n, t) for t in (1, 4) for n in names]
    assert found["not_measured"] == [
        "text alignment is not measured: clip= is not set, expected the folder of a CLIP of transformers"
    ]
    assert "* text alignment is not measured" in text
    for row in found["rows"]:
        truth = row["name"] == "held-out clips"
        assert (row["loss"] is None) == truth
        assert len(row["measures_of_clips"]) == (3 if truth else 1)
        assert row["text_alignment"] is None
    dense, tuned = found["rows"][6:]
    assert dense["attention_gflops"] > tuned["attention_gflops"] > 0


def test_differences_are_paired_over_clips(evaluated):
    found = {(row["name"], row["times"]): row for row in results(evaluated[0])["rows"]}
    tuned, base = found["tuned, released", 4], found["base, dense", 4]
    level = list(base["by_noise_level"])[2]
    pairs = zip(tuned["losses"], base["losses"], strict=True)
    expected = Interval.of([mine[2] - its[2] for mine, its in pairs])
    assert base["by_noise_level"][level]["tuned_minus_this"] == {"mean": expected.mean, "half_width_95": expected.half}
    assert tuned["tuned_minus_this"] is None


def test_the_files_that_other_tools_read(evaluated):
    one, _ = evaluated
    with (one.out / "results.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [row["row"] for row in table[:2]] == ["held-out clips", "base, released"]
    assert float(table[1]["loss"]) > 0 and table[0]["loss"] == ""
    folders = sorted(path.name for path in (one.out / "clips").iterdir() if path.is_dir())
    assert folders == [f"{name}-{t}x" for name in ("base-dense", "base-released", "tuned-released") for t in (1, 4)]
    for name in folders:  # what VBench's custom_input mode reads: videos alone, and a prompt for each
        videos = sorted(path.name for path in (one.out / "clips" / name).iterdir())
        prompts = json.loads((one.out / "clips" / f"{name}.json").read_text(encoding="utf-8"))
        assert list(prompts) == videos and all(video.endswith(".mp4") for video in videos)
    page = (one.out / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 6 and "Loss by noise level" in page


def test_what_is_there_is_not_made_again(evaluated, monkeypatch):
    one, text = evaluated
    monkeypatch.setattr("train.evaluate.run.EvaluatedModel", None)  # is not loaded
    assert run_evaluation(one) == text
    with pytest.raises(UserError, match=r"has results of another evaluation \(seed was 0, now 1\): give another out"):
        run_evaluation(replace(one, given=replace(one.given, seed=1)))


def test_another_base_is_another_evaluation(evaluated):
    one, _ = evaluated
    file = Path(one.config.model.path) / "diffusion_pytorch_model.safetensors"
    before = file.read_bytes()
    try:
        save_file({name: -tensor for name, tensor in load(before).items()}, file)
        with pytest.raises(UserError, match=r"has results of another evaluation \(base was 1 files .*, now 1 files"):
            run_evaluation(one)
    finally:
        file.write_bytes(before)


def test_clips_of_the_same_keys_are_other_clips(run, tmp_path):
    """As synthetic clips of another length or seed are: what is finished of one is not taken for the other's."""
    found = []
    for seed, out in ((1, "out"), (2, "out"), (2, "fresh")):
        shards = synthesize(tmp_path / f"seed-{seed}", 3, 16, 32, 32, seed).home
        one = job(run, tmp_path, against=None, lengths="1", clips=0, shards=str(shards), out=tmp_path / out)
        run_evaluation(one)
        found.append(results(one)["rows"][-1]["losses"])
    assert found[0] != found[1] == found[2]


def test_two_patterns_of_one_name_are_two_rows(run, tmp_path):
    one = job(run, tmp_path, against="base,local")
    local = replace(one.config.attention, pattern="local", reach=1.0)
    found = variants(replace(one.config, attention=local), "base,local,dense")
    names = [variant.name for variant in found]
    assert names == ["base, local", "base, local as it is by default", "base, dense", "tuned, local"]
    later = variants(replace(one.config, attention=local), "local")[0], variants(one.config, "local")[0]
    assert later[0] == found[1] and later[1].what not in {variant.what for variant in found}


def test_clips_of_a_model_that_has_diverged_are_not_measured(run, tmp_path, monkeypatch):
    monkeypatch.setattr("train.evaluate.clips.generate", lambda *_, **__: torch.full((1, 3, 4, 32, 32), torch.nan))
    one = job(run, tmp_path, against=None, lengths="1", held_out=2)
    assert "clips of tuned, released at 1x are not measured: 1 of 1 have values that are not finite" in (
        run_evaluation(one)
    )


def test_a_control_has_the_base_models_velocity(run, tmp_path):
    one = job(run, tmp_path)
    model = EvaluatedModel(one)
    from train.models.loading import load_adapter

    plain = load_adapter(one.config.model, torch.float32, one.config.seed)
    base, _, tuned = one.variants
    x, sigma = torch.randn(1, 3, 4, 32, 32), torch.tensor([0.5])
    conditions = plain.random_conditions(x)
    plain.set_attention(model.attention(base, x, 0.5))
    model.adapter.set_attention(model.attention(base, x, 0.5))
    with torch.no_grad():
        expected = plain.velocity(x, sigma, conditions)
        model.put(base)
        torch.testing.assert_close(model.adapter.velocity(x, sigma, conditions), expected)
        model.put(tuned)
        assert (model.adapter.velocity(x, sigma, conditions) - expected).abs().max() > 1e-6


def test_ultravico_is_a_row_without_training(run, tmp_path):
    one = job(run, tmp_path, against="dense,ultravico", lengths="1,4", held_out=2, clips=0)
    pattern = one.variants[1].pattern
    assert pattern == UltraViCo(4.0)  # latent frames of the model's own length
    run_evaluation(one)
    found = {(row["name"], row["times"]): row["losses"] for row in results(one)["rows"]}
    assert not np.allclose(found["base, ultravico", 4], found["base, dense", 4], rtol=1e-6)


def test_a_lora_file_stands_for_the_runs_own(run, tmp_path, evaluated):
    file = run / "export" / "diffusers"
    one = job(run, tmp_path, lora=str(file), against=None, lengths="1", clips=0)
    run_evaluation(one)
    (mine,) = [row for row in results(one)["rows"] if row["tuned"]]
    own = next(row for row in results(evaluated[0])["rows"] if row["tuned"])
    assert np.allclose(mine["losses"], own["losses"], rtol=1e-4)


def test_prompts_of_a_file_and_a_length_that_no_held_out_clip_has(run, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a red ball\n\na red ball\na blue star, it's here\n", encoding="utf-8")
    one = job(run, tmp_path, prompts=file, against=None, lengths="1", shards=None)
    assert one.prompts == ("a red ball", "a blue star, it's here")
    run_evaluation(one)
    prompts = json.loads((one.out / "clips" / "tuned-released-1x.json").read_text(encoding="utf-8"))
    assert prompts == {"0001-a-red-ball.mp4": "a red ball", "0002-a-blue-star-it-s-here.mp4": "a blue star, it's here"}
    file.write_text("a green box\n", encoding="utf-8")
    run_evaluation(job(run, tmp_path, prompts=file, against=None, lengths="1", shards=None))
    folder = one.out / "clips" / "tuned-released-1x"
    prompts = json.loads(folder.with_suffix(".json").read_text(encoding="utf-8"))
    assert sorted(prompts) == sorted(video.name for video in folder.iterdir())  # VBench wants a prompt for each
    assert len(prompts) == 3 and prompts["0001-a-green-box.mp4"] == "a green box"


def test_masks_that_were_replaced_since_the_training_are_refused(run, tmp_path):
    inputs = run / "inputs.json"
    before = inputs.read_text(encoding="utf-8") if inputs.exists() else None
    inputs.write_text(json.dumps({**json.loads(before or "{}"), "masks": "0123"}), encoding="utf-8")
    try:
        with pytest.raises(UserError, match="the run trained under 0123: put it back"):
            run_evaluation(job(run, tmp_path))
    finally:
        inputs.write_text(before or "{}", encoding="utf-8")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": "0"}, "lengths is '0', expected multiples of the model's own length such as 1,2,4"),
        ({"against": "bas"}, "against has 'bas': pattern is 'bas', expected one of .*, ultravico or base"),
        ({"lora": "a.safetensors,b.safetensors"}, "expected one file, with :strength if wanted"),
    ],
)
def test_refusals(run, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        job(run, tmp_path, **changes)


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.yaml"):
        job(tmp_path, tmp_path)


def test_a_clip_of_transformers_scores_text(tmp_path):
    folder = save_clip(tmp_path / "clip")
    scorer = TextAlignment(folder)
    frames = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), dtype=np.uint8)
    score = scorer.score(frames, "a red ball " * 50)
    assert -1 <= score <= 1
    single = [scorer.score(frame[None], "a red ball " * 50) for frame in frames]
    assert score == pytest.approx(sum(single) / 3, abs=1e-5)
    with pytest.raises(UserError, match=r"no config\.json, expected the folder of a CLIP"):
        TextAlignment(tmp_path)


def save_clip(folder):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    torch.manual_seed(0)
    side = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**side, "vocab_size": 600, "max_position_embeddings": 16, "eos_token_id": 1, "bos_token_id": 0}
    config = CLIPConfig(text_config=text, vision_config={**side, "image_size": 16, "patch_size": 8}, projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16).save_pretrained(folder)
    letters = [chr(code) for code in range(33, 127)]
    names = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({n: i for i, n in enumerate(names)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    return folder


def test_rows_of_one_clip_have_no_interval():
    row = Row("tuned", 1, 16, tuned=True, alignment=[0.5])
    assert cells([row])[1][-1] == "0.500"
    assert tuned_of([row], 1) is row


@pytest.mark.slow
def test_a_signal_ends_it_within_a_step_and_the_command_goes_on(run, tmp_path):
    """SIGTERM while losses are measured; the same command then makes what was left."""
    out = tmp_path / "out"
    line = [sys.executable, "-m", "train.evaluate", f"run={run}", f"out={out}", "held_out=8", "clips=0", "lengths=1"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    parts = out / "parts"
    while process.poll() is None and len(list(parts.glob("*.json"))) < 2:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 128 + signal.SIGTERM
    left = {path.name: path.stat().st_mtime_ns for path in parts.iterdir() if not path.name.startswith(".")}
    assert not (out / "results.json").exists()
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=600)
    assert (out / "report.html").exists()
    assert all((parts / name).stat().st_mtime_ns == when for name, when in left.items())
