"""The Wan adapter against the stock diffusers model, and against a model whose attention is a masked softmax."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig

from data.shards.sample import TextTokens
from radial import Dense, Paper, Released
from tests.helpers.attention import step_attention
from tests.helpers.families import Perfect, build, conditions, latents
from tests.helpers.oracles import masked_softmax
from tests.helpers.tiny import ARCHITECTURE, save_model
from train.errors import UserError
from train.flow import noised
from train.lora.layers import inject_lora, lora_parameters
from train.models.conditions import Conditions
from train.models.families.wan import WanAdapter, WanSelfAttention


@pytest.fixture
def batch():
    torch.manual_seed(1)
    x = torch.randn(2, 3, 9, 16, 32)
    tokens = torch.randn(2, 32, 64)
    text = Conditions({"text": TextTokens(tokens, torch.ones(2, 32, dtype=torch.bool))})
    return x, torch.tensor([0.3, 0.9]), text


def stock(folder, x, sigma, text):
    model = WanTransformer3DModel.from_pretrained(folder)
    return model, model(x, 1000 * sigma, text.text["text"].tokens, return_dict=False)[0]


def load(folder):
    return WanAdapter.load(folder, text_tokens=32, dtype=torch.float32)


def plan_for(adapter, x, pattern, block=16, **settings):
    return step_attention(pattern, adapter.grid(x), block=block, **settings)


@pytest.mark.parametrize("backend", ["sdpa", "torch"])
def test_dense_equals_the_stock_model(tmp_path, batch, backend):
    folder = save_model(tmp_path / "model")
    _, expected = stock(folder, *batch)
    adapter = load(folder)
    x, sigma, text = batch
    adapter.set_attention(plan_for(adapter, x, Dense(), backend=backend))
    torch.testing.assert_close(adapter.velocity(x, sigma, text), expected, rtol=0, atol=1e-5)


def test_lora_gradients_equal_the_stock_model_with_peft(tmp_path, batch):
    folder = save_model(tmp_path / "model")
    x, sigma, text = batch
    adapter = load(folder)
    names = inject_lora(adapter.transformer, 4, 8, adapter.lora_targets, seed=3)
    assert len(names) == 4 * ARCHITECTURE["num_layers"]
    model, _ = stock(folder, x, sigma, text)
    torch.manual_seed(3)
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=adapter.lora_targets))
    torch.manual_seed(4)
    for ours, theirs in zip(adapter.transformer.named_parameters(), model.named_parameters(), strict=True):
        if ours[1].requires_grad:
            value = torch.randn_like(ours[1])
            ours[1].data.copy_(value)
            theirs[1].data.copy_(value)
    adapter.set_attention(plan_for(adapter, x, Dense()))
    adapter.velocity(x, sigma, text).square().mean().backward()
    model(x, 1000 * sigma, text.text["text"].tokens, return_dict=False)[0].square().mean().backward()
    compared = 0
    for (name, ours), (_, theirs) in zip(adapter.transformer.named_parameters(), model.named_parameters(), strict=True):
        assert ours.requires_grad == ("lora_" in name)
        if ours.requires_grad:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
            assert ours.grad.abs().max() > 0
            compared += 1
    assert compared == 2 * len(names) == len(lora_parameters(adapter.transformer))


@pytest.mark.parametrize("pattern", [Released(), Released(0.5, "ports"), Paper()])
@pytest.mark.parametrize("dense_layers", [0, 2])
def test_patterns_equal_a_masked_softmax_model(tmp_path, batch, pattern, dense_layers):
    """The oracle is the stock processor's arithmetic in float64 with the layout as an attention mask."""
    folder = save_model(tmp_path / "model")
    _, sigma, text = batch
    x = torch.randn(2, 3, 12, 32, 32)
    adapter = load(folder)
    plan = plan_for(adapter, x, pattern, dense_layers=dense_layers)
    assert not plan.pattern_layout.is_dense
    adapter.set_attention(plan)
    got = adapter.velocity(x, sigma, text)

    class Oracle(WanSelfAttention):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
            q, k = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
            q, k, v = (t.unflatten(2, (attn.heads, -1)).double() for t in (q, k, attn.to_v(hidden_states)))
            cos, sin = rotary_emb
            turn = torch.complex(cos[..., 0::2].double(), sin[..., 1::2].double())
            q, k = (torch.view_as_complex(t.unflatten(-1, (-1, 2))) * turn for t in (q, k))
            q, k = (torch.view_as_real(t).flatten(3) for t in (q, k))
            out = masked_softmax(q, k, v, self.layout, None, q.shape[-1] ** -0.5)
            return attn.to_out[0](out.flatten(2).float())

    for layer, block in enumerate(adapter.transformer.blocks):
        oracle = Oracle()
        oracle.layout = plan.layout(layer)
        block.attn1.set_processor(oracle)
    torch.testing.assert_close(got, adapter.velocity(x, sigma, text), rtol=0, atol=1e-5)
    dense = load(folder)
    dense.set_attention(plan_for(dense, x, Dense()))
    assert (got - dense.velocity(x, sigma, text)).abs().max() > 1e-4


