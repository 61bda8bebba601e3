"""Masks that differ by head on their way: beside the LoRA, from there into sampling, refused where they are others."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from radial import Fitted, HeadMasks, Released, VideoGrid, attention_for, attention_over, build_head_layouts
from radial.patterns.head_masks import unpacked, write
from tests.helpers.generating import close, latent, stock
from tests.helpers.patterns import fitted
from tests.helpers.stock_models import TARGETS, random_lora
from tests.helpers.tiny_pipelines import HEADER, save_lora, save_pipeline, words
from train.config.compose import compose_run, finish
from train.errors import UserError
from train.export.merge import merge
from train.export.run import export_run, folded, header_of, save_adapters
from train.models.pretrained import stand_in
from train.sample import extend
from train.sample.settings import parse_settings, recipe_of
from train.storage.checkpoints import write_checkpoint
from train.storage.inputs import check_masks, hold_inputs
from train.storage.run_folder import RunFolder


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return save_pipeline("wan", tmp_path_factory.mktemp("masks") / "wan")


def save_masks(file, grid, block=16, *, seed=0, **settings):
    """A file of random rules."""
    masks = fitted(grid, block, seed=seed, **settings).masks
    write(unpacked(masks.bits)[..., : masks.about.entries].bool(), masks.about, file)
    return HeadMasks.read(file)


def of_model(folder):
    """Layers and heads of a pipeline's transformer."""
    config = stand_in(folder / "transformer").config
    return {"layers": tuple(range(1, config.num_layers)), "heads": config.num_attention_heads}


def test_sampling_finds_the_masks_beside_the_lora(wan, tmp_path):
    masks = save_masks(tmp_path / "mine.masks.safetensors", VideoGrid(9, 2, 3), **of_model(wan))
    header = {**HEADER, "radial.pattern": "fitted", "radial.masks_sha256": masks.digest}
    file = save_lora(wan, tmp_path / "mine.safetensors", header=header)
    for lora in (file, tmp_path):  # a folder with one LoRA in it
        settings, _ = parse_settings(words(wan, lora=lora))
        assert recipe_of(settings).pattern == Fitted(masks)
    moved = shutil.move(tmp_path / "mine.masks.safetensors", tmp_path / "moved.safetensors")
    with pytest.raises(UserError, match=r"trained under masks of its own, and .*mine.masks.safetensors is missing"):
        parse_settings(words(wan, lora=file))
    assert recipe_of(parse_settings(words(wan, lora=file, masks=moved))[0]).pattern == Fitted(masks)
    save_masks(tmp_path / "mine.masks.safetensors", VideoGrid(9, 2, 3), seed=1, **of_model(wan))
    with pytest.raises(UserError, match=rf"are not those .* its radial.masks_sha256 is {masks.digest[:16]}"):
        parse_settings(words(wan, lora=file))
    assert recipe_of(parse_settings(words(wan, lora=file, pattern="released"))[0]).pattern == Released(0.4)


def test_both_experts_loras_are_of_the_same_masks(tmp_path):
    two = save_pipeline("wan_a14b", tmp_path / "two")
    given, loras = {"model": "wan22_t2v_a14b"}, {}
    for key, seed in (("lora", 0), ("lora_2", 1)):
        masks = save_masks(tmp_path / f"{key}.masks.safetensors", VideoGrid(9, 2, 3), seed=seed, **of_model(two))
        header = {**HEADER, "radial.family": "wan", "radial.pattern": "fitted", "radial.masks_sha256": masks.digest}
        loras[key] = save_lora(two, tmp_path / f"{key}.safetensors", header=header)
    with pytest.raises(UserError, match=r"masks .*lora.masks.safetensors are not those that .*lora_2.safetensors was"):
        parse_settings(words(two, **given, **loras))
    parse_settings(words(two, **given, lora=loras["lora"], lora_2="none"))
    parse_settings(words(two, **given, lora="none", lora_2=loras["lora_2"]))


def test_masks_alone_sample_an_untuned_model(wan, tmp_path):
    masks = save_masks(tmp_path / "mine.safetensors", VideoGrid(9, 2, 3), rate=0.0, bits=0.1, **of_model(wan))
    given = {"masks": tmp_path / "mine.safetensors", "dense_steps": 0, "dense_layers": 1, "block": None}
    settings, _ = parse_settings(words(wan, **given))
    assert recipe_of(settings) == replace(recipe_of(settings), pattern=Fitted(masks), block=16)
    under, dense = latent(wan, **given).latent, latent(wan, pattern="dense").latent
    assert under.isfinite().all() and (under - dense).abs().max() > 1e-3
    with pytest.raises(UserError, match="masks is not set, pattern fitted needs the file"):
        parse_settings(words(wan, pattern="fitted"))
    with pytest.raises(UserError, match="none.safetensors cannot be read"):
        parse_settings(words(wan, masks=tmp_path / "none.safetensors"))


