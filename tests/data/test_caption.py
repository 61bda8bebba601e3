"""Captions for videos without one: the model's own answer, each video once, and what cannot be described is told."""

from __future__ import annotations

import re
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from data import caption
from data.errors import DataError
from data.prepare.describing import spread_frames
from data.prepare.sources import read_source
from tests.helpers.prepared import write_clips
from tests.helpers.tiny_models import save_llava
from tests.helpers.videos import number_of, write_sound, write_video


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("llava"))


def folder_of(root: Path, lengths: tuple[int, ...] = (20, 10, 30)) -> Path:
    """Videos without captions, but for the first."""
    for number, length in enumerate(lengths):
        path = write_clips(root, number, length)
        if number:
            path.with_suffix(".txt").unlink()
    return root


def run(videos: Path, model: Path, *more: str) -> int | None:
    return caption.main(
        [str(videos), f"model={model}", "frames=3", "tokens=6", "dtype=fp32", "prompt=the video", *more]
    )


def greedy(model: Path, videos: Path, name: str) -> str:
    """The likeliest word after the likeliest, by whole forward passes."""
    processor, llava = AutoProcessor.from_pretrained(model), LlavaForConditionalGeneration.from_pretrained(model)
    frames = [Image.fromarray(frame) for frame in spread_frames(videos / name, 3, 448)]
    inputs = processor(images=frames, text="user <image><image><image> the video assistant", return_tensors="pt")
    ids, first = inputs["input_ids"], inputs["input_ids"].shape[1]
    for _ in range(6):
        with torch.no_grad():
            logits = llava(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[:, -1:]
        logits[..., processor.tokenizer.convert_tokens_to_ids("<image>")] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1)], 1)
        if ids[0, -1] == processor.tokenizer.eos_token_id:
            break
    return processor.decode(ids[0, first:], skip_special_tokens=True)


def test_videos_without_a_caption_get_the_models_likeliest_answer(tmp_path: Path, model: Path) -> None:
    videos = folder_of(tmp_path / "videos")
    assert run(videos, model) == 0
    found = {video.path: video.caption for video in read_source(videos).videos()}
    assert found == {"v0.mp4": "clip of video 0", **{n: greedy(model, videos, n) for n in ("v1.mp4", "v2.mp4")}}
    assert found["v1.mp4"]


