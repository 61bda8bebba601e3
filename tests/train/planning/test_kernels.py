"""The plan, the doctor and the start of a run say which backend attention trains on, by the backends' own word."""

from dataclasses import replace

import pytest
import torch

from launch import doctor
from launch.plan import main as plan
from radial import Released, VideoGrid, build_layout
from radial.backends import BACKENDS
from radial.backends.op import Kept
from tests.helpers.tiny import run_config
from tests.helpers.traced import Live
from train.callbacks.watchdog import patience
from train.config.compose import compose_run, finish
from train.errors import UserError
from train.planning import GIB, GPUS, Budget, Duration, Machine, remedies, this_machine, without_kernel
from train.planning.calibration import PLAIN_ATTENTION
from train.planning.kernels import training_backend
from train.preflight import check_backend
from train.run import warn_where_attention_is_slow


def planned(gpu, conf="wan_4x", **words):
    config = finish(compose_run({"conf": conf, **{k.replace("__", "."): str(v) for k, v in words.items()}}))
    budget = Budget.of(config, Machine(GPUS[gpu], 8, 1, 1024 * GIB))
    assert budget is not None
    return budget


@pytest.mark.parametrize(
    ("gpu", "words", "backend", "beside"),
    [
        ("h200", {}, "fa4", "fa4"),
        ("h100", {"attention__block": 64}, "torch", "fa4"),
        ("h200", {"attention__block": 64, "conf": "hunyuan_2x"}, "torch", "fa4"),
        ("h200", {"trainer__precision": "fp32"}, "flex", "sdpa"),
        ("h200", {"attention__block": 64, "trainer__precision": "fp32"}, "flex", "sdpa"),
        ("h200", {"attention__pattern": "dense", "attention__dense_layers": 0}, "fa4", "fa4"),
        ("h200", {"attention__backend": "flex"}, "flex", "fa4"),
        ("a100", {}, "flex", "sdpa"),
        ("a100", {"attention__pattern": "dense", "attention__dense_layers": 0}, "sdpa", "sdpa"),
        ("a100", {"attention__block": 64}, "flex", "sdpa"),
        ("rtx5090", {"attention__block": 64}, "flex", "sdpa"),
    ],
)
def test_the_backend_of_a_planned_gpu(gpu, words, backend, beside):
    budget = planned(gpu, **words)
    assert training_backend(budget) == backend and training_backend(budget, beside=True) == beside
    assert (Duration(budget).step is None) == (backend == "torch")
    assert (without_kernel(budget) is None) == (backend != "torch")


@pytest.mark.parametrize(("dtype", "block"), [(torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float32, 64)])
def test_the_memory_of_plain_attention_is_counted(dtype, block):
    """Its backward's peak, beside its inputs, in tensors of their size: the same at every length."""
    grid = VideoGrid(9, 16, 24, 20)
    q, k, v, grad = (torch.randn(1, grid.tokens, 3, 128, dtype=dtype) for _ in range(4))
    layout = build_layout(Released(), grid, block)
    kept = Kept(q, k, v, q, q.new_empty(0), layout, None, 0.1)
    with Live() as live:
        BACKENDS["torch"].backward(grad, kept)
    assert live.peak / q.nbytes == pytest.approx(PLAIN_ATTENTION[q.element_size()], rel=0.1)


def test_a_run_without_a_kernel_needs_more_memory():
    kernel, plain = (planned("h200", attention__block=block, parallel__activations="full") for block in (128, 64))
    assert plain.layer.running("full") - kernel.layer.running("full") == pytest.approx(34 * plain.layer.hidden)
    assert not kernel.layer.plain_attention


