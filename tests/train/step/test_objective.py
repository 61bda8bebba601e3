"""Training towards the guided velocity keeps what a model was distilled for; towards the data's own, it is lost."""

import csv

import pytest
import torch

from data.shards.batch import Batch, collate
from data.shards.sample import Prompt, Sample, TextTokens
from radial import Dense
from tests.helpers.attention import step_attention
from tests.helpers.families import build, conditions, latents, shards
from train.config.compose import compose_run, finish
from train.errors import UserError
from train.flow import SigmaSchedule, flow_loss, noise_like, noised
from train.lora.layers import inject_lora, lora_parameters
from train.measures.losses import clip_losses, loss_at
from train.models.conditions import Conditions
from train.run import RunFolder, train
from train.step.objective import Objective

WEIGHT, WORDS = 3.5, 6


def batch_of(x, seed=5):
    """Two captions and the empty prompt, all of them noise."""
    words = torch.randn(3, WORDS, 24, generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(2, WORDS, dtype=torch.bool)
    empty = Prompt({"text": TextTokens(words[2], mask[0])}, {})
    return Batch(
        keys=["a", "b"], latent=x, text={"text": TextTokens(words[:2], mask)}, pooled={}, image={}, step=0
    ), empty


@pytest.mark.parametrize(("weight", "kept"), [(None, 1 / WEIGHT), (WEIGHT, 1.0)])
def test_guidance_survives_training(weight, kept):
    """Of a model g that is distilled by construction: the data's velocity v is the one of which g = u + 3.5 (v - u)."""
    adapter = build("minimax_h3")
    inject_lora(adapter.transformer, 16, 16, adapter.targets(text=False), seed=0)
    x, sigma = latents(adapter, (2, 2, 2)), torch.tensor([0.3, 0.8])
    adapter.set_attention(step_attention(Dense(), adapter.grid(x), block=16))
    batch, empty = batch_of(x)
    objective = Objective(0, empty, distilled_guidance=weight)

    def velocity(conditions):
        return adapter.velocity(x, sigma, conditions)

    with torch.no_grad():
        guided, unguided = (
            velocity(side) for side in (Conditions.of(batch), Conditions.of(batch.with_prompt([0, 1], empty)))
        )
    data = unguided + (guided - unguided) / WEIGHT
    parameters = list(lora_parameters(adapter.transformer).values())
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        target = objective.target(adapter.transformer, data, batch, velocity)
        assert not target.requires_grad
        flow_loss(velocity(objective.drawn(batch)), target, None, adapter.patch).backward()
        optimizer.step()
    assert all(parameter.requires_grad for parameter in parameters)
    with torch.no_grad():
        tuned = velocity(Conditions.of(batch)) - unguided
    strength = (tuned * (guided - unguided)).sum() / (guided - unguided).square().sum()
    assert strength == pytest.approx(kept, abs=0.1)


def test_a_run_trains_towards_the_weight(tmp_path):
    """At weight 1 the target is the data's velocity: the frozen model's pass changes nothing else of a step."""
    losses = {}
    for weight in ("null", "1", "3.5"):
        settings = shards("minimax_h3", tmp_path / weight, (3, 3, 5)) | {"objective.distilled_guidance": weight}
        config = finish(compose_run({**settings, "objective.caption_dropout": "0", "parallel.activations": "full"}))
        folder = RunFolder.create(config)
        train(config, folder)
        with (folder.path / "metrics.csv").open(encoding="utf-8") as stream:
            losses[weight] = [float(row["loss"]) for row in csv.DictReader(stream) if row["loss"]]
    assert losses["1"] == pytest.approx(losses["null"], rel=1e-4)
    assert losses["3.5"] != pytest.approx(losses["null"], rel=1e-2)


def test_held_out_losses_are_to_the_target_and_a_lora_that_is_off_stays_off():
    adapter = build("minimax_h3")
    inject_lora(adapter.transformer, 4, 4, adapter.targets(text=False), seed=0)
    with torch.no_grad():
        for name, parameter in lora_parameters(adapter.transformer).items():
            parameter.add_(0.1 * ("lora_B" in name))
    x0, level = latents(adapter, (3, 2, 2))[:1], torch.tensor([0.6])
    batch, empty = batch_of(x0.repeat(2, 1, 1, 1, 1))
    clip = Sample(
        "a",
        x0[0],
        {"text": TextTokens(batch.text["text"].tokens[0], batch.text["text"].mask[0])},
        {},
        {},
        {"caption": ""},
    )

    def attention(latent, sigma):
        return step_attention(Dense(), adapter.grid(latent), block=16)

    def loss(weight):
        return loss_at(adapter, clip, x0.shape[2], 0.6, attention, Objective(0, empty, distilled_guidance=weight))

    adapter.set_attention(attention(x0, 0.6))
    x, v = noised(x0, noise_like(x0, 0, "validation", "a", x0.shape[2]), level)
    one = collate([clip], 0)
    with torch.no_grad():
        tuned = adapter.velocity(x, level, Conditions.of(one))
        adapter.transformer.disable_adapters()
        u, base = (adapter.velocity(x, level, Conditions.of(b)) for b in (one.with_prompt([0], empty), one))
        off = loss(WEIGHT)
        assert torch.equal(adapter.velocity(x, level, Conditions.of(one)), base)
        adapter.transformer.enable_adapters()
    target = u + WEIGHT * (v - u)
    assert off == pytest.approx((base - target).square().mean().item(), rel=1e-4)
    assert loss(WEIGHT) == pytest.approx((tuned - target).square().mean().item(), rel=1e-4)
    assert loss(None) == pytest.approx((tuned - v).square().mean().item(), rel=1e-4)


def test_held_out_losses_are_of_what_training_shows_in_every_step():
    adapter = build("wan22_5b")
    x0, level = latents(adapter, (3, 2, 2))[:1], torch.tensor([0.6])
    batch, empty = batch_of(x0.repeat(2, 1, 1, 1, 1))
    text = {"text": TextTokens(batch.text["text"].tokens[0], batch.text["text"].mask[0])}
    clip = Sample("a", x0[0], text, {}, {}, {"caption": ""})

    def attention(latent, sigma):
        return step_attention(Dense(), adapter.grid(latent), block=16)

    def by_hand(image, frames, *key):
        x, v = noised(x0[:, :, :frames], noise_like(x0[:, :, :frames], 0, *key), level)
        adapter.set_attention(attention(x, 0.6))
        with torch.no_grad():
            velocity = adapter.velocity(x, level, Conditions({"text": collate([clip], 0).text["text"]}, image=image))
        return (velocity - v)[:, :, len(image) :].square().mean().item()

    for share, frames, image in ((1.0, 3, {"first_frame": x0[:, :, :1]}), (1.0, 1, {}), (0.5, 3, {}), (0.0, 3, {})):
        found = loss_at(adapter, clip, frames, 0.6, attention, Objective(0, empty, first_frame=share))
        assert found == pytest.approx(by_hand(image, frames, "validation", "a", frames), rel=1e-4)
    middle = SigmaSchedule(1.5)  # 0.6 at its middle, where a single clip is
    for share, image in ((1.0, {"first_frame": x0[:, :, :1]}), (0.5, {}), (0.0, {})):
        (found,) = clip_losses(adapter, [clip], attention, middle, Objective(0, empty, first_frame=share), label="")
        assert found == pytest.approx(by_hand(image, 3, "evaluation", "a"), rel=1e-4)


def test_pictures_among_the_clips_are_no_first_frames():
    for frames, image in ((2, ["first_frame"]), (1, [])):
        batch, empty = batch_of(torch.randn(2, 4, frames, 2, 2))
        assert list(Objective(0, empty, first_frame=1.0).shown(batch).image) == image


def test_the_told_weight_holds_in_the_reports_losses_too():
    adapter = build("hunyuan")
    x0 = latents(adapter, (2, 2, 2))[:1]
    told = []
    own = adapter.velocity
    adapter.velocity = lambda x, sigma, seen: told.append(seen.guidance) or own(x, sigma, seen)
    drawn = conditions(adapter, x0)
    text = {"text": TextTokens(drawn.text["text"].tokens[0], drawn.text["text"].mask[0])}
    clip = Sample("a", x0[0], text, {"clip": drawn.pooled["clip"][0]}, {}, {"caption": ""})

    def attention(latent, sigma):
        return step_attention(Dense(), adapter.grid(latent), block=16)

    objective = Objective(0, Prompt({}, {}), guidance=6.0)
    clip_losses(adapter, [clip], attention, SigmaSchedule(3.0), objective, label="")
    loss_at(adapter, clip, 2, 0.6, attention, objective)
    assert told == [6.0, 6.0]


def test_what_the_weight_needs_is_asked_for():
    run = {"objective.distilled_guidance": "3.5", "objective.caption_dropout": "0"}
    assert finish(compose_run(run)).objective.distilled_guidance == WEIGHT
    with pytest.raises(UserError, match="distilled_guidance is 3.5, but lora is null: it needs the frozen model"):
        finish(compose_run({**run, "lora": "null"}))
    with pytest.raises(
        UserError, match=r"share of samples with the empty prompt 0.1, .* set objective.caption_dropout=0"
    ):
        finish(compose_run({**run, "objective.caption_dropout": "0.1"}))
    with pytest.raises(UserError, match="the model is sampled with guidance .*model.guidance is .6.0"):
        finish(compose_run({"conf": "hunyuan_2x", "objective.distilled_guidance": "3.5"}))
    assert all(finish(compose_run({"conf": f"minimax_h3_{n}x"})).objective.distilled_guidance == 3.5 for n in (2, 4))
