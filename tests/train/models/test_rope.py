"""Temporal rotary embedding past the native length, against a plain restatement of the frequency tables."""

import math

import pytest
import torch
from diffusers import WanTransformer3DModel
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from radial import Dense
from tests.helpers import generating
from tests.helpers.attention import step_attention
from tests.helpers.tiny import ARCHITECTURE, run_config
from tests.helpers.tiny_pipelines import save_pipeline
from train.config.compose import compose_run, finish
from train.config.schema import ROPE_KINDS as KINDS
from train.errors import UserError
from train.models.families.hunyuan import HunyuanAdapter
from train.models.families.hunyuan15 import Hunyuan15Adapter
from train.models.families.mochi import MochiAdapter
from train.models.families.wan import WanAdapter
from train.models.loading import load_adapter, temporal_rope
from train.models.rope import TemporalRope
from train.preflight import preflight
from train.run import RunFolder, train


def restated(kind, theta, pairs, native, k, frames):
    """Angle of frame p and pair j, one by one."""
    table = []
    for p in range(frames):
        row = []
        for j in range(pairs):
            position, frequency = float(p), theta ** (-2 * j / (2 * pairs))
            if frames > native and kind == "interpolate":
                position = p * (native - 1) / (frames - 1)
            if frames > native and kind == "riflex" and j == k - 1:
                frequency = min(frequency, 0.9 * 2 * math.pi / frames)
            row.append(position * frequency)
        table.append(row)
    return torch.tensor(table, dtype=torch.float64)


@given(
    kind=st.sampled_from(KINDS), theta=st.sampled_from([256.0, 10000.0]), pairs=st.integers(1, 22),
    native=st.integers(1, 40), frames=st.integers(1, 90), data=st.data(),
)  # fmt: skip
def test_tables_are_the_restated_ones(kind, theta, pairs, native, frames, data):
    k = data.draw(st.integers(1, pairs))
    own = theta ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    kept = own.clone()
    got = TemporalRope(kind, native, k).angles(own, frames)
    torch.testing.assert_close(got, restated(kind, theta, pairs, native, k, frames), rtol=1e-12, atol=1e-12)
    assert torch.equal(own, kept)


@pytest.mark.parametrize("frames", [41, 81])
def test_what_the_options_are_for(frames):
    """Wan: 21 latent frames of native length; 44 of a head's 128 channels turn with time."""
    own = 10000 ** (-torch.arange(22, dtype=torch.float64) / 22)
    ordinary, riflex, squeezed = (TemporalRope(kind, 21, 6).angles(own, frames) for kind in KINDS)
    assert torch.equal(ordinary, torch.outer(torch.arange(frames, dtype=torch.float64), own))
    changed = (riflex != ordinary).any(0)
    # at 41 frames its own frequency goes round less than once already
    assert changed.tolist() == [pair == 5 and frames == 81 for pair in range(22)]
    assert (riflex <= ordinary).all()  # slowed, never quickened
    assert 0.7 * 2 * math.pi < riflex[-1, 5] < 2 * math.pi  # less than one turn in the whole clip
    torch.testing.assert_close(squeezed[-1], 20 * own, rtol=1e-12, atol=0)  # the last frame lies where training's did
    assert not any(TemporalRope(kind, 21, 6).changes(21) for kind in KINDS)


def tiny_wan(rope):
    adapter = WanAdapter.from_config(ARCHITECTURE, text_tokens=32)
    adapter.rope = rope
    return adapter


