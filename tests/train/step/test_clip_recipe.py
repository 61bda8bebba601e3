"""The noise levels of a run: its shift by model, size and length, and from which level attention is dense."""

import pytest
import torch
import yaml

from train.config.changes import change_config
from train.config.compose import compose_run, finish, read_config, run_names
from train.models.families import family_of
from train.step.clip_recipe import Recipes, clip_recipe, dense_level
from train.storage.run_folder import write_config


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"clip.height": "480", "clip.width": "832"},
        {"objective.shift_with_length": "true"},
        {"model.steps": "30"},
        {"objective.shift": "3"},
        {"attention.dense_steps": "5"},
    ],
)
@pytest.mark.parametrize("name", [name for name in run_names() if not name.startswith(("shapes", "study"))])
def test_the_first_sampling_steps_are_dense_and_the_next_is_not(name, settings):
    """With as many steps as the model is sampled with, whatever the clip, the shift and the steps."""
    config = finish(compose_run({"conf": name, **settings}))
    count = config.attention.dense_steps
    assert config.model.steps is not None and count == int(settings.get("attention.dense_steps", 2))
    levels = family_of(config.model).noise_levels(config.model.steps, config.shift())
    dense = [clip_recipe(config).attention.is_dense(level) for level in levels]
    assert dense == [True] * count + [False] * (len(levels) - count)


def test_a_run_of_before_keeps_its_noise_level(tmp_path):
    """Its config.yaml has attention.dense_sigma, and neither dense_steps nor a rule of the model."""
    config = finish(compose_run({"conf": "hunyuan_4x", "attention.dense_steps": "0", "attention.dense_sigma": "0.996"}))
    write_config(config, tmp_path)
    file = tmp_path / "config.yaml"
    written = yaml.safe_load(file.read_text(encoding="utf-8"))
    del written["attention"]["dense_steps"], written["model"]["rule"], written["model"]["caption_dropout"]
    written["attention"]["rule"], written["objective"]["caption_dropout"] = "wan", 0.1
    file.write_text(yaml.safe_dump(written), encoding="utf-8")
    again = read_config(tmp_path)
    assert clip_recipe(again).attention.dense_sigma == 0.996
    assert (again.rule(), again.caption_dropout()) == ("wan", 0.1)
    assert change_config(again, {"trainer.keep": "3"}).attention == again.attention
    small = Recipes(again).at((33, 60, 104))
    assert small.schedule.shift == clip_recipe(again).schedule.shift == 7.0  # one for clips of all sizes


def test_clips_of_mixed_sizes_have_their_own_shift_and_dense_level():
    config = finish(compose_run({"conf": "wan_i2v_2x"}))
    levels = Recipes(config).at
    large, small = levels((41, 90, 160)), levels((41, 60, 104))
    assert (large.schedule.shift, small.schedule.shift) == (5.0, 3.0)
    assert large == clip_recipe(config)
    alone = finish(compose_run({"conf": "wan_i2v_2x", "clip.height": "480", "clip.width": "832"}))
    assert small == clip_recipe(alone)
    low, high = small.attention.dense_sigma, large.attention.dense_sigma
    assert low is not None and high is not None and low < high


@pytest.mark.parametrize(
    ("model", "at_480p", "at_720p", "guidance"),
    [("wan_14b", 5, 5, [5]), ("wan_1.3b", 8, 8, [6]), ("wan_i2v_14b", 3, 5, [5]), ("wan_i2v_14b_480p", 3, 5, [5])],
)
def test_the_shifts_are_those_of_wans_own_generator(model, at_480p, at_720p, guidance):
    config = finish(compose_run({"conf": "wan_4x", "model": model}))
    assert (config.model.shift_at(480, 832), config.model.shift_at(720, 1280)) == (at_480p, at_720p)
    assert config.model.guidance == guidance


def test_the_shift_follows_resolution_and_length():
    def shift(**settings):
        return finish(compose_run({key.replace("__", "."): value for key, value in settings.items()})).shift()

    assert shift(conf="wan_4x") == 5.0
    assert shift(conf="wan_i2v_2x", clip__height="480", clip__width="832") == 3.0
    assert shift(conf="wan_4x", objective__shift="7") == 7.0
    assert shift(conf="wan_4x", objective__shift_with_length="true") == pytest.approx(5 * (321 / 81) ** 0.5)
    assert shift(conf="wan_4x", model__shifts="{0: 2, 400: 4}") == 4.0


@pytest.mark.parametrize(("steps", "shift"), [(1, 3.0), (2, 5.0), (7, 5.0)])
def test_attention_is_dense_from_halfway_between_the_last_dense_step_and_the_next(steps, shift):
    model = finish(compose_run({"conf": "wan_4x"})).model
    u = torch.linspace(1, 1 / 1000, model.steps, dtype=torch.float64)
    levels = shift * u / (1 + (shift - 1) * u)
    middle = (levels[steps - 1] + levels[steps]).item() / 2
    assert dense_level(model, steps, shift) == pytest.approx(middle, abs=2e-3)
    assert dense_level(model, 0, shift) is None