def test_an_extended_pipeline_has_the_masks_of_the_command(wan, tmp_path):
    given, model = {"dense_steps": 0, "dense_layers": 1}, parse_settings(words(wan))[1]
    own = {"rate": 0.0, "bits": 0.1, **of_model(wan)}
    masks = save_masks(tmp_path / "mine.masks.safetensors", VideoGrid(9, 2, 3), **own)
    header = {**HEADER, "radial.pattern": "fitted", "radial.masks_sha256": masks.digest}
    file = save_lora(wan, tmp_path / "mine.safetensors", header=header)
    expected = latent(wan, lora=file, block=None, **given).latent
    assert (expected - latent(wan, lora=file, block=None, **given, pattern="released").latent).abs().max() > 1e-3
    assert torch.allclose(
        stock(wan, lambda pipeline: extend(pipeline, file, model=model, **given)), expected, atol=1e-5
    )
    shutil.move(tmp_path / "mine.masks.safetensors", tmp_path / "moved.safetensors")
    for masks_file in (tmp_path / "moved.safetensors", str(tmp_path / "moved.safetensors")):
        moved = {**given, "masks": masks_file}
        got = stock(wan, lambda pipeline, moved=moved: extend(pipeline, file, model=model, **moved))
        assert torch.allclose(got, expected, atol=1e-5)
    with pytest.raises(UserError, match="mine.masks.safetensors is missing"):
        stock(wan, lambda pipeline: extend(pipeline, file, model=model, **given))


def test_masks_that_do_not_fit_are_refused_before_the_first_step(wan, tmp_path):
    file = tmp_path / "mine.safetensors"
    given, model = {"masks": file, "dense_steps": 1, "block": None}, parse_settings(words(wan))[1]
    save_masks(file, VideoGrid(9, 2, 4), **of_model(wan))
    with pytest.raises(UserError, match="masks are fitted to frames of 2 x 4 tokens, the clip's have 2 x 3"):
        parse_settings(words(wan, **given))
    save_masks(file, VideoGrid(9, 2, 3), **of_model(wan))
    with pytest.raises(UserError, match="block is 64: set it to 16"):
        parse_settings(words(wan, **{**given, "block": 64}))
    parse_settings(words(wan, **{**given, "dense_layers": 0}))  # which layers there are, only the model tells

    def extended(pipeline):
        with pytest.raises(UserError, match="layer 0 has none: keep it dense"):
            extend(pipeline, model=model, masks=file, dense_layers=0, dense_steps=1)

    stock(wan, extended)


def run_under(file, **settings):
    """A run of wan_4x, whose frames are of 45 x 80 tokens."""
    given = {"conf": "wan_4x", "attention": "fitted", "attention.masks": str(file)}
    return finish(compose_run({**given, **{key.replace("__", "."): str(value) for key, value in settings.items()}}))


def test_an_export_has_the_masks_beside_every_lora_and_their_facts_in_its_header(wan, tmp_path):
    file = tmp_path / "masks.safetensors"
    masks = save_masks(file, VideoGrid(2, 45, 80), 128, layers=(2,), heads=1, seed=3)
    config = run_under(file, model__path=wan)
    pairs = folded(random_lora(stand_in(wan / "transformer"), TARGETS["wan"], seed=0), 3)
    header = header_of(config, 7)
    assert {name: header[f"radial.masks_{name}"] for name in ("sha256", "share", "coverage", "seed")} == {
        "sha256": masks.digest, "share": "0.3", "coverage": "0.5", "seed": "3",
    }  # fmt: skip
    assert "radial.masks_separable" not in header
    separable = tmp_path / "separable.safetensors"
    write(unpacked(masks.bits).bool(), replace(masks.about, separable=True), separable)
    assert header_of(run_under(separable, model__path=wan), 7)["radial.masks_separable"] == "True"
    formats = ["diffusers", "comfyui", "kohya", "peft"]
    base = wan / "transformer"
    save_adapters(config, base, pairs, header, formats, torch.float32, tmp_path / "out", "mine", lambda: None)
    for name in formats:
        beside = list((tmp_path / "out" / name).glob("*.masks.safetensors"))
        (lora,) = (path for path in (tmp_path / "out" / name).glob("*.safetensors") if path not in beside)
        assert beside == [lora.with_suffix(".masks.safetensors")]
        assert HeadMasks.read(beside[0]) == masks
        with safe_open(lora, "pt") as tensors:
            assert tensors.metadata()["radial.masks_sha256"] == masks.digest


def trained_under(file, model, tmp_path):
    """The folder of a run of a model under masks, with random weights in its checkpoint."""
    small = {"clip__frames": 33, "clip__height": 32, "clip__width": 48, "attention__block": 16}
    config = run_under(file, model__path=model, attention__dense_layers=1, runs=tmp_path / "runs", **small)
    run = RunFolder.create(config).path
    weights = random_lora(stand_in(model / "transformer"), TARGETS["wan"])
    write_checkpoint({"state_dict": weights, "global_step": 7, "position": 0}, run / "checkpoints" / "step-7")
    return run