@pytest.mark.parametrize("kind", KINDS)
def test_wans_rotary_angles_are_the_restated_ones(kind):
    """Temporal columns of the cosines and sines that reach the layers; the spatial ones stay as the model has them."""
    x = torch.empty(1, 3, 7, 12, 20)  # 7 frames of 3 x 5 tokens
    cos, sin = tiny_wan(TemporalRope(kind, 4, 1)).transformer.rope(x)
    own_cos, own_sin = WanTransformer3DModel(**ARCHITECTURE).rope(x)
    channels = tiny_wan(TemporalRope()).transformer.rope.t_dim
    angles = restated(kind, 10000.0, channels // 2, 4, 1, 7).repeat_interleave(2, 1).repeat_interleave(15, 0)
    for got, own, expected in ((cos, own_cos, angles.cos()), (sin, own_sin, angles.sin())):
        assert got.shape == own.shape
        assert got.dtype == own.dtype
        torch.testing.assert_close(got[0, :, 0, :channels].double(), expected, rtol=0, atol=1e-6)
        assert torch.equal(got[..., channels:], own[..., channels:])
        assert torch.equal(got, own) == (kind == "default")


@pytest.mark.parametrize("family", [HunyuanAdapter, Hunyuan15Adapter])
@pytest.mark.parametrize("kind", KINDS)
def test_hunyuans_rotary_angles_are_the_restated_ones(family, kind):
    adapter = family.from_config(family.tiny_config, text_tokens=8)
    x = torch.empty(1, 4, 7, 3 * adapter.patch[1], 5 * adapter.patch[2])  # 7 frames of 3 x 5 tokens
    own = adapter.transformer.rope(x)
    adapter.rope = TemporalRope(kind, 4, 1)
    channels = family.tiny_config["rope_axes_dim"][0]
    angles = restated(kind, 256.0, channels // 2, 4, 1, 7).repeat_interleave(2, 1).repeat_interleave(15, 0)
    for got, plain, expected in zip(adapter.transformer.rope(x), own, (angles.cos(), angles.sin()), strict=True):
        torch.testing.assert_close(got[:, :channels].double(), expected, rtol=0, atol=1e-6)
        assert torch.equal(got[:, channels:], plain[:, channels:])


@pytest.mark.parametrize("kind", ["default", "interpolate"])
def test_mochis_rotary_angles_mix_the_axes_at_the_restated_positions(kind):
    adapter = MochiAdapter.from_config(MochiAdapter.tiny_config, text_tokens=8)
    model = adapter.transformer
    adapter.rope = TemporalRope(kind, 4)
    torch.manual_seed(0)
    frequencies = 0.1 * torch.randn(3, 4, 8)
    positions = model.rope._get_positions(7, 3, 5, dtype=torch.float32).double()
    if kind == "interpolate":
        positions[:, 0] *= 3 / 6
    angles = (positions[:, :, None, None] * frequencies.double()).sum(1)
    for got, expected in zip(
        model.rope(frequencies, 7, 3, 5, dtype=torch.float32), (angles.cos(), angles.sin()), strict=True
    ):
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5)
    assert not adapter.rope.changes(4)


@torch.no_grad()
def test_a_models_output_changes_past_the_native_length_alone():
    outputs = {}
    for frames in (4, 7):
        x = torch.randn(1, 3, frames, 12, 20, generator=torch.Generator().manual_seed(0))
        for kind in KINDS:
            torch.manual_seed(0)
            adapter = tiny_wan(TemporalRope(kind, 4, 1))
            adapter.set_attention(step_attention(Dense(), adapter.grid(x), block=16))
            torch.manual_seed(1)
            outputs[frames, kind] = adapter.velocity(x, torch.tensor([0.5]), adapter.random_conditions(x))
    for kind in ("riflex", "interpolate"):
        assert torch.equal(outputs[4, kind], outputs[4, "default"])
        assert (outputs[7, kind] - outputs[7, "default"]).abs().max() > 1e-4


def test_the_option_reaches_training_sampling_and_the_exported_header(tmp_path):
    config = run_config(tmp_path, rope="riflex", model__native_frames=4, trainer__steps=1)
    preflight(config)
    assert load_adapter(config.model, torch.float32, 0).rope == TemporalRope("riflex", 4, WanAdapter.riflex)
    folder = RunFolder.create(config)
    train(config, folder)
    plain = run_config(tmp_path, model__native_frames=4, trainer__steps=1)
    other = RunFolder.create(plain)
    train(plain, other)
    first, second = ((path / "metrics.csv").read_text(encoding="utf-8") for path in (folder.path, other.path))
    assert first != second
    with safe_open(folder.path / "export" / "diffusers" / "pytorch_lora_weights.safetensors", "pt") as file:
        assert file.metadata()["radial.rope"] == "riflex"


def test_sampling_is_the_stock_pipeline_with_the_restated_table(tmp_path):
    """9 latent frames by a model of 5: the pipeline's own table is overwritten with squeezed positions."""
    folder = save_pipeline("wan", tmp_path / "wan")

    def squeeze(pipeline):
        rope = pipeline.transformer.rope
        angles = restated("interpolate", 10000.0, rope.t_dim // 2, 5, 1, 9).repeat_interleave(2, 1)
        for table, turned in ((rope.freqs_cos, angles.cos()), (rope.freqs_sin, angles.sin())):
            table[:9, : rope.t_dim] = turned.to(table)

    settings = {"pattern": "dense", "model__native_frames": 17}
    plain, squeezed = (generating.latent(folder, **settings, **more).latent for more in ({}, {"rope": "interpolate"}))
    generating.close(plain, generating.stock(folder))
    generating.close(squeezed, generating.stock(folder, squeeze))
    assert (squeezed - plain).abs().max() > 1e-2
    with pytest.raises(UserError, match="rope=riflex slows frequency 6 of 4"):
        generating.latent(folder, **settings, rope="riflex")


def test_native_lengths_are_in_latent_frames():
    model = finish(compose_run({"conf": "wan_4x", "rope": "interpolate"})).model
    assert temporal_rope(model) == TemporalRope("interpolate", 21, 6)
    model = finish(compose_run({"conf": "wan22_5b_4x", "rope": "riflex"})).model
    assert temporal_rope(model) == TemporalRope("riflex", 31, 6)


def test_what_cannot_be_done_is_refused():
    with pytest.raises(UserError, match="rope=riflex needs model.native_frames, it is not set"):
        preflight(finish(compose_run({"rope": "riflex", "model.native_frames": "null"})))
    with pytest.raises(
        UserError, match="rope=riflex cannot serve .* mochi: its frequencies are learned mixtures of time"
    ):
        preflight(finish(compose_run({"conf": "mochi_2x", "rope": "riflex"})))
    with pytest.raises(UserError, match="rope=riflex cannot serve .* hunyuan15: which of its frequencies to slow down"):
        preflight(finish(compose_run({"conf": "hunyuan15_2x", "rope": "riflex"})))
    with pytest.raises(UserError, match="rope=riflex cannot serve .* minimax_h3: time, height and width share"):
        preflight(finish(compose_run({"conf": "minimax_h3_2x", "rope": "riflex"})))
    assert temporal_rope(finish(compose_run({"conf": "mochi_2x", "rope": "interpolate"})).model).native_frames == 28
    assert temporal_rope(finish(compose_run({"conf": "hunyuan_4x", "rope": "riflex"})).model).intrinsic == 4