def test_the_plan_says_where_attention_has_no_kernel(capsys):
    plan(["conf=wan_4x", "gpus=8", "attention.block=64"])
    text = capsys.readouterr().out
    assert "attention on torch" in text and "no times: nobody measured torch as a run's attention on a GPU" in text
    (warning,) = (line for line in text.splitlines() if line.startswith("warning: "))
    assert warning == (
        "warning: attention trains on plain torch, many times slower than on a kernel, and no plan knows how slow: fa4 "
        "does not serve (the layout's blocks are 64 tokens, its tiles 128); attention.block=128 trains on fa4"
    )
    assert "fewest GPUs" in text  # memory is planned all the same
    plan(["conf=wan_4x", "gpus=8"])
    text = capsys.readouterr().out
    assert "attention on fa4" in text and "warning" not in text and "hours of 2,500 steps" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["gpu=a100", "attention.backend=fa4"],
            "is fa4, which cannot train .* an NVIDIA A100: its schedule",
        ),
        (["attention.backend=flashinfer"], "is flashinfer, which cannot train .*: it runs forward only"),
        (["attention.block=64", "attention.backend=flex"], "is flex, which cannot train .* tiles of 128 tokens"),
    ],
)
def test_a_named_backend_that_cannot_train_is_refused(words, message):
    with pytest.raises(UserError, match=f"attention.backend {message}.*; set attention.backend=null"):
        plan(["conf=wan_4x", *words])


def test_a_remedy_is_no_gpu_on_which_the_named_backend_cannot_train():
    """FlexAttention takes blocks of 64 on the small card and on an A100, and none of Hopper's."""
    tight = planned("rtx5090", attention__block=64, attention__backend="flex", clip__frames=161)
    tight = replace(tight, machine=replace(tight.machine, gpus=1, cpu_memory=64 * GIB))
    assert not any("gpu=h" in line for line in remedies(tight, 8))


@pytest.fixture
def hopper(monkeypatch):
    """This machine as one with a Hopper GPU, whose libraries are those that are installed."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    gpu = replace(GPUS["h200"], here=True)
    monkeypatch.setattr(
        "train.planning.budget.this_machine", lambda devices, nodes: Machine(gpu, devices, nodes, 1024 * GIB)
    )


def test_a_run_begins_with_it(hopper, capsys):
    config = finish(compose_run({"conf": "wan_4x", "attention.block": "64"}))
    warn_where_attention_is_slow(config)
    said = capsys.readouterr().out
    assert said.startswith("warning: attention trains on plain torch") and said.count("\n") == 1
    assert said.endswith("; trainer.timeout=540 has to be longer than a forward and than a backward, in seconds\n")
    assert patience(config) == 540
    warn_where_attention_is_slow(finish(compose_run({"conf": "wan_4x"})))
    assert not capsys.readouterr().out
    with pytest.raises(UserError, match=r"attention.backend is flashinfer, .* forward only"):
        check_backend(finish(compose_run({"conf": "wan_4x", "attention.backend": "flashinfer"})))


def test_what_is_installed_counts_where_the_gpu_is_here(hopper, monkeypatch):
    budget = Budget.here(finish(compose_run({"conf": "wan_4x"})))
    assert budget is not None
    for problem, backend in ((None, "fa4"), ("flash-attn-4 does not import", "flex")):
        monkeypatch.setattr("radial.backends.fa4.backend.import_problem", lambda *_, found=problem: found)
        assert training_backend(budget) == backend
        assert Duration(budget).step is not None


def test_the_doctor_says_it(hopper):
    found = [str(f) for f in doctor.attention(finish(compose_run({"conf": "wan_4x", "attention.block": "64"})))]
    assert any(line.startswith("note     attention    fa4: the layout's blocks are 64 tokens") for line in found)
    assert any(line.startswith("note     attention    flex: torch's backward for torch.bfloat16") for line in found)
    assert found[-1].startswith("note     attention    attention trains on plain torch")


def test_a_cpu_has_no_kernel_and_no_warning(tmp_path, capsys):
    config = run_config(tmp_path)
    budget = Budget.of(config, this_machine(1))
    assert budget is not None and training_backend(budget) == "torch" and without_kernel(budget) is None
    warn_where_attention_is_slow(config)
    assert not capsys.readouterr().out