def test_a_merged_model_runs_under_the_masks_in_its_folder(wan, tmp_path):
    """In sampling, in an extended pipeline and in a server, as its LoRA does beside the frozen model."""
    file, grid = tmp_path / "masks.safetensors", VideoGrid(9, 2, 3)
    masks = save_masks(file, grid, rate=0.0, bits=0.1, **of_model(wan))
    run = trained_under(file, wan, tmp_path)
    export_run(run, formats=["diffusers"], merged=True)
    file.unlink()
    merged, dense = run / "export" / "merged", {"dense_steps": 0}
    beside = merged / "masks.safetensors"
    unset = {**dict.fromkeys(("frames", "height", "width", "block")), **dense}
    assert (
        recipe_of(parse_settings(words(merged, **unset))[0]).pattern == Fitted(masks) == Fitted(HeadMasks.read(beside))
    )
    expected = latent(wan, lora=run / "export" / "diffusers", **unset).latent
    close(latent(merged, **unset).latent, expected)
    assert (latent(merged, **unset, pattern="dense").latent - expected).abs().max() > 1e-3
    model = parse_settings(words(wan))[1]  # whose path is the base model's
    close(stock(merged, lambda pipeline: extend(pipeline, model=model, **dense)), expected)
    with safe_open(merged / "transformer" / "diffusion_pytorch_model.safetensors", "pt") as tensors:
        header = tensors.metadata()
    q, k, v = torch.randn(3, 1, grid.tokens, masks.heads, 16)
    layout = build_head_layouts(Fitted(masks), grid, 16, layers=3, heads=masks.heads).layer(2)
    attention = attention_for(header, grid, layer=2, step=3, sigma=0.1, masks=beside)
    assert torch.equal(attention(q, k, v), attention_over(q, k, v, layout))
    beside.unlink()
    with pytest.raises(UserError, match=r"merged.masks.safetensors is missing"):
        parse_settings(words(merged, **unset))
    with pytest.raises(UserError, match=r"merged.masks.safetensors is missing: .* or give masks=FILE"):
        stock(merged, lambda pipeline: extend(pipeline, model=model, **dense))


def test_a_model_merged_from_a_merged_one_has_masks_of_its_own(wan, tmp_path):
    """Those of the first stay as they are, though a merged model's files are links to its base model's."""
    first, second = (
        save_masks(tmp_path / f"{n}.safetensors", VideoGrid(9, 2, 3), seed=n, **of_model(wan)) for n in (1, 2)
    )
    run = trained_under(tmp_path / "1.safetensors", wan, tmp_path)
    export_run(run, out=tmp_path / "one", formats=["peft"], merged=True)
    run = trained_under(tmp_path / "2.safetensors", tmp_path / "one" / "merged", tmp_path)
    export_run(run, out=tmp_path / "two", formats=["peft"], merged=True)
    for name, masks in (("one", first), ("two", second)):
        assert HeadMasks.read(tmp_path / name / "merged" / "masks.safetensors") == masks
    # of a transformer alone they lie beside its weights, and are none of them
    bare = shutil.copytree(tmp_path / "one" / "merged" / "transformer", tmp_path / "bare")
    shutil.copy(tmp_path / "1.safetensors", bare / "masks.safetensors")
    merge(bare, tmp_path / "three", [], None)
    assert sorted(path.name for path in (tmp_path / "three").iterdir()) == sorted(
        path.name for path in bare.iterdir() if path.name != "masks.safetensors"
    )


def test_a_run_notices_other_masks(wan, tmp_path):
    file = tmp_path / "masks.safetensors"
    masks = save_masks(file, VideoGrid(2, 45, 80), 128, layers=(2,), heads=1)
    config = run_under(file, model__path=wan)
    hold_inputs(config, tmp_path, None)
    assert json.loads((tmp_path / "inputs.json").read_text(encoding="utf-8"))["masks"] == masks.digest
    hold_inputs(config, tmp_path, None)
    check_masks(config, tmp_path)
    save_masks(file, VideoGrid(2, 45, 80), 128, layers=(2,), heads=1, seed=1)
    with pytest.raises(UserError, match=rf"attention.masks was {masks.digest}, now .*: it was replaced"):
        hold_inputs(config, tmp_path, None)
    with pytest.raises(UserError, match=rf"the run trained under {masks.digest}: put it back"):
        check_masks(config, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention__block": 64}, "attention.masks are fitted to blocks of 128 tokens, block is 64"),
        ({"clip__height": 480, "clip__width": 832}, "attention.masks are fitted to frames of 45 x 80 tokens"),
        ({"attention__share": 0.1}, "attention.share is 0.1, and pattern fitted has that of its masks"),
        ({"attention": "radial"}, "attention.masks is of pattern fitted, released has none"),
        ({"attention__masks": "none"}, "attention.masks none cannot be read"),
    ],
)
def test_a_run_that_the_masks_are_not_for_does_not_start(tmp_path, settings, message):
    save_masks(tmp_path / "masks.safetensors", VideoGrid(2, 45, 80), 128, layers=(2,), heads=1)
    with pytest.raises(UserError, match=message):
        run_under(tmp_path / "masks.safetensors", **settings)
