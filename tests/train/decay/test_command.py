"""``python -m train.decay``, whole."""

import itertools
import json
import math
import re
import shutil
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from data.shards.batch import collate
from data.shards.manifest import Manifest
from data.shards.origins import held_out
from data.shards.stream import read_samples
from data.shards.writer import ShardWriter
from radial import Dense, RadialError, Released, VideoGrid, build_layout
from radial.fit import fit
from tests.helpers.families import shards
from tests.helpers.tiny import save_model
from train.attention.recipe import AttentionRecipe
from train.decay import measure as measuring
from train.decay.__main__ import main
from train.decay.advice import settings
from train.decay.capture import observed
from train.decay.kept import attention_of, dense_attention, output_errors
from train.decay.results import Velocity
from train.decay.run import sampler_levels
from train.decay.settings import Job
from train.errors import UserError
from train.flow import noise_like, noised
from train.models.conditions import Conditions
from train.models.families import ADAPTERS
from train.models.loading import load_adapter

TOKENS = (4, 5, 6)


def command(tmp_path, family="wan", **changes):
    """A command line for the family's tiny model on four clips."""
    settings = shards(family, tmp_path, TOKENS)
    frames = settings["clip.frames"]
    own = {
        "frames": int(frames) // int(json.loads(settings["model.patch"])[0]) if family in ADAPTERS else frames,
        "clips": 2,
        "sigmas": "0.4,0.8",
        "attention": "radial,dense",
        "decays": 1,
        "dense_layers": "0,1",
        "rows": 2,
        "out": tmp_path / "decay",
    }
    settings = {key: value for key, value in settings.items() if key not in ("attention.dense_layers",)}
    return [f"{key}={value}" for key, value in {**settings, **own, "trainer.precision": "fp32", **changes}.items()]


