"""The self-check of backends: right ones pass, wrong ones are refused, and what was found is kept."""

import json
import subprocess
from types import SimpleNamespace

import pytest
import torch

from radial.__main__ import main
from radial.backends import BACKENDS, self_check
from radial.backends.torch_blocks import TorchBlocks
from radial.errors import RadialError

CPU = torch.device("cpu")


class Wrong(TorchBlocks):
    """Right but for the gradient of v, which a forward alone would not show."""

    name = "wrong"

    def backward(self, grad, kept):
        dq, dk, dv = super().backward(grad, kept)
        return dq, dk, dv * 1.05


class Broken(TorchBlocks):
    name = "broken"

    def forward(self, *arguments):
        raise ValueError("no such kernel")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(BACKENDS, "wrong", Wrong())
    monkeypatch.setitem(BACKENDS, "broken", Broken())
    self_check.why_unproven.cache_clear()
    yield tmp_path / "radial-lora" / "backends.json"
    self_check.why_unproven.cache_clear()


def in_this_process(monkeypatch):
    """Runs the check's command here, where the registry has the backends of this test."""
    calls = []

    def run(command, **_):
        calls.append(command)
        try:
            main.run(command[3:])
        except (RadialError, SystemExit) as error:
            return SimpleNamespace(stderr=f"error: {error}", returncode=2)
        return SimpleNamespace(stderr="", returncode=0)

    monkeypatch.setattr(self_check, "subprocess", SimpleNamespace(run=run, TimeoutExpired=subprocess.TimeoutExpired))
    return calls


def test_a_right_backend_passes_once(monkeypatch, cache, capsys):
    calls = in_this_process(monkeypatch)
    for _ in range(2):
        assert self_check.why_unproven("torch", CPU, torch.float32, 32) is None
        self_check.why_unproven.cache_clear()
    assert len(calls) == 1
    assert "torch        right" in capsys.readouterr().out
    (entry,) = json.loads(cache.read_text(encoding="utf-8"))
    assert entry["of"]["backend"] == "torch" and entry["of"]["torch"] == torch.__version__ and entry["error"] < 1e-5


def test_a_wrong_gradient_is_refused(monkeypatch, cache):
    in_this_process(monkeypatch)
    said = self_check.why_unproven("wrong", CPU, torch.float32, 32)
    assert said is not None and said.startswith("its results on this GPU are wrong, 5.0% off")
    monkeypatch.setattr(self_check, "place", lambda device: {"driver": "another"})
    assert self_check.known("wrong", CPU, torch.float32, 32) is None  # another driver: another check


def test_one_that_does_not_run_is_refused_and_not_kept(monkeypatch, cache):
    in_this_process(monkeypatch)
    said = self_check.why_unproven("broken", CPU, torch.float32, 32)
    assert said is not None and "did not end" in said
    assert not cache.exists()


def test_a_damaged_cache_is_as_none(cache):
    cache.parent.mkdir()
    cache.write_text("[{", encoding="utf-8")
    assert self_check.known("torch", CPU, torch.float32, 32) is None


@pytest.mark.parametrize(("name", "said"), [("wrong", "wrong results of wrong"), ("broken", "no such kernel")])
def test_the_command_names_what_is_wrong(name, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main.run(["backends", "--check", f"backend={name}", "head_dim=32"])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--check", "backend=sdpa"], "backend sdpa cannot be checked here: it computes all blocks"),
        (["--check", "backend=fa4"], "backend fa4 cannot be checked here: "),
        (["backend=torch"], "backend is of check=true"),
        (["dtype=float16"], "dtype is of check=true"),
    ],
)
def test_what_cannot_be_checked_is_not_called_wrong(words, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main.run(["backends", "head_dim=32", *words])
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {said}") and not captured.out
