"""Layers whose weights come one by one while a clip is generated."""

import pytest
import torch

from tests.helpers.generating import generator, latent
from tests.helpers.tiny_pipelines import save_pipeline


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return save_pipeline("wan", tmp_path_factory.mktemp("offload") / "wan")


def test_every_step_has_its_own_attention(wan):
    given = {"decay": 0.4, "dense_layers": 1, "dense_steps": 1, "backend": "torch"}
    expected = latent(wan, **given)
    made = generator(wan, **given, offload="layer")
    got = made.denoise(made.todo[0], made.prompts[0], made.attention)
    assert got.dense == expected.dense == [True, False, False, False]
    assert len(got.seconds) == 4
    assert torch.equal(got.latent, expected.latent)
    layers = made.extension.adapters[0].layers()
    places = {p.untyped_storage().data_ptr() for layer in layers for p in layer.parameters()}
    assert len(places) == 2 < len(layers)