def results(tmp_path):
    return json.loads((tmp_path / "decay" / "decay.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("family", sorted(ADAPTERS))
def test_every_family(tmp_path, family, capsys):
    main(command(tmp_path, family))
    found = results(tmp_path)
    about = found["about"]
    adapter_layers, heads, sigmas = len(about["layers"]), about["heads"], [0.4, 0.8]
    assert len(found["heads"]) == adapter_layers * heads * 2 and about["clips"] == ["clip-0", "clip-1"]
    joint = bool(about["grid"]["text_tokens"])
    for row in found["heads"]:
        kept = row["patterns"]["radial, decay 1"]
        assert row["kind"] in ("spatial", "temporal", "sink", "mixed")
        assert 0 < kept["kept"] <= 1 and kept["l1"] == pytest.approx(2 * (1 - kept["kept"]))
        dense = row["patterns"]["dense"]
        assert dense["kept"] == pytest.approx(1, abs=1e-5) and dense["output_error"] < 1e-5
        assert (row["text"] > 0) == joint == (row["text_on_video"] > 0)
    assert {(v["pattern"], v["dense_layers"], v["sigma"]) for v in found["velocity"]} == {
        (pattern, layers, sigma) for pattern in ("radial, decay 1", "dense") for layers in (0, 1) for sigma in sigmas
    }
    assert all(v["mean"] < 1e-5 for v in found["velocity"] if v["pattern"] == "dense")
    with safe_open(tmp_path / "decay" / "decay.safetensors", "pt") as file:
        assert json.loads(file.metadata()["about"]) == about
        tiles, frames = about["tiles"], about["grid"]["frames"]
        mass, sink, text = (file.get_tensor(f"sigma_0.4/layer_0/{name}") for name in ("mass", "sink", "text_keys"))
        assert mass.shape == (heads, 2 * frames - 1, tiles, tiles) and sink.shape == (heads, frames, tiles, tiles)
        pairs = torch.tensor([*range(frames - 1), frames - 1, *range(frames - 1, 0, -1)]).float()
        share = (mass.sum(-1) * pairs[:, None]).sum(1) / frames + sink.sum(-1).mean(1) + text
        assert torch.allclose(share, torch.ones_like(share), atol=1e-4)  # each query's attention, whole
        assert file.get_tensor("sigma_0.8/joint").shape[:3] == (adapter_layers, heads, frames - 1)
    page = (tmp_path / "decay" / "decay.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 4 and not re.search(r'(src|href)="(?!data:|#)', page)
    out = capsys.readouterr().out
    assert all(sentence in out for sentence in found["advice"])


def test_what_a_pattern_changes(tmp_path):
    """The errors of output and velocity, against forwards made by hand and attention by a masked softmax."""
    words = command(tmp_path, "wan", clips=1, sigmas=0.6, layers=1, attention="radial")
    main(words)
    job = Job.of(words)
    adapter = load_adapter(job.config.model, torch.float32, 0)
    adapter.transformer.eval()
    (clip,) = read_samples(Manifest.load(job.config.data.shards), 1)
    batch, level = collate([clip], 0), torch.tensor([0.6])
    x, _ = noised(batch.latent, noise_like(batch.latent, 0, "decay", clip.key), level)
    grid, seen = adapter.grid(x), {}
    with torch.no_grad():
        adapter.set_attention(dense_attention(grid))
        with observed(adapter, [1], seen.__setitem__):
            dense = adapter.velocity(x, level, Conditions.of(batch))
        adapter.set_attention(AttentionRecipe(Released(), block=16, dense_layers=1).step(grid, dense=False))
        other = adapter.velocity(x, level, Conditions.of(batch))
    found = results(tmp_path)
    (velocity,) = [v["mean"] for v in found["velocity"] if v["dense_layers"] == 1]
    assert velocity == pytest.approx(float((other - dense).norm() / dense.norm()), rel=1e-4)
    assert list(seen) == [1] and {row["layer"] for row in found["heads"]} == {1}
    attended, layout = seen[1], build_layout(Released(), grid, 16)
    q, k, v = (t.double().transpose(0, 1) for t in (attended.q, attended.k, attended.v))
    scores = q @ k.transpose(1, 2) * q.shape[2] ** -0.5
    mask = layout.mask().repeat_interleave(16, 0).repeat_interleave(16, 1)[: grid.tokens, : grid.tokens]
    exact, kept = scores.softmax(-1) @ v, scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v
    assert torch.allclose(exact.transpose(0, 1).float(), attended.out, atol=1e-5)
    error = (kept - exact).norm(dim=(1, 2)) / exact.norm(dim=(1, 2))
    assert torch.allclose(output_errors(attended, layout).double(), error, rtol=1e-4)
    given = [row["patterns"]["radial, decay 1"]["output_error"] for row in found["heads"]]
    assert given == pytest.approx(error.tolist(), rel=1e-4)


@pytest.mark.parametrize("own", [["attention=temporal,spatial"], ["attention=random", "attention.per_head=true"]])
def test_rivals(tmp_path, own):
    """Patterns with an order of tokens of their own, and with masks that differ by head."""
    main([word for word in command(tmp_path, clips=1, sigmas=0.6, dense_layers=0) if word[:10] != "attention="] + own)
    for row in results(tmp_path)["heads"]:
        assert all(0 < of["kept"] < 1 and of["output_error"] > 0 for of in row["patterns"].values())
    assert all(velocity["mean"] > 0 for velocity in results(tmp_path)["velocity"])


def test_fitted_masks_are_held_against_dense_attention(tmp_path):
    """Beside random ones that differ by head; masks that lack a layer are refused before anything is measured."""
    words = command(tmp_path, clips=1, sigmas=0.6, dense_layers=0, attention="random")
    main(words)
    masks, few = tmp_path / "mine.safetensors", tmp_path / "few.safetensors"
    fit(tmp_path / "decay" / "decay.safetensors", masks, share=0.6, dense_layers=0)
    fit(tmp_path / "decay" / "decay.safetensors", few, share=0.6, dense_layers=1)
    other = [word for word in words if not word.startswith("out=")] + [f"out={tmp_path / 'other'}"]
    with pytest.raises(RadialError, match="masks are fitted for layers 1 to 2, layer 0 has none"):
        main([*other, f"masks={few}"])
    assert not (tmp_path / "other").exists()
    main([*other, "attention.per_head=true", f"masks={masks}"])
    found = json.loads((tmp_path / "other" / "decay.json").read_text(encoding="utf-8"))
    assert {velocity["pattern"] for velocity in found["velocity"]} == {"random", "fitted, mine"}
    for row in found["heads"]:
        mine = row["patterns"]["fitted, mine"]
        assert 0 < mine["kept"] < 1 and mine["output_error"] > 0


def test_the_models_own_samples(tmp_path, monkeypatch):
    """Generated once from the clips' prompts, by Euler steps under dense attention, and measured as real clips are."""
    words = command(tmp_path, sigmas=0.6, layers=1, clips_from="samples", **{"validation.samples_steps": 2})
    own = [*words, "validation.samples_guidance=3"]
    main(own)
    found = results(tmp_path)
    assert found["about"]["clips_from"] == "samples"
    job = Job.of(own)
    adapter = load_adapter(job.config.model, torch.float32, 0)
    adapter.transformer.eval()
    shards = Manifest.load(job.config.data.shards)
    clip = next(iter(read_samples(shards, 1)))
    batch, level = collate([clip], 0), torch.tensor([0.6])
    x = noise = noise_like(batch.latent, 0, "decay samples", clip.key)
    grid, empty = adapter.grid(x), Conditions.of(batch.with_prompt([0], shards.load_empty_prompt()))
    levels = [*adapter.noise_levels(2, job.config.shift()), 0.0]
    with torch.no_grad():
        adapter.set_attention(dense_attention(grid))
        for now, then in itertools.pairwise(levels):
            with_caption, without = (
                adapter.velocity(x, torch.tensor([now]), of) for of in (Conditions.of(batch), empty)
            )
            x = x + (then - now) * (without + 3 * (with_caption - without))
        x, _ = noised(x, noise_like(noise, 0, "decay", clip.key), level)
        velocities = []
        for recipe in (AttentionRecipe(Dense()), AttentionRecipe(Released(), block=16, dense_layers=1)):
            adapter.set_attention(recipe.step(grid, dense=False))
            velocities.append(adapter.velocity(x, level, Conditions.of(batch)))
    dense, other = velocities
    (velocity,) = [v for v in found["velocity"] if (v["pattern"], v["dense_layers"]) == ("radial, decay 1", 1)]
    assert velocity["clips"][0] == pytest.approx(float((other - dense).norm() / dense.norm()), rel=1e-3)
    damaged = min((tmp_path / "decay" / "parts").glob("sample-*.safetensors"))
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1])
    main(own)  # makes it anew
    assert damaged.read_bytes() == whole and results(tmp_path) == found
    monkeypatch.setattr("train.decay.samples.generate", None)
    main(own)  # finds them
    assert results(tmp_path) == found


def test_positions_of_another_native_length_are_measured_anew(tmp_path):
    """Parts of interpolated positions follow from the length that these are interpolated to."""
    words = command(tmp_path, clips=1, sigmas=0.6, layers=0, attention="radial", dense_layers=0, rope="interpolate")
    first = []
    for native in (2, 3):
        main([*words, f"model.native_frames={native}"])
        first.append(results(tmp_path)["heads"][0]["alpha"])
    assert first[0] != first[1] and len(list((tmp_path / "decay" / "parts").iterdir())) == 2


@pytest.mark.slow
def test_a_stopped_command_goes_on(tmp_path, monkeypatch):
    """Finished parts are not measured again, also when clips are added, damaged ones are; results are the same."""
    words = command(tmp_path)
    measured = []
    original = measuring.layer_masses
    limit = [3]  # layers: in the middle of the second part

    def counted(*arguments):
        if len(measured) == limit[0] + 2:
            raise KeyboardInterrupt
        measured.append(1)
        return original(*arguments)

    monkeypatch.setattr("train.decay.measure.layer_masses", counted)
    with pytest.raises(KeyboardInterrupt):
        main(words)
    parts = tmp_path / "decay" / "parts"
    assert len(list(parts.iterdir())) == 1 and not (tmp_path / "decay" / "decay.json").exists()
    limit[0] = 10**6
    measured.clear()
    main(words)
    assert len(measured) == 3 * 3  # three parts of three layers
    first = results(tmp_path)
    measured.clear()
    main([word for word in words if not word.startswith("clips=")] + ["clips=3"])
    assert len(measured) == 2 * 3
    damaged = min(parts.iterdir(), key=lambda part: part.stat().st_mtime)  # the first clip's first
    damaged.write_bytes(damaged.read_bytes()[:100])
    main(words)
    assert len(measured) == 3 * 3 and results(tmp_path) == first
    main([word for word in words if not word.startswith("out=")] + [f"out={tmp_path / 'other'}"])
    assert json.loads((tmp_path / "other" / "decay.json").read_text(encoding="utf-8")) == first
    whole, again = (safetensors.torch.load_file(tmp_path / name / "decay.safetensors") for name in ("decay", "other"))
    assert all(whole[name].equal(again[name]) for name in whole)


def test_clips_that_are_held_out_are_not_measured(tmp_path):
    words = dict(word.split("=", 1) for word in command(tmp_path, clips=1, sigmas=0.6))
    given = Manifest.load(words["data.shards"])
    about = {name: getattr(given, name) for name in ("fps", "encoder", "latent", "text")}
    about |= {"arguments": {}, "empty_prompt": given.load_empty_prompt()}
    with ShardWriter(tmp_path / "named", **about) as writer:
        for sample in read_samples(given):
            writer.write(replace(sample, meta={**sample.meta, "source": f"{sample.key}.mp4"}))
    words |= {"data.shards": str(tmp_path / "named")}
    main([f"{key}={value}" for key, value in words.items()])
    assert results(tmp_path)["about"]["clips"] == ["clip-0"]
    words |= {"data.holdout": "1", "out": str(tmp_path / "rest")}
    (held,) = held_out([Manifest.load(tmp_path / "named")], 1)
    first = min(set(range(len(given.samples))) - held)
    main([f"{key}={value}" for key, value in words.items()])
    found = json.loads((tmp_path / "rest" / "decay.json").read_text(encoding="utf-8"))
    assert found["about"]["clips"] == [f"clip-{first}"]
    words |= {"clips": str(len(given.samples))}
    with pytest.raises(UserError, match=f"{len(given.samples) - len(held)} clips of one size"):
        main([f"{key}={value}" for key, value in words.items()])


def test_other_weights_are_measured_anew(tmp_path):
    words = command(tmp_path, clips=1, sigmas=0.6)
    main(words)
    file = next((tmp_path / "model").glob("*.safetensors"))
    weights = safetensors.torch.load_file(file)
    safetensors.torch.save_file({name: tensor * 1.5 for name, tensor in weights.items()}, file, {"format": "pt"})
    before = results(tmp_path)
    main(words)
    assert results(tmp_path)["velocity"] != before["velocity"]


def test_another_weight_of_guidance_is_measured_anew(tmp_path):
    found = []
    for weight in (1, 6):
        main(command(tmp_path, family="hunyuan", clips=1, sigmas=0.6, **{"objective.guidance": weight}))
        found.append(results(tmp_path)["velocity"])
        shutil.rmtree(tmp_path / "shards")
        shutil.rmtree(tmp_path / "model")
    assert found[0] != found[1]


def test_a_velocity_that_is_no_number_is_not_near_dense_attentions(tmp_path):
    job = Job.of(command(tmp_path, attention="radial", dense_layers=0))

    def found(*errors):
        measured = [
            Velocity("radial, decay 1", 0, sigma, [error]) for sigma, error in zip(job.sigmas, errors, strict=True)
        ]
        return settings(job, measured, VideoGrid(*TOKENS), (3, 2, 8), 1.0, [0.9, 0.5, 0.1])

    (one,) = found(0.01, math.nan)
    assert (one.dense_sigma, one.error) == (pytest.approx(0.6), 0.01)
    assert found(math.nan, math.nan) == []


@pytest.mark.parametrize(("expert", "noisy"), [("null", 5), ("high", 3), ("low", 2)])
def test_dense_steps_are_those_of_the_whole_sampler(tmp_path, expert, noisy):
    """The first, at pure noise, too; and those of the expert for high noise levels where the other is measured."""
    given = {"model.steps": 10, "model.expert": expert, "model.boundary": "null" if expert == "null" else 0.85}
    job = Job.of(command(tmp_path, attention="radial", dense_layers=0, sigmas="0.6,0.8", **given))
    measured = [Velocity("radial, decay 1", 0, sigma, [error]) for sigma, error in ((0.6, 0.01), (0.8, 0.5))]
    levels = [1.0, 0.95, 0.9, 0.8, 0.75, 0.65, 0.5, 0.4, 0.2, 0.1]
    grid = VideoGrid(*TOKENS)
    (one,) = settings(job, measured, grid, (3, 2, 8), 1.0, levels)
    assert one.dense_steps == 5 and one.dense_sigma == pytest.approx(0.7)
    (clip,) = read_samples(Manifest.load(job.config.data.shards), 1)
    assert len(sampler_levels(job, clip)) == 10
    dense = dense_attention(grid).attention_flops(3, 2, 8)
    sparse = attention_of(job.candidates[0], grid).attention_flops(3, 2, 8)
    part = noisy / {"null": 10, "high": 3, "low": 7}[expert]
    assert one.attention == pytest.approx(part * dense + (1 - part) * sparse)


def test_synthetic_clips(tmp_path):
    """Without shards the tiny model sees synthetic clips of its own length."""
    model = save_model(tmp_path / "model")
    words = [f"model.path={model}", f"runs={tmp_path}", "clips=1", "sigmas=0.5", "decays=1", "dense_layers=0"]
    main(words)
    found = json.loads((tmp_path / "decay" / "shapes_4x-native" / "decay.json").read_text(encoding="utf-8"))
    assert found["about"]["grid"] == {"frames": 16, "height": 8, "width": 16, "text_tokens": 0}
    assert len(found["heads"]) == 3 * 2


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"clips": 9}, "4 clips of one size have 4 latent frames or more"),
        ({"frames": 7}, "the longest has 4"),
        ({"frames": 3}, "frames is '3', expected native, 2x, 4x, or 4 latent frames or more"),  # no curve to fit to
        ({"frames": "3x"}, "frames is '3x'"),
        ({"layers": "0,3"}, "layers has 3, the model's are 0 to 2"),
        ({"layers": "first"}, "layers is 'first'"),
        ({"dense_layers": "4"}, "dense_layers has 4, the model has 3 layers"),
        ({"sigmas": "0.5,1"}, "sigmas is '0.5,1'"),
        ({"decays": "0"}, "decays is '0'"),
        ({"rows": 1}, "rows is 1, expected at least 2"),
        ({"clips": 0}, "clips is 0, expected at least 1"),
        ({"error": 0}, "error is 0"),
        ({"tile": "8by8"}, "tile is '8by8'"),
        ({"attention": "radial,raidal"}, "attention is 'raidal'"),
        ({"attention": "radial,radial"}, "expected each option once"),
        ({"slayers": 1}, "slayers is not a known key"),
        (
            {"clips_from": "samples", "model.expert": "high", "model.boundary": 0.3, "model.path": "nowhere"},
            "clips_from is samples, model.expert=high is for noise levels 0.3 to 1 and cannot generate clips alone",
        ),
        (
            {"clips_from": "samples", "model.family": "minimax_h3", "validation.samples_guidance": 3},
            "validation.samples_guidance is 3, but minimax_h3 is distilled for guidance: leave it out, or set it to 1",
        ),
        ({"data.shards": "nowhere"}, "nowhere"),
        ({"model.path": "nowhere"}, "model.path nowhere is no folder"),
        ({"model.family": "mochi"}, "holds a WanTransformer3DModel"),
    ],
)
def test_refusals_are_one_line(tmp_path, changes, expected):
    with pytest.raises(Exception) as caught:
        main(command(tmp_path, **changes))
    assert type(caught.value).__name__ in ("Mistake", "UserError", "DataError", "RadialError")
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "decay").exists()


def test_a_mistake_is_exit_code_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main.run(["model=wan_14b", f"model.path={tmp_path}"])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.startswith("error: model.path") and error.count("\n") == 1
    main.run(["--help"])
    assert "noise levels, with commas" in capsys.readouterr().out
