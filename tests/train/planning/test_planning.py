"""The plan: counted sizes, memory against a traced step, FLOPs against the model's own count, choices that fit."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from radial import Released
from tests.helpers.attention import step_attention
from tests.helpers.plans import planned
from tests.helpers.tiny import run_config
from tests.helpers.traced import step_memory, with_parallel
from train.__main__ import main
from train.config.compose import CONF, compose_run, finish
from train.errors import UserError
from train.lora.layers import inject_lora
from train.models.loading import load_adapter
from train.planning import (
    GIB,
    GPUS,
    Budget,
    Duration,
    Gpu,
    Machine,
    best,
    hardware,
    plan_table,
    this_machine,
)
from train.planning.choose_policies import chosen
from train.planning.duration import between
from train.planning.flops import SampleFlops
from train.planning.full_memory import check_memory
from train.planning.layer_memory import movable_bytes


def test_the_published_geometry():
    """Wan2.1-14B: 14.3e9 weights in bf16, a rank-128 LoRA of 210 M, 291,600 tokens, 40 layer inputs of 2.99 GB."""
    budget = planned()
    sizes = budget.sizes
    assert (sizes.layers, sizes.heads, sizes.width, sizes.wide, sizes.tokens) == (40, 40, 5120, 13824, 291_600)
    assert sizes.weights == pytest.approx(2.86e10, rel=0.01)
    assert sizes.trained == 40 * 4 * 128 * (5120 + 5120)
    assert budget.layer.hidden == pytest.approx(2.986e9, rel=0.001)
    assert budget.gpu_parts["kept activations"] == pytest.approx(119.4e9, rel=0.001)
    assert sizes.dense_attention == pytest.approx(1.74e15, rel=0.01)
    assert sizes.density == pytest.approx(0.162, abs=0.001)
    assert Duration(budget.dense()).attention_flops == 40 * sizes.dense_attention
    two_dense = 2 * sizes.dense_attention + 38 * sizes.density * sizes.dense_attention
    share = Duration(budget).dense_share
    assert 0.0299 < share < 0.0302  # up to halfway between the second and third of 50 levels
    expected = (1 - share) * two_dense + share * 40 * sizes.dense_attention
    assert Duration(budget).attention_flops == pytest.approx(expected)


def test_flops_are_those_of_the_training_log(tmp_path):
    config = run_config(tmp_path, attention__dense_layers=1)
    budget = Budget.of(config, Machine(GPUS["h200"], 1, 1, 64 * GIB))
    adapter = load_adapter(config.model, torch.float32, seed=0)
    inject_lora(adapter.transformer, config.lora.rank, config.lora.alpha, adapter.lora_targets, seed=0)
    plan = step_attention(Released(), config.grid(), block=config.attention.block, dense_layers=1)
    assert Duration(budget).flops == pytest.approx(SampleFlops.of(adapter, plan).step, rel=1e-9)
    assert budget.sizes.trained == sum(p.numel() for p in adapter.transformer.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("policy", "chunk", "layers", "frames"),
    [
        ("selective", 8192, 2, 161),
        pytest.param("full", None, 3, 321, marks=pytest.mark.slow),
        pytest.param("none", None, 3, 321, marks=pytest.mark.slow),
        pytest.param("none", 8192, 2, 161, marks=pytest.mark.slow),
        pytest.param("selective", None, 2, 321, marks=pytest.mark.slow),
    ],
)
def test_memory_is_that_of_a_traced_step(policy, chunk, layers, frames):
    """Real Wan-14B layers at their real shape, eager: what autograd keeps and the backward's working set."""
    budget = planned(clip__frames=frames, layers=layers)
    config = with_parallel(budget.config, activations=policy, ffn_chunk=chunk)
    budget = replace(budget, config=config)
    moments = 12 * budget.sizes.trained  # the trace has neither gradients of the LoRA in full nor Adam's state
    assert budget.gpu_memory - moments == pytest.approx(step_memory(config, layers), rel=0.05)


