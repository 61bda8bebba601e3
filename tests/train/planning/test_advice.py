"""What a plan refuses and what it advises: settings that fit, and that a run does not refuse."""

import pytest

from tests.helpers.plans import planned
from tests.helpers.tiny import run_config
from train.config.compose import compose_run, finish
from train.errors import UserError
from train.planning import best, fewest, remedies
from train.preflight import check_parallel, preflight


def test_advice():
    """One H200 with 128 GiB of CPU memory trains Wan-14B at four times its length; two small GPUs do not."""
    here = best(planned(), 8)
    assert "parallel.activations=auto" in here.keys
    assert here.budget.misfit is None
    assert here.budget.offloaded > 0
    on_eight = best(planned(gpus=8, cpu_gib=1024), 8)
    assert on_eight.duration.clips_a_step == 8
    assert on_eight.duration.step < here.duration.step / 6
    assert fewest(planned(gpus=8, cpu_gib=1024), 8, 8).budget.machine.world == 1
    small = planned("rtx5090", gpus=2, cpu_gib=64)
    assert best(small, 8) is None
    told = remedies(small, 8)
    assert any("GPUs of this kind" in line for line in told)
    assert any("a larger GPU" in line for line in told)
    (keys,) = (line.partition(": ")[2].split() for line in told if "shorter clip" in line)
    frames = int(keys[0].removeprefix("clip.frames="))
    given = dict(word.replace(".", "__").split("=", 1) for word in keys)
    assert planned("rtx5090", gpus=2, cpu_gib=64, **given).misfit is None
    assert best(planned("rtx5090", gpus=2, cpu_gib=64, clip__frames=frames), 8) is not None
    assert best(planned("rtx5090", gpus=2, cpu_gib=64, clip__frames=frames + 4), 8) is None


def test_advised_gpus_are_those_of_the_nodes_that_there_are():
    """Six GPUs cannot share eight clips a step, nor the heads of Wan-14B, and four of them can; nodes of one GPU
    have no two."""
    told = remedies(planned(gpus=6, cpu_gib=768), 8)
    assert told[0].startswith("4 of these GPUs: trainer.devices=4 ") and told[1].startswith("8 GPUs of this kind: ")
    few = fewest(planned("h100", nodes=4), 8, 4)
    assert few.budget.machine.gpus == 1 and few.budget.misfit is None


@pytest.mark.parametrize(("gpu", "gpus", "cpu_gib"), [("rtx5090", 2, 64), ("h100", 1, 48)])
def test_the_cpu_memory_that_is_advised_is_a_nodes_and_not_what_a_run_takes_of_it(gpu, gpus, cpu_gib):
    told = (line for line in remedies(planned(gpu, gpus=gpus, cpu_gib=cpu_gib), 8) if "more CPU memory" in line)
    memory, _, keys = next(told).removeprefix("more CPU memory, ").partition(" GiB a node: ")
    given = dict(word.replace(".", "__").split("=", 1) for word in keys.split())
    assert planned(gpu, gpus=gpus, cpu_gib=int(memory), **given).misfit is None


@pytest.mark.parametrize(
    "words",
    [
        {"conf": "wan22_2x"},
        {"conf": "wan22_2x", "lora__dora": True, "optim__weight_decay": 0},
        {"conf": "wan_2x", "lora__dora": True, "optim__weight_decay": 0},
        {"conf": "wan_480p_2x", "trainer__fp8": True},
    ],
)
def test_advice_is_of_runs_that_are_not_refused(words):
    """Two experts train under DDP alone, DoRA and float8 need whole weights, and not both float8 of the two kinds."""
    given = {key.replace("__", "."): str(value) for key, value in words.items()}
    found = [best(planned("rtx5090", gpus=gpus, cpu_gib=512 * gpus, **words), 8) for gpus in (1, 2, 4, 8)]
    keys = [setting.keys for setting in found if setting is not None]
    for line in remedies(planned("rtx4090", cpu_gib=48, **words), 8):
        if line.startswith("frozen weights in 8 bits: "):
            keys.append(line.partition(": ")[2].split())
    assert keys
    for words_of_setting in keys:
        config = finish(compose_run(given | dict(word.split("=", 1) for word in words_of_setting)))
        check_parallel(config, elsewhere=True)


def test_two_experts_targets_are_counted_by_their_names():
    sizes = planned(conf="wan22_2x", lora__targets=r"transformer(_2)?\.blocks\.\d+\.attn1\.to_q").sizes
    one = planned(conf="wan22_2x", lora__targets=r"transformer_2\.blocks\.\d+\.attn1\.to_q").sizes
    assert sizes.trained == 2 * one.trained == 2 * 40 * sizes.width * 2 * planned(conf="wan22_2x").config.lora.rank
    with pytest.raises(UserError, match=r"matches no linear layer of the model; names begin with transformer\. or"):
        planned(conf="wan22_2x", lora__targets=r"blocks\.\d+\.attn1\.to_q")


def test_more_dense_layers_than_the_model_has_are_refused_before_it_is_loaded(tmp_path):
    with pytest.raises(UserError, match="attention.dense_layers is 9, the model has 3 layers"):
        preflight(run_config(tmp_path, attention__dense_layers=9))


def test_a_plan_knows_the_models_heads_and_layers():
    assert (
        "parallel.sequence is 3, expected a divisor of the model's 40 heads"
        in planned(gpus=3, parallel__sequence=3).misfit
    )
    assert "set optim.global_batch to a multiple of 3" in planned(gpus=3).misfit  # and not parallel.sequence=3
    assert planned(attention__dense_layers=99).misfit == "attention.dense_layers is 99, the model has 40 layers"


def test_float8_products_need_a_gpu_that_has_them():
    assert "trainer.fp8 is true, an NVIDIA A100 has no float8 products" in planned("a100", trainer__fp8=True).misfit
    assert planned("a100", model__storage="fp8", clip__frames=81).misfit is None
