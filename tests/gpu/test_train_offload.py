"""Offload to page-locked memory on a GPU: what comes back is what went out, and the memory is free meanwhile."""

import pytest
import torch

from train.memory.offload import Offload

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def test_tensors_come_back_while_others_go_out():
    offload = Offload()
    generator = torch.Generator("cuda").manual_seed(0)
    for _ in range(3):  # buffers are used again
        tensors = [torch.randn(64, 1024, 128, device="cuda", generator=generator) for _ in range(6)]
        sums = [x.double().sum().item() for x in tensors]
        before = torch.cuda.memory_allocated()
        stored = [offload.put(x) for x in tensors]
        tensors.clear()
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() < before - 5 * 64 * 1024 * 128 * 4
        for handle, expected in zip(reversed(stored), reversed(sums), strict=True):
            assert offload.get(handle).double().sum().item() == expected
    assert len(offload.spare) == 6


def test_locked_memory_is_unlocked_with_its_owner():
    x = torch.randn(64, 1024, 1024, device="cuda")
    for _ in range(3):  # CUDA refuses to lock an address twice, and memory of this size comes to lie where it was
        offload = Offload()
        assert torch.equal(offload.get(offload.put(x)), x)
        assert offload.locked == x.nbytes
        del offload