def test_two_videos_of_one_name_share_the_caption_of_the_first(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    videos = folder_of(tmp_path / "videos", (20, 10))
    write_clips(videos, 2, 30)
    (videos / "v2.txt").unlink()
    (videos / "v2.mp4").rename(videos / "v1.mkv")
    assert run(videos, model) == 0 and "1 captions written" in capsys.readouterr().out
    found = {video.path: video.caption for video in read_source(videos).videos()}
    assert found["v1.mp4"] == found["v1.mkv"] == greedy(model, videos, "v1.mkv")


def test_frames_are_spread_over_the_video(tmp_path: Path) -> None:
    frames = spread_frames(write_clips(tmp_path, 0, 40), 4, 448)
    assert [number_of(frame) for frame in frames] == [0, 10, 20, 30]


def test_of_two_videos_of_one_name_the_damaged_one_is_passed_over(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    videos = folder_of(tmp_path / "videos", (20, 10))
    (videos / "v1.avi").write_bytes(b"no video")
    (videos / "v2.avi").write_bytes(b"no video")
    assert run(videos, model) == 1
    shown = capsys.readouterr()
    assert "1 captions written, 1 videos could not be described" in shown.out
    assert re.search(r"bad: v1.avi: .*; v1.mp4 is described in its place\n", shown.err)
    assert re.search(r"bad: v2.avi: [^;]*\n", shown.err)
    assert (videos / "v1.txt").read_text(encoding="utf-8").strip() == greedy(model, videos, "v1.mp4")
    assert not (videos / "v2.txt").exists()


def test_frames_are_spread_over_the_picture_where_the_sound_is_longer(tmp_path: Path) -> None:
    """FLV has one length for both, which stands in its header."""
    path = write_video(tmp_path / "talk.flv", 46, codec="flv1", sound=True)
    content = bytearray(path.read_bytes())
    at = content.index(b"duration") + len(b"duration") + 1
    content[at : at + 8] = struct.pack(">d", 46 / 16 + 2.5)
    path.write_bytes(content)
    assert [number_of(frame) for frame in spread_frames(path, 4, 448)] == [0, 11, 23, 34]


def test_what_is_there_stays_and_ranks_share_the_rest(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    videos = folder_of(tmp_path / "videos", (20, 10, 10, 10))
    (videos / "v2.txt").write_text("by hand", encoding="utf-8")
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert run(videos, model) == 0
    assert "2 captions written" in capsys.readouterr().out
    assert {path.name for path in videos.glob("*.txt")} == {"v0.txt", "v1.txt", "v2.txt", "v3.txt"}
    assert (videos / "v2.txt").read_text(encoding="utf-8") == "by hand"
    assert run(videos, model) == 0 and "no video lacks a caption" in capsys.readouterr().out
    (videos / "v3.txt").unlink()
    monkeypatch.setenv("RANK", "0")
    assert run(videos, model) == 0 and "none of this rank lacks a caption" in capsys.readouterr().out


def test_what_cannot_be_described_is_told(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    videos = folder_of(tmp_path / "videos", (20, 10))
    write_sound(videos / "sound.mp4")
    assert run(videos, model) == 1
    shown = capsys.readouterr()
    assert "bad: sound.mp4: no video stream" in shown.err and "1 captions written, 1 videos could not" in shown.out
    for words, message in [
        ((videos, tmp_path / "gone"), "gone: no such folder; download the caption model"),
        ((videos, tmp_path), "transformers cannot load it to describe images"),
        ((tmp_path / "list.csv", model), "list.csv: expected a folder of videos without a list"),
    ]:
        with pytest.raises(DataError, match=message):
            run(*words)


@pytest.mark.parametrize("part", ["vision_tower", "language_model"])
def test_a_model_whose_weights_lack_a_tensor_writes_no_captions(tmp_path: Path, model: Path, part: str) -> None:
    """transformers draws what is missing at random and goes on."""
    videos, broken = folder_of(tmp_path / "videos", (20, 10)), shutil.copytree(model, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    name = next(name for name in tensors if f"{part}." in name and "layers.1." in name)
    tensor = tensors.pop(name)
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"broken: missing in the weights, by its config.json: .*layers\.1\.") as error:
        run(videos, broken)
    assert "\n" not in str(error.value)
    save_file({**tensors, name: torch.cat([tensor, tensor])}, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"broken: of another shape in the weights, .*layers\.1\."):
        run(videos, broken)
    assert not (videos / "v1.txt").exists()


def test_a_model_whose_weights_are_cut_off_is_a_line(tmp_path: Path, model: Path) -> None:
    videos, broken = folder_of(tmp_path / "videos", (20, 10)), shutil.copytree(model, tmp_path / "broken")
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(DataError, match=r"broken: transformers cannot load it to describe images: .*incomplete"):
        run(videos, broken)


@pytest.mark.parametrize(("method", "told", "written"), [
    ("to", r"llava\d+: does not fit into the memory of cpu \(out of memory\); choose .*\(device=\)", []),
    ("generate", r"v2.mp4: 3 frames of at most 448 pixels do not fit .* a smaller side=", ["v1.txt"]),
])  # fmt: skip
def test_too_little_memory_is_a_line_and_costs_no_caption(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, method: str, told: str, written: list[str]
) -> None:
    """Of three videos the second one does not fit; the next command goes on with it."""
    videos, real = folder_of(tmp_path / "videos"), getattr(LlavaForConditionalGeneration, method)

    def full(self: LlavaForConditionalGeneration, *words: Any, **named: Any) -> Any:
        if [path.name for path in videos.glob("v[12].txt")] == written:
            raise torch.OutOfMemoryError("out of memory. Tried to allocate 1 GiB")
        return real(self, *words, **named)

    with monkeypatch.context() as patch:
        patch.setattr(LlavaForConditionalGeneration, method, full)
        with pytest.raises(DataError, match=told):
            run(videos, model)
    assert [path.name for path in videos.glob("v[12].txt")] == written
    assert run(videos, model) == 0 and len(list(videos.glob("*.txt"))) == 3
