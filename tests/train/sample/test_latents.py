"""A clip whose steps are done is not denoised again, whatever ended the writing of its frames."""

import numpy as np
import pytest
import torch

from tests.helpers.tiny_pipelines import save_pipeline, words
from tests.helpers.videos import frames_of
from train.errors import UserError
from train.sample.__main__ import main
from train.sample.generate import Generator


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return save_pipeline("wan", tmp_path_factory.mktemp("latents") / "wan")


def kept(folder):
    return [file.name for file in folder.iterdir() if "latents" in file.name]


def never(*_):
    raise AssertionError("denoised again")


def full(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.50 GiB. GPU 0 has a total capacity of 10")


@pytest.mark.parametrize("compare", [None, "dense"])
def test_frames_that_find_memory_full_are_decoded_by_the_next_command(wan, tmp_path, monkeypatch, capsys, compare):
    setting = {"steps": 2, "decay": 0.4, "dense_layers": 0, "dense_steps": 0, "compare": compare}
    whole, out = tmp_path / "whole" / "clip.mp4", tmp_path / "clip.mp4"
    main(words(wan, out=whole, **setting))
    assert not kept(whole.parent)
    with monkeypatch.context() as patched:
        patched.setattr("train.sample.generate.decode_frames", full)
        with pytest.raises(UserError, match=r"^out of memory: .*9\.50 GiB\. offload=model .* is only decoded$"):
            main(words(wan, out=out, **setting))
    assert kept(tmp_path) == [".clip.latents.safetensors"] and not out.exists()
    monkeypatch.setattr(Generator, "denoise", never)
    capsys.readouterr()
    main(words(wan, out=out, tiled=True, **setting))  # how frames are decoded may be another
    assert "denoised before (" in capsys.readouterr().out
    assert np.array_equal(frames_of(out), frames_of(whole))  # these frames are smaller than a tile
    assert sorted(file.name for file in tmp_path.iterdir() if file.is_file()) == sorted(
        file.name for file in whole.parent.iterdir()
    )


def test_latents_of_other_settings_or_damaged_ones_are_not_taken(wan, tmp_path, monkeypatch):
    out = tmp_path / "clip.mp4"

    def interrupted(**changes):
        with monkeypatch.context() as patched:
            patched.setattr("train.sample.generate.decode_frames", full)
            with pytest.raises(UserError, match="out of memory"):
                main(words(wan, out=out, steps=1, **changes))

    interrupted(seed=1)
    interrupted(seed=2)  # makes its own
    with monkeypatch.context() as patched:
        patched.setattr(Generator, "denoise", never)
        with pytest.raises(AssertionError, match="denoised again"):
            main(words(wan, out=out, steps=1, seed=1))
        interrupted(seed=2)
        (tmp_path / kept(tmp_path)[0]).write_bytes(b"cut off")
        with pytest.raises(AssertionError, match="denoised again"):
            main(words(wan, out=out, steps=1, seed=2))
    main(words(wan, out=out, steps=1, seed=2))
    assert not kept(tmp_path)


def test_latents_that_a_kill_left_beside_a_finished_video_go(wan, tmp_path, monkeypatch):
    def kill(*_):
        raise KeyboardInterrupt

    arguments = words(wan, out=tmp_path / "clip.mp4", steps=1)
    with monkeypatch.context() as patched:
        patched.setattr("train.sample.generate.drop_clips", kill)
        with pytest.raises(KeyboardInterrupt):
            main(arguments)
    assert kept(tmp_path) and (tmp_path / "clip.json").exists()
    monkeypatch.setattr(Generator, "denoise", never)
    main(arguments)
    assert not kept(tmp_path)


def test_memory_that_is_full_while_denoising_is_said_in_words(wan, tmp_path, monkeypatch):
    monkeypatch.setattr(Generator, "denoise", full)
    with pytest.raises(UserError, match=r"out of memory: .*9\.50 GiB\. offload=model or offload=layer takes less"):
        main(words(wan, out=tmp_path / "clip.mp4"))
    assert not list(tmp_path.iterdir())