@pytest.mark.parametrize(
    ("run", "policy", "chunk"),
    [
        ("mochi_2x", "full", None),
        ("mochi_2x", "none", None),
        pytest.param("mochi_2x", "selective", 8192, marks=pytest.mark.slow),
        pytest.param("hunyuan_2x", "full", 8192, marks=pytest.mark.slow),
        ("hunyuan_2x", "none", 8192),
        pytest.param("hunyuan15_2x", "full", 8192, marks=pytest.mark.slow),
        ("hunyuan15_2x", "none", 8192),
        pytest.param("minimax_h3_2x", "full", 8192, marks=pytest.mark.slow),
        pytest.param("minimax_h3_2x", "selective", None, marks=pytest.mark.slow),
        ("minimax_h3_2x", "none", 8192),
        ("wan_i2v_2x", "selective", None),
        ("wan22_5b_4x", "full", None),
        ("wan22_5b_4x", "none", None),
    ],
)
def test_memory_of_other_families_is_that_of_a_traced_step(run, policy, chunk):
    """As above; TI2V-5B with a first frame, where each token has its own timestep."""
    budget = planned(conf=run, parallel__sequence=1, layers=3)
    config = with_parallel(budget.config, activations=policy, ffn_chunk=chunk)
    budget = replace(budget, config=config)
    moments = 12 * budget.sizes.trained
    assert budget.gpu_memory - moments == pytest.approx(step_memory(config, 3), rel=0.15)


@pytest.mark.parametrize("policy", ["full", "none"])
def test_memory_in_float8_is_that_of_a_traced_step(policy):
    """Products need their input in float32 before it is rounded, a feed-forward's wide middle too."""
    budget = planned(clip__frames=161, layers=2, parallel__activations=policy, trainer__fp8=True)
    moments = 12 * budget.sizes.trained
    assert budget.gpu_memory - moments == pytest.approx(step_memory(budget.config, 2), rel=0.07)