def test_checkpointing_gives_the_same_gradients(tmp_path, batch):
    folder = save_model(tmp_path / "model")
    x, sigma, text = batch
    gradients = []
    for checkpointing in (False, True):
        adapter = load(folder)
        inject_lora(adapter.transformer, 4, 8, adapter.lora_targets, seed=3)
        if checkpointing:
            adapter.transformer.enable_gradient_checkpointing()
        adapter.transformer.train()
        adapter.set_attention(plan_for(adapter, x, Released()))
        adapter.velocity(x, sigma, text).square().mean().backward()
        gradients.append([p.grad for p in adapter.transformer.parameters() if p.requires_grad])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_short_text_is_padded_as_in_the_familys_training(tmp_path, batch):
    """Text is not masked, so the zeros after it count: shards may store it cut or whole, and give the same."""
    folder = save_model(tmp_path / "model")
    x, sigma, _ = batch
    tokens, mask = torch.randn(2, 7, 64), torch.ones(2, 7, dtype=torch.bool)
    whole = torch.cat([tokens, torch.zeros(2, 512 - 7, 64)], dim=1)
    _, expected = stock(folder, x, sigma, Conditions({"text": TextTokens(whole, mask)}))
    adapter = WanAdapter.load(folder, text_tokens=512, dtype=torch.float32)
    adapter.set_attention(plan_for(adapter, x, Dense()))
    got = adapter.velocity(x, sigma, Conditions({"text": TextTokens(tokens, mask)}))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="the shards' text has 513 tokens"):
        adapter.velocity(x, sigma, Conditions({"text": TextTokens(torch.zeros(2, 513, 64), mask)}))


def test_another_family_is_refused(tmp_path):
    folder = save_model(tmp_path / "model")
    config = folder / "config.json"
    config.write_text(
        config.read_text(encoding="utf-8").replace("WanTransformer3DModel", "MochiTransformer3DModel"), encoding="utf-8"
    )
    with pytest.raises(UserError, match=r"holds a MochiTransformer3DModel, expected a WanTransformer3DModel"):
        WanAdapter.load(folder, text_tokens=512, dtype=torch.float32)


def test_an_euler_step_with_the_true_velocity_returns_the_clean_latent():
    """The direction and scale of the objective, held to the scheduler that the family's pipelines use."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(sigmas=[0.7])
    adapter = build("wan")
    latent = latents(adapter, (3, 4, 5))
    noise = torch.randn(latent.shape)
    sigma = scheduler.sigmas[:1].expand(2)
    x, target = noised(latent, noise, sigma)
    perfect = Perfect(adapter, noise - latent)
    velocity = adapter.velocity(x, sigma, conditions(adapter, latent))
    torch.testing.assert_close(velocity, target)
    torch.testing.assert_close(perfect.told["timestep"], scheduler.timesteps.expand(2))
    clean = scheduler.step(velocity, scheduler.timesteps[0], x, return_dict=False)[0]
    torch.testing.assert_close(clean, latent, rtol=0, atol=1e-5)
