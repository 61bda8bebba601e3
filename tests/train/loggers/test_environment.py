"""What a run notes of the machine that it runs on."""

from types import SimpleNamespace

import pytest
import torch

from train.config.compose import compose_run, finish
from train.loggers.environment import environment
from train.planning import Budget, resolve_precision, this_machine


def test_the_memory_is_the_containers_and_torchs_version_names_its_build(monkeypatch):
    monkeypatch.setattr("train.planning.hardware.group_limits", lambda: iter([3 * 2.0**30, 2.0**40]))
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    about = environment()
    assert about["memory_gib"] == 3 and about["packages"]["torch"] == "2.11.0+cu130"


@pytest.mark.parametrize(
    ("name", "native"), [("cpu", True), ("cpu", False), ("Tesla V100", False), ("NVIDIA A100", True)]
)
def test_training_and_its_plan_agree_on_what_auto_is(monkeypatch, name, native):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: name != "cpu")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name=name, total_memory=2**35))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: native)
    machine = this_machine(1)
    for asked, wanted in (("auto", "bf16" if native else "fp32"), ("bf16", "bf16"), ("fp32", "fp32")):
        config = finish(compose_run({"conf": "shapes_4x", "trainer.precision": asked}))
        budget = Budget.of(config, machine)
        assert resolve_precision(asked) == machine.precision(asked) == wanted
        assert budget is not None and budget.sizes.element == (2 if wanted == "bf16" else 4)