@pytest.mark.parametrize("policy", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_memory_with_a_dense_teacher_is_that_of_a_traced_step(policy):
    """The graph of the window, of half the clip, stands beside the clip's."""
    plain = planned(clip__frames=161, layers=3, parallel__activations=policy)
    budget = planned(clip__frames=161, layers=3, parallel__activations=policy, objective__dense_teacher=1)
    moments = 12 * budget.sizes.trained
    assert budget.gpu_memory - moments == pytest.approx(step_memory(budget.config, 3), rel=0.05)
    assert (budget.gpu_memory > plain.gpu_memory * 1.2) == (policy == "none")  # else the clip's own backward needs more


def test_a_dense_teacher_takes_its_forward_and_a_step_of_the_window():
    plain, more, window = (
        Duration(planned(conf="wan_4x", clip__frames=frames, objective__dense_teacher=weight)).parts["linear"]
        for frames, weight in ((321, 0), (321, 1), (81, 0))
    )
    native = planned(conf="wan_4x", clip__frames=81, objective__dense_teacher=1)
    teacher = Duration(native).parts["linear"] - window  # alone: the model's own step is that of the whole clip
    assert teacher == pytest.approx(window / 3, rel=0.06)  # full: forward, forward, backward, and the LoRA's
    assert more == pytest.approx(plain + window + teacher)
    shared = planned(conf="wan_4x", gpus=4, parallel__sequence=4, parallel__offload_weights=True)
    taught = replace(shared, config=replace(shared.config, objective=native.config.objective))
    parts, without = Duration(taught).parts, Duration(shared).parts
    assert parts["attention"] > without["attention"] and parts["communication"] > without["communication"]


def test_the_frozen_models_pass_takes_a_forward():
    plain, more = (
        Duration(planned(conf="minimax_h3_2x", parallel__sequence=1, objective__distilled_guidance=weight)).parts
        for weight in ("null", 3.5)
    )
    assert more["linear"] / plain["linear"] == pytest.approx(4 / 3, rel=0.02)  # full: forward, forward, backward
    assert (
        plain["attention"] * 1.2 < more["attention"] < plain["attention"] * 1.25
    )  # a backward is 2.5 forwards, slower


def test_ranks_share_what_they_share():
    whole, shared = planned(), planned(gpus=4, parallel__sequence=4)
    assert shared.layer.tokens == 291_600 // 4
    assert shared.gpu_parts["kept activations"] == whole.gpu_parts["kept activations"] / 4
    assert planned(gpus=7, parallel__sequence=1).layer.tokens == 291_600
    zero3 = planned(gpus=8, parallel="zero3")
    assert zero3.weights == pytest.approx(whole.weights / 8 + 2 * whole.sizes.layer_weights)
    assert planned(gpus=8, parallel="zero1").training > planned(gpus=8, parallel="zero2").training > zero3.training
    offload = planned(gpus=8, parallel="zero3_offload")
    assert offload.weights < zero3.weights
    assert offload.cpu_parts["weights"] == whole.weights
    nodes = planned(gpus=8, nodes=2, parallel="zero3_offload")
    assert nodes.cpu_parts["weights"] == whole.weights / 2


def test_offload_moves_what_is_kept_and_no_more():
    everything = planned(parallel__offload_activations=True)
    assert everything.offloaded == pytest.approx(40 * everything.layer.hidden)
    layer = everything.layer
    moved = layer.kept_by("full") + layer.kept_by("selective")
    assert movable_bytes([layer, layer], ["none", "full", "selective"]) == pytest.approx(2 * moved)
    limited = planned(parallel__offload_activations=True, parallel__offload_gib=50)
    assert limited.offloaded == 50 * GIB
    assert limited.cpu_parts["kept activations, page-locked"] == 50 * GIB
    assert planned().gpu_memory > limited.gpu_memory > everything.gpu_memory


def test_the_seconds_of_more_gpus():
    one = Duration(planned(parallel__activations="auto", trainer__compile=True))
    eight = Duration(planned(gpus=8, parallel__sequence=8, parallel__activations="auto", trainer__compile=True))
    assert one.clips_a_step == eight.clips_a_step == 8
    assert 7 < one.step / eight.step < 10  # more memory also computes less twice
    assert sum(one.parts.values()) == one.step
    assert one.hours == one.step * 2500 / 3600
    assert Duration(one.budget.dense()).step > 3 * one.step
    assert eight.parts["communication"] > one.parts["communication"]
    assert (
        Duration(planned("a100")).step
        > Duration(planned("h100")).step
        == pytest.approx(Duration(planned()).step, rel=0.1)
    )


def test_rates_between_measured_lengths():
    rows = ((100, 1.0, 10.0), (10_000, 3.0, 30.0))
    assert [between(rows, n, 1) for n in (1, 100, 1000, 10_000, 10**6)] == [1, 1, 2, 3, 3]


@settings(max_examples=40, deadline=None)
@given(memory=st.floats(20, 300), cpu=st.integers(8, 512), sequence=st.sampled_from([1, 2, 4, 8]), dense=st.booleans())
@example(memory=265, cpu=8, sequence=1, dense=False)
@example(memory=250, cpu=8, sequence=1, dense=False)
def test_chosen_policies_fit_wherever_any_do(memory, cpu, sequence, dense):
    config = planned_config(sequence)
    gpu = replace(GPUS["h200"], memory=memory * GIB)
    budget = Budget(config, Machine(gpu, sequence, 1, cpu * sequence * GIB), planned_sizes())
    budget = budget.dense() if dense else budget
    names, order = budget.policies.names, ["full", "selective", "none"]
    assert budget.offloaded <= max(0.0, budget.cpu_room()) + 1
    frugal = replace(
        budget, config=with_parallel(config, activations="full", offload_activations=True, offload_gib=None)
    )
    if frugal.misfit is None:
        assert budget.misfit is None
    if budget.gpu_memory > budget.usable + 1:
        assert set(names) == {"full"}
    elif budget.misfit is not None:  # the CPU's memory is too small for the process itself, whatever layers keep
        assert budget.offloaded == 0 and budget.cpu_parts["processes"] > budget.cpu_usable
    ranks = [order.index(name) for name in names[0 if dense else 2 :]]
    assert ranks == sorted(ranks)  # the last layers keep the most
    larger = replace(budget, machine=replace(budget.machine, gpu=replace(gpu, memory=2 * gpu.memory)))
    assert larger.policies.count("full") <= budget.policies.count("full")


_CACHE = {}


def planned_config(sequence):
    if "config" not in _CACHE:
        _CACHE["config"] = planned(parallel__activations="auto")
    return with_parallel(_CACHE["config"].config, sequence=sequence)


def planned_sizes():
    planned_config(1)
    return _CACHE["config"].sizes


def test_dense_layers_keep_attention_first():
    needs = lambda names: 10 * (len(names) - names.count("full"))  # noqa: E731
    assert chosen(5, 2, 20, needs).names == ("selective", "selective", "full", "full", "full")
    assert chosen(5, 2, 30, needs).names == ("selective", "selective", "full", "full", "selective")
    assert chosen(5, 2, 30, needs).offload == 30
    assert chosen(3, 0, 0, lambda names: 0.0).names == ("none",) * 3


def test_attentions_output_is_kept_where_running_it_again_does_not_fit():
    needs = lambda names: math.inf if "full" in names else 30.0  # noqa: E731
    assert chosen(3, 0, 30, needs).names == ("selective",) * 3
    assert chosen(3, 0, 29, needs).names == ("full",) * 3


def test_a_gpu_of_unknown_speed_has_a_plan_without_times():
    budget = replace(planned(), machine=Machine(Gpu("Some GPU", 200 * GIB), 1, 1, 512 * GIB))
    assert Duration(budget).step is None
    assert "no times: nothing is known of the speed of Some GPU" in plan_table(budget)
    assert best(budget, 8) is not None


def test_training_refuses_what_cannot_fit(tmp_path, monkeypatch):
    """On this machine's CPU: a clip that would take hundreds of GiB; the plan's table says so."""
    large = {"attention__pattern": "dense", "clip__height": 1024, "clip__width": 2048}
    words = [f"{k.replace('__', '.')}={v}" for k, v in large.items()]
    with pytest.raises(UserError, match="this run does not fit: a step needs") as error:
        main([*words, f"runs={tmp_path}"])
    for line in ("kept activations", "working set", "CPU memory of a node", "trainer.check_memory=false"):
        assert line in str(error.value)
    assert not list(tmp_path.iterdir())
    check_memory(finish(compose_run({"trainer.check_memory": "false", "clip.height": "1024", "clip.width": "2048"})))
    check_memory(run_config(tmp_path))

    monkeypatch.setattr(
        "train.planning.budget.this_machine", lambda devices, nodes: Machine(GPUS["h200"], devices, nodes, 64 * GIB)
    )
    wan = finish(compose_run({"conf": "wan_4x"}))
    with pytest.raises(UserError, match=r"(?s)an NVIDIA H200 has.*dense.*what would work:\n  .*parallel"):
        check_memory(wan)
    check_memory(finish(compose_run({"conf": "wan_4x", "clip.frames": "21"})))


def test_this_machine():
    machine = this_machine(2)
    assert machine.world == 2
    assert 2**30 < machine.cpu_memory < 2**45
    if not torch.cuda.is_available():
        assert machine.is_cpu
        assert machine.gpu.memory == machine.cpu_memory / 2


@pytest.mark.parametrize("version", [1, 2])
def test_the_least_of_all_control_groups_counts(tmp_path, monkeypatch, version):
    """SLURM limits a job two levels above the process, and leaves the root alone."""
    prefix, folder, name = {1: ("4:memory:", "memory", "memory.limit_in_bytes"), 2: ("0::", "", "memory.max")}[version]
    (tmp_path / "own").write_text(f"1:name=systemd:/\n{prefix}/slurm/job_7/step_0/task\n", encoding="utf-8")
    groups = tmp_path / "groups" / folder
    (groups / "slurm/job_7/step_0/task").mkdir(parents=True)
    free = {1: "9223372036854771712", 2: "max"}[version]
    for path, limit in (("", free), ("slurm/job_7", "1000000\n"), ("slurm/job_7/step_0/task", free)):
        (groups / path / name).write_text(limit, encoding="utf-8")
    monkeypatch.setattr(hardware, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(hardware, "GROUPS", tmp_path / "groups")
    assert hardware.cpu_memory() == 1e6
    (groups / "slurm/job_7" / name).write_text(free, encoding="utf-8")
    assert hardware.cpu_memory() > 2**30
    (groups / name).write_text("2000000", encoding="utf-8")
    assert hardware.cpu_memory() == 2e6


def test_the_default_run_has_a_plan():
    budget = Budget.of(finish(compose_run({})), this_machine(1))
    assert budget.misfit is None
    assert budget.gpu_memory < GIB


def test_a_folder_is_read_as_training_reads_it(tmp_path):
    """Weights that a newer diffusers saved have settings that this one's class does not know."""
    shutil.copytree(CONF.parent / "train" / "assets" / "shapes_base", tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    file.write_text(
        json.dumps({**json.loads(file.read_text(encoding="utf-8")), "of_a_newer_version": 1}), encoding="utf-8"
    )
    config = run_config(tmp_path, model__path=tmp_path / "base")
    assert load_adapter(config.model, None, 0).attention_shape[0] == Budget.of(config, this_machine(1)).sizes.layers
