"""Offloading block by block with a stream, as on a GPU: diffusers' hooks must not undo ours."""

import contextlib

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.hooks import group_offloading

from tests.helpers.generating import latent
from tests.helpers.tiny_pipelines import save_pipeline


class NoStream:
    def synchronize(self):
        pass


class Backend:
    """What diffusers asks of torch.cuda."""

    def __init__(self, *_):
        pass

    def stream(self, _):
        return contextlib.nullcontext()

    def current_stream(self):
        return NoStream()


def with_a_stream(self, onload_device, offload_type, num_blocks_per_group, use_stream):
    config = group_offloading.GroupOffloadingConfig(
        onload_device=onload_device,
        offload_device=torch.device("cpu"),
        offload_type=group_offloading.GroupOffloadingType(offload_type),
        non_blocking=False,
        record_stream=False,
        low_cpu_mem_usage=False,
        num_blocks_per_group=num_blocks_per_group,
        stream=NoStream(),
    )
    group_offloading._apply_group_offloading(self, config)


@contextlib.contextmanager
def pinned(self):
    yield self.cpu_param_dict


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return save_pipeline("wan", tmp_path_factory.mktemp("offload") / "wan")


def test_every_step_has_its_own_attention(wan, monkeypatch):
    given = {"decay": 0.4, "dense_layers": 1, "dense_steps": 1, "backend": "torch"}
    expected = latent(wan, **given)
    monkeypatch.setattr(group_offloading, "TorchDeviceBackend", Backend)
    monkeypatch.setattr(group_offloading.ModuleGroup, "_to_cpu", staticmethod(lambda tensor, _: tensor.data.clone()))
    monkeypatch.setattr(group_offloading.ModuleGroup, "_pinned_memory_tensors", pinned)
    monkeypatch.setattr(WanTransformer3DModel, "enable_group_offload", with_a_stream)
    got = latent(wan, **given, offload="block")
    assert got.dense == expected.dense == [True, False, False, False]
    assert len(got.seconds) == 4
    torch.testing.assert_close(got.latent, expected.latent)
