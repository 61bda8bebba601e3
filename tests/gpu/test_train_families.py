"""One LoRA step of two layers of each family at its longest clip, at the real shapes, with the fast backend."""

import pytest
import torch

from radial import build_layout, make_pattern
from radial.backends import AttentionCall, choose_backend
from tests.helpers.family_steps import config_of, longest_runs, step_of_two_layers
from train.models.families import family_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.whole_gpu
@pytest.mark.parametrize("run", sorted(longest_runs().values()))
def test_a_step_of_two_layers_at_the_real_shapes(run):
    config = config_of(run)
    family = family_of(config.model)
    with torch.device("meta"):
        adapter = family.from_config(family.cut(config.model.dimensions, 2), text_tokens=config.model.text_tokens)
        grid = adapter.grid(torch.empty(1, adapter.latent_channels, *config.latent_size()))
    layout = build_layout(make_pattern("released"), grid)
    head_dim = adapter.attention_shape[2]
    call = AttentionCall(torch.device("cuda"), torch.bfloat16, head_dim, True, grid.text_tokens > 0, layout)
    backend = choose_backend(call, None).name
    result = step_of_two_layers(config)
    print(
        f"{run}: {grid.tokens:,} tokens, {backend}, {result.step:.2f} s, {result.layer:.2f} s a layer, "
        f"{result.memory:.1f} GiB, {result.tflops:.0f} TFLOP/s"
    )
    assert backend in ("fa4", "flex")
    assert result.layers == 2
    assert result.tokens == grid.tokens
    assert 0 < result.memory < torch.cuda.get_device_properties(0).total_memory / 2**30
