"""Runs of Wan's image-to-video models and of the 5B, from clips encoded by the real classes to an exported LoRA."""

import csv
import shutil
from dataclasses import replace

import pytest

from data.errors import DataError
from tests.helpers import wan_variants as wan
from tests.helpers.wan_runs import config_of, make_shards, model_folder
from train.errors import UserError
from train.models.conditions import Conditions
from train.preflight import preflight
from train.run import RunFolder, train
from train.storage.checkpoints import last_checkpoint, load_weights


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders of models and shards, each made once."""
    root, found = tmp_path_factory.mktemp("wan"), {}

    def get(variant, image):
        folder = root / variant if (root / variant).exists() else model_folder(root, variant)
        if (variant, image) not in found:
            found[variant, image] = make_shards(root / f"shards-{variant}-{image}", folder, variant, image)
        return folder, found[variant, image]

    return get


def losses(folder):
    with (folder / "metrics.csv").open(encoding="utf-8") as stream:
        return [row["loss"] for row in csv.DictReader(stream) if row["loss"]]


@pytest.mark.parametrize(("conf", "variant", "image", "size"), [
    ("wan_i2v_2x", "i2v", True, (32, 48)), ("wan22_5b_4x", "5b", False, (64, 96)),
])  # fmt: skip
def test_a_run_trains_and_exports(tmp_path, monkeypatch, made, conf, variant, image, size):
    config = config_of(tmp_path, conf, *made(variant, image), size)
    preflight(config)
    given = []
    first_frame = Conditions.of
    monkeypatch.setattr(
        "train.step.objective.Conditions.of", lambda *a: given.append("first_frame" in a[0].image) or first_frame(*a)
    )
    folder = RunFolder.create(config)
    train(config, folder)
    assert len(losses(folder.path)) == 3
    weights = load_weights(last_checkpoint(folder.path))
    assert len(weights) == 2 * 4 * 2
    assert all(tensor.abs().max() > 0 for tensor in weights.values())
    assert (folder.path / "export" / "diffusers" / "pytorch_lora_weights.safetensors").is_file()
    assert len(given) == 3
    assert any(given) == (variant == "5b")


def test_shards_that_do_not_fit_the_model_stop_the_run(tmp_path, made):
    folder, plain = made("i2v", False)
    with pytest.raises(UserError, match=r"the shards hold image \[\], expected 'condition'"):
        preflight(config_of(tmp_path, "wan_i2v_2x", folder, plain, (32, 48)))
    other, _ = made("5b", False)
    with pytest.raises(DataError, match="was made with wan:vae-.*, expected wan22_5b:vae-"):
        preflight(config_of(tmp_path, "wan22_5b_4x", other, plain, (32, 64)))
    with pytest.raises(UserError, match="has num_layers=2, the chosen model has 40: choose the model="):
        preflight(config_of(tmp_path, "wan_i2v_2x", folder, plain, (32, 48), model__dimensions="{num_layers: 40}"))
    config = config_of(tmp_path, "wan_i2v_2x", folder, plain, (32, 48))
    wrong = replace(config, objective=replace(config.objective, first_frame=0.5))
    with pytest.raises(UserError, match="objective.first_frame is 0.5, but family wan takes no first frame"):
        preflight(wrong)
    wrong = replace(config, objective=replace(config.objective, guidance=5.0))
    with pytest.raises(UserError, match="objective.guidance is 5, but the model takes no weight of guidance as an inp"):
        preflight(wrong)
    text = (folder / "transformer" / "config.json").read_text(encoding="utf-8")
    mistaken = tmp_path / "mistaken" / "transformer"
    shutil.copytree(folder / "transformer", mistaken)
    other_class = text.replace("WanTransformer3DModel", "MochiTransformer3DModel")
    for content, message in (
        (other_class, "holds a MochiTransformer3DModel, expected a WanTransformer3DModel"),
        (text[:-20], "config.json is not JSON"),
    ):
        (mistaken / "config.json").write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            preflight(config_of(tmp_path, "wan_i2v_2x", mistaken.parent, plain, (32, 48)))
    # a folder with nothing but the transformer says nothing of its VAE: the channels do
    bare = tmp_path / "bare"
    wan.model("5b").save_pretrained(bare / "transformer")
    with pytest.raises(UserError, match="latents have 16 channels, the model takes 48: they were made by another VAE"):
        preflight(config_of(tmp_path, "wan_2x", bare, plain, (32, 48)))


def test_image_to_video_with_shards_of_text_to_video_names_what_makes_them():
    with pytest.raises(UserError, match=r"hold image \[\], expected 'condition': make them with .* --image-to-video"):
        Conditions({}).named("image", "condition")
    with pytest.raises(UserError, match=r"hold text \[\], expected 'text': were they made for this model"):
        Conditions({}).named("text", "text")
