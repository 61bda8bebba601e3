"""Configs: every run file composes; mistakes are one line with the key's full name and exit code 2."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf

from data.errors import DataError
from launch import doctor
from radial import build_layout
from radial.cli.reader import settings_of
from radial.errors import Mistake
from train.attention.sequence import check_heads
from train.config.changes import change_config
from train.config.compose import compose_run, finish, read_config, run_names
from train.config.global_batch import clips_a_step, clips_in_words, micro_batches
from train.errors import UserError
from train.preflight import preflight
from train.storage.run_folder import going_on, write_config


@pytest.mark.parametrize("name", run_names())
def test_every_run_file_composes_and_validates(name):
    config = finish(compose_run({"conf": name}))
    assert config.conf == name
    assert config.grid().tokens > 0


@pytest.mark.parametrize(
    ("name", "tokens", "steps"),
    [
        ("wan_2x", 147_600, 2500),
        ("wan_4x", 291_600, 2500),
        ("wan_480p_2x", 63_960, 2500),
        ("wan_480p_4x", 126_360, 2500),
        ("wan_1.3b_4x", 126_360, 2500),
        ("hunyuan_2x", 230_400, 2400),
        ("hunyuan_4x", 460_800, 1200),
        ("hunyuan15_2x", 219_600, 2400),
        ("hunyuan15_4x", 435_600, 1200),
        ("minimax_h3_2x", 213_696, 2400),
        ("minimax_h3_4x", 425_376, 1200),
        ("mochi_2x", 89_040, 5000),
        ("mochi_4x", 178_080, 5000),
        ("shapes_4x", 8192, None),
    ],
)
def test_the_published_recipe(name, tokens, steps):
    config = finish(compose_run({"conf": name}))
    assert config.grid().tokens == tokens
    assert config.attention.pattern == "released"
    assert config.attention.decay == 1.0
    if steps is not None:
        assert config.lora is not None
        assert config.lora.rank == 128
        assert config.attention.dense_layers == 2
        assert config.trainer.steps == steps
        assert config.attention.dense_steps == 2
        assert config.rule() == ("hunyuan" if name.startswith("hunyuan_") else "wan")
        assert config.caption_dropout() == (0.0 if name.startswith(("hunyuan_", "minimax")) else 0.1)
        assert clips_a_step(config) == (8 if name.startswith("wan") else 1)


def test_a_layout_that_shares_clips_among_too_few_gpus_is_left_to_the_preflight():
    """It has a whole number of clips at once, and none for each group of GPUs."""
    config = finish(compose_run({"conf": "hunyuan_4x", "trainer.devices": "2", "parallel.sequence": "2",
                                 "data.batch_size": "2", "optim.global_batch": "2"}))  # fmt: skip
    assert change_config(config, {"trainer.devices": "1"}).trainer.devices == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["conf=wan_5x"], r"conf is 'wan_5x', expected one of .*; did you mean wan_4x\?"),
        (["stpes=3"], "stpes is not a known key"),
        (["modl=wan_14b"], r"modl is not a known key; did you mean model\?"),
        (["atention=dense"], r"atention is not a known key; did you mean attention\?"),
        (["trainer.stpes=3"], r"trainer.stpes is not a known key; did you mean trainer.steps\?"),
        (["trainer.steps=abc"], "trainer.steps is 'abc', expected a whole number"),
        (["trainer.steps=0"], "trainer.steps is 0, expected at least 1"),
        (["+trainer.stpes=3"], r"\+trainer.stpes is not a known key"),
        (["model=wan_15b"], r"model is 'wan_15b', expected one of .*; did you mean"),
        (["trainer=3"], "trainer is a section, set its keys"),
        (["optim=null"], "optim is a section, set its keys"),
        (["conf=wan_4x", "clip.frames=320"], "clip.frames is 320, expected 4 x k \\+ 1 .*use 317 or 321"),
        (["conf=wan_4x", "clip.height=721"], "clip.height is 721, expected a multiple of 16"),
        (["attention.pattern=spiral"], "attention.pattern is 'spiral'"),
        (["attention.decay=-1"], "attention.decay is -1.0"),
        (["attention.rule=mochi"], "attention.rule is 'mochi'"),
        (["attention.dense_steps=-1"], "attention.dense_steps is -1, expected at least 0"),
        (["attention.dense_steps=2"], r"dense_steps is 2, and the model has no sampling steps .*set model.steps, or"),
        (["conf=wan_4x", "attention.dense_steps=50"], r"dense_steps is 50, expected fewer .*model.steps=50"),
        (
            ["conf=wan_4x", "attention.dense_sigma=0.99"],
            "dense_steps is 2 and attention.dense_sigma 0.99, expected one",
        ),
        (["trainer.precision=fp16"], "trainer.precision is 'fp16', expected one of bf16, fp32, auto"),
        (["objective.caption_dropout=2"], "objective.caption_dropout is 2.0"),
        (["model.native_size=[1]"], r"model.native_size is \[1\], expected two sizes"),
        (["model.guidance=[1,2,3]"], r"model.guidance is \[1.0, 2.0, 3.0\], expected a positive number, or two"),
        (["model.vae=[1,2]"], r"model.vae is \[1, 2\], expected three sizes"),
        (["objective.shift=null", "model.shifts={480: 3}"], "objective.shift is not set, and the model has none"),
        (["objective.shift=null", "model.shifts={0: -1}"], "model.shifts is .*, expected positive numbers"),
        (
            ["objective.shift=null", "objective.shift_with_length=true", "model.native_frames=null"],
            "shift_with_length needs model.native_frames",
        ),
        (["lora.rank=0"], "lora.rank is 0"),
        (["lora.targets=("], r"lora.targets is '\(', expected a regular expression"),
        (["lora.targets=x", "lora.text=true"], "lora.text is true, but lora.targets names all modules"),
        (["optim.weight_decay=-1"], "optim.weight_decay is -1.0"),
        (["optim.weight_decay=inf"], "optim.weight_decay is inf, expected at least 0"),
        (["optim.weight_decay=nan"], "optim.weight_decay is nan"),
        (["validation.sigmas=[0.5, 7]"], r"validation.sigmas is \[0.5, 7.0\], expected noise levels between 0 and 1"),
        (["optim.lr=inf"], "optim.lr is inf"),
        (["seed=99999999999999999999"], "seed is 99999999999999999999"),
        (["report.clips=3"], "report.clips is 3, expected 0 or at least 12"),
        (["parallel.strategy=fsdp"], "parallel.strategy is 'fsdp', expected one of ddp, zero1, zero2, zero3"),
        (["parallel=zero4"], "parallel is 'zero4', expected one of ddp, zero1.*; did you mean"),
        (["parallel.sequence=0"], "parallel.sequence is 0, expected at least 1"),
        (["parallel.offload_optimizer=true"], "parallel.offload_optimizer needs parallel.strategy=zero1 or zero2"),
        (["parallel.offload_activations=true"], "parallel.offload_activations needs .*=full or selective, it is none"),
        (["parallel.offload_gib=8"], "parallel.offload_gib is 8.0, it needs parallel.offload_activations=true"),
        (["parallel=zero2", "parallel.offload_parameters=true"], "parallel.offload_parameters needs .*=zero3, it is"),
        (["conf=wan22_2x", "parallel=zero2"], "parallel.strategy is zero2, which steps on .*model.expert=both leaves"),
        (["conf=wan22_2x", "lora=null"], "lora=null trains all weights, of one expert at a time: set model.expert="),
        (["attention.backend=fast"], "attention.backend is 'fast', expected one of"),
        (
            ["model.architecture.num_layers=3"],
            "model.architecture.num_layers cannot be set, model.architecture is null",
        ),
        (["lora=null", "lora.rank=4"], "lora.rank cannot be set, lora is null"),
        (["trainer.steps"], "'trainer.steps' is not a setting, expected key=value"),
        (["seed=1", "seed=2"], "seed is given twice"),
        (["trainer.compile=yes"], "trainer.compile is 'yes', expected true or false"),
    ],
)
def test_mistakes_name_the_key(words, message):
    with pytest.raises(Mistake, match=message) as error:
        finish(compose_run(settings_of(words)))
    assert "\n" not in str(error.value)


def test_values_are_taken_as_typed(tmp_path):
    references = {"runs": "a${b}", "data.shards": "pipe:cat ${DIR}/{}", "validation.prompts": "['a ${x} b', 'c\\${d}']"}
    config = finish(compose_run(references))
    write_config(config, tmp_path)
    for again in (config, read_config(tmp_path), change_config(read_config(tmp_path), {"log.project": "${e}"})):
        assert (again.runs, again.data.shards) == ("a${b}", "pipe:cat ${DIR}/{}")
        assert again.validation.prompts == ["a ${x} b", "c\\${d}"]
    assert again.log.project == "${e}"
    words = ["runs=a=b, {000..009}'s", "lora.targets=x,y|z", "optim.lr=5e-5", "optim.betas=[0.8, 0.95]"]
    config = finish(compose_run(settings_of(words)))
    assert config.runs == "a=b, {000..009}'s"
    assert config.lora is not None
    assert config.lora.targets == "x,y|z"
    assert config.optim.lr == 5e-5
    assert config.optim.betas == [0.8, 0.95]
    assert finish(compose_run({"attention.backend": "null", "conf": "wan_4x"})).attention.backend is None
    assert finish(compose_run({"lora": "null"})).lora is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"conf": "wan_4x"}, "model.path is not set.*hf download Wan-AI/Wan2.1-T2V-14B-Diffusers"),
        ({"conf": "wan_4x", "model.path": "weights/x"}, "model.path weights/x is no folder .*; get the weights with"),
        ({"model.path": "builtin:x"}, "model.path builtin:x is no folder"),
        ({"model.family": "wam"}, "model.family is 'wam', expected one of"),
        ({"conf": "shapes_base", "model.path": "x"}, "model.architecture asks for random weights"),
        ({"model.path": "/tmp"}, "has no .*config.json"),
        (
            {"conf": "shapes_base", "model.architecture.num_layer": "2"},
            "model.architecture.num_layer is not a setting of WanTransformer3DModel; did you mean num_layers",
        ),
        ({"conf": "shapes_base", "model.architecture.num_layers": "two"}, "does not make a WanTransformer.*str"),
        ({"data.shards": "/nowhere"}, "/nowhere"),
        ({"data.synthetic_clips": "0"}, "data.shards is not set"),
        ({"parallel.sequence": "2"}, "parallel.sequence is 2, expected a divisor of trainer.devices=1: 1$"),
        (
            {"parallel.sequence": "3", "trainer.devices": "3"},
            "parallel.sequence is 3, expected a divisor of the model's 2 heads: 1, 2$",
        ),
        (
            {"conf": "shapes_base", "parallel.sequence": "4", "trainer.devices": "4"},
            "parallel.sequence is 4, expected a divisor of the model's 2 heads: 1, 2$",
        ),
        ({"parallel.sequence": "3", "trainer.devices": "4"}, "expected a divisor of trainer.devices=4: 1, 2, 4"),
    ],
)
def test_a_run_that_cannot_work_stops_before_anything_else(settings, message):
    with pytest.raises((UserError, DataError), match=message):
        preflight(finish(compose_run(settings)))


def test_a_run_with_checkpoints_needs_what_its_lora_started_from_no_more(tmp_path):
    config = finish(compose_run({"lora.init": "gone.safetensors"}))
    with pytest.raises(UserError, match=r"gone.safetensors is missing|gone.safetensors"):
        preflight(going_on(config, tmp_path))
    (tmp_path / "checkpoints" / "step-000005").mkdir(parents=True)
    write_config(config, tmp_path)
    findings = list(doctor.needs(going_on(config, tmp_path), quick=True))
    assert [finding.verdict for finding in findings] == ["ok"], findings


@pytest.mark.skipif(torch.cuda.is_available(), reason="ZeRO runs here")
@pytest.mark.parametrize("parallel", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_zero_without_a_gpu_is_refused_and_not_replaced(parallel):
    config = finish(compose_run({"parallel": parallel}))
    with pytest.raises(UserError, match=f"parallel.strategy is {parallel[:5]}, but DeepSpeed .* set parallel=ddp"):
        preflight(config)


def test_sequence_parallelism_says_which_sizes_divide_the_heads():
    check_heads(8, 40)
    with pytest.raises(UserError, match="parallel.sequence is 5, expected a divisor .* 12 heads: 1, 2, 3, 4, 6, 12"):
        check_heads(5, 12)


def test_a_run_may_go_on_with_other_gpus_but_no_other_numbers():
    config = finish(compose_run({"trainer.devices": "2"}))
    changed = change_config(config, {"trainer.devices": "8", "parallel.sequence": "4", "parallel.strategy": "zero2"})
    assert (changed.trainer.devices, changed.parallel.sequence, changed.data.batch_size) == (8, 4, 1)
    with pytest.raises(UserError, match=r"optim.lr was 0.003, now 1.0: this changes .* Add override=true"):
        change_config(config, {"optim.lr": "1"})
    assert change_config(config, {"optim.lr": "1"}, override=True).optim.lr == 1
    assert change_config(config, {"log.every": "5", "trainer.keep": "9"}).log.every == 5
    assert change_config(config, {"validation.every": "5", "trainer.timeout": "900"}).trainer.timeout == 900
    with pytest.raises(UserError, match="a step would have 1 clips .* it had 2: set optim.accumulate=2 to keep"):
        change_config(config, {"trainer.devices": "1"})


def command(*words):
    return subprocess.run([sys.executable, "-m", "train", *words], capture_output=True, encoding="utf-8")


def test_the_command_line(tmp_path):
    help_text = command("--help")
    assert help_text.returncode == 0
    assert "conf=wan_4x" in help_text.stdout
    shown = command("--cfg", "job", "conf=wan_4x", "optim.lr=3e-5")
    assert shown.returncode == 0
    assert OmegaConf.create(shown.stdout).optim.lr == 3e-5
    assert command("--cfg", "hydra").returncode == 2
    wrong = command("conf=wan_4x", f"runs={tmp_path}")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: model.path is not set")
    assert wrong.stderr.count("\n") == 1
    assert wrong.stdout == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "times"),
    [
        ({}, 8),
        ({"trainer.devices": "2"}, 4),
        ({"trainer.devices": "8"}, 1),
        ({"trainer.devices": "8", "parallel.sequence": "4"}, 4),
        ({"trainer.devices": "8", "trainer.nodes": "4", "parallel.sequence": "4"}, 1),
        ({"data.batch_size": "4"}, 2),
    ],
)
def test_the_clips_a_step_stay_those_of_the_run_file_whatever_the_gpus(given, times):
    config = finish(compose_run({"conf": "wan_4x", **given}))
    assert (micro_batches(config), clips_a_step(config)) == (times, 8)
    assert clips_in_words(config).startswith("8 a step: ") and "conf/" not in clips_in_words(config)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"trainer.devices": "8", "optim.accumulate": "4"}, "32 a step: 1 x 8 processes, 4 micro-batches; "),
        ({"optim.global_batch": "16"}, "16 a step: 1 x 1 process, 16 micro-batches; "),
        ({"trainer.devices": "2", "parallel.sequence": "2", "optim.accumulate": "1"},
         "1 a step: 1 x 2 processes / 2 a clip, 1 micro-batch; "),
    ],
)  # fmt: skip
def test_a_run_of_other_clips_a_step_says_both(given, words):
    config = finish(compose_run({"conf": "wan_4x", **given}))
    assert clips_in_words(config) == f"{words}conf/wan_4x.yaml has 8 a step"


@pytest.mark.parametrize(
    ("given", "remedies"),
    [
        ({"trainer.devices": "8", "trainer.nodes": "4"}, "parallel.sequence=4 or 8 (GPUs that share a clip), or optim"),
        ({"trainer.devices": "3"}, "optim"),  # three cannot share 40 heads
        ({"data.batch_size": "3"}, "optim"),
    ],
)
def test_gpus_that_cannot_share_the_clips_a_step_are_told_what_can(given, remedies):
    config = finish(compose_run({"conf": "wan_4x", **given}))
    at_once = f"{config.clips_at_once():g}"
    said = f"takes {at_once} at once, expected a divisor of 8: set {remedies}.global_batch to a multiple of {at_once}"
    with pytest.raises(UserError, match=f"optim.global_batch is 8 clips a step .*{re.escape(said)}$"):
        micro_batches(config)
    placed = replace(config, model=replace(config.model, path="hub:a/b"))
    with pytest.raises(UserError, match="optim.global_batch is 8 clips a step"):
        preflight(placed, elsewhere=True)


RIVALS = ["spatial", "temporal", "sliding_tile", "power", "shifted", "local", "random"]


@pytest.mark.parametrize("name", RIVALS)
def test_rivals_are_groups_and_meet_a_share_on_the_runs_own_grid(name):
    given = {"conf": "shapes_4x", "attention": name, "attention.block": "32"}
    config = finish(compose_run(given))
    assert config.attention.pattern == config.pattern().name == config.pattern_in_words() == name
    shared = finish(compose_run({**given, "attention.share": "0.2"}))
    layout = build_layout(shared.pattern(), shared.grid(), 32)
    assert 1 - layout.sparsity == pytest.approx(0.2, abs=0.03)
    words = shared.pattern_in_words()
    assert words.startswith(f"{name} with {1 - layout.sparsity:.1%} of the blocks (reach ")
    dense = shared.attention.under("dense")
    assert (dense.pattern, dense.share, dense.reach, dense.dense_layers) == ("dense", None, None, 0)


def test_the_released_masks_share_is_by_its_decay():
    config = finish(compose_run({"conf": "shapes_4x", "attention.share": "0.1"}))
    assert config.pattern().decay != 1.0
    assert "released with" in config.pattern_in_words() and "(decay " in config.pattern_in_words()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"attention": "paper", "attention.share": "0.2"},
            "attention.share is 0.2, and pattern paper has no",
        ),
        ({"attention.share": "1.5"}, "attention.share is 1.5"),
        ({"attention.reach": "2"}, "attention.reach is 2.0, pattern released has none"),
        ({"attention": "spatial", "attention.reach": "0"}, "attention.reach is 0.0, expected a positive number"),
        ({"attention": "spatial", "attention.per_head": "true"}, "attention.per_head is of pattern random"),
    ],
)
def test_what_a_pattern_cannot_be_asked_for(settings, message):
    with pytest.raises(UserError, match=message):
        finish(compose_run({"conf": "shapes_4x", **settings}))
