"""`python -m data.check`: what it prints, what it finds, what it draws; and shards of another encoder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from data.check import check, main
from data.encoders import check_encoder, fingerprint, load_encoder
from data.encoders.base import EncoderSettings
from data.errors import DataError
from data.prepare.__main__ import main as prepare
from data.shards.manifest import EMPTY_PROMPT, FILE, Manifest
from data.shards.sample import Sample
from data.shards.writer import ShardWriter
from data.sheet import row_of
from radial.errors import Mistake
from tests.helpers.tiny_models import save_wan
from tests.helpers.videos import write_video


@pytest.fixture
def shards(tmp_path: Path) -> Manifest:
    """Four clips of pixels in two shards, from a green and a red video."""
    for name, colour in (("green", (0, 220, 0)), ("red", (220, 0, 0))):
        picture = np.broadcast_to(np.array(colour, np.uint8), (64, 96, 3)).copy()
        write_video(tmp_path / "videos" / f"{name}.mp4", 21, picture=lambda i, p=picture: p, caption=f"all {name}")
    out = tmp_path / "out"
    words = ["model=pixels", "frames=10", "size=16x32", "workers=1", "cuts=keep", "shard_gb=0.0001"]
    assert prepare([f"source={tmp_path / 'videos'}", f"out={out}", *words]) == 0
    return Manifest.load(out)


def test_a_whole_folder(shards: Manifest, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main([shards.home]) == 0
    shown = capsys.readouterr()
    for line in (
        "encoder    pixels-v1+tiny-text-v1-32x64",
        "shards     2, 0.000 GB",
        "samples    4 of 4 whole, 0.001 h at 16 fps",
        "rejects    0 files, see rejected.jsonl",
        "[3, 10, 16, 32]                 4",
    ):
        assert line in shown.out, shown.out
    assert "checking: 100%" in shown.err


def damage_payload(path: Path, shards: Manifest) -> str:
    content = bytearray(path.read_bytes())
    content[shards.shards[1].samples[0].offset + 3000] ^= 1
    path.write_bytes(bytes(content))
    return "shard-000-00001.tar: SHA-256 is"


def damage_header(path: Path, shards: Manifest) -> str:
    content = bytearray(path.read_bytes())
    content[:10] = b"\xff" * 10
    path.write_bytes(bytes(content))
    return "shard-000-00001.tar: sample v0000001-0000: no entry of a tar where the manifest says"


def damage_prompt(path: Path, shards: Manifest) -> str:
    (shards.folder / EMPTY_PROMPT).write_bytes(b"x")
    return "empty_prompt.safetensors: cannot be read"


def cut(path: Path, shards: Manifest) -> str:
    path.write_bytes(path.read_bytes()[:-3000])
    return "bytes, the manifest says"


def lengthen(path: Path, shards: Manifest) -> str:
    path.write_bytes(path.read_bytes() + b"\0")
    return "bytes, the manifest says"


def move(path: Path, shards: Manifest) -> str:
    """The manifest says another place, the shard is whole."""
    raw = json.loads((shards.folder / FILE).read_text(encoding="utf-8"))
    raw["shards"][1]["samples"][1]["offset"] += 512
    (shards.folder / FILE).write_text(json.dumps(raw), encoding="utf-8")
    place = shards.shards[1].samples[1].offset
    return f"sample v0000001-0001 is listed at byte {place + 512}, not {place}"


@pytest.mark.parametrize("spoil", [damage_payload, damage_header, damage_prompt, cut, lengthen, move])
def test_damage_is_found(shards: Manifest, spoil: Any, capsys: pytest.CaptureFixture[str]) -> None:
    message = spoil(shards.folder / shards.shards[1].file, shards)
    assert main([shards.home]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert any(line.startswith("  samples ") for line in shown), "the table is printed whatever is damaged"
    damaged = [line for line in shown if line.startswith("damaged: ")]
    assert damaged and message in " ".join(damaged)


def test_a_flipped_bit_in_a_latent_names_its_sample(shards: Manifest, capsys: pytest.CaptureFixture[str]) -> None:
    """Which no rule of a sample's form sees."""
    info = shards.shards[0].samples[1]
    path = shards.folder / shards.shards[0].file
    content = bytearray(path.read_bytes())
    last = content.rindex(b"\x80", info.offset, info.offset + info.bytes)  # of a value that stays finite
    content[last] ^= 1
    path.write_bytes(bytes(content))
    found = check(shards)
    assert found.whole == [0, 2, 3]
    assert f"sample {info.key}: CRC-32 is " in found.problems[0]
    assert f", the manifest says {info.crc32:08x}; copy the shard again" in found.problems[0]
    assert "SHA-256 is" in found.problems[1] and len(found.problems) == 2
    assert main([shards.home]) == 1
    assert "3 of 4 whole" in capsys.readouterr().out


def test_manifests_without_checksums_of_samples_are_read(shards: Manifest) -> None:
    raw = json.loads((shards.folder / FILE).read_text(encoding="utf-8"))
    for shard in raw["shards"]:
        for sample in shard["samples"]:
            del sample["crc32"]
    (shards.folder / FILE).write_text(json.dumps(raw), encoding="utf-8")
    earlier = Manifest.load(shards.home)
    assert {info.crc32 for info in earlier.samples} == {None}
    found = check(earlier)
    assert found.whole == [0, 1, 2, 3] and not found.problems
    raw["shards"][1]["samples"][0]["crc32"] = "abc"
    (shards.folder / FILE).write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(DataError, match=r"shards\[1\].samples\[0\].crc32 is 'abc', expected int"):
        Manifest.load(shards.home)


@pytest.mark.parametrize("frames", ["ten", None, [1], -1, 10])
def test_the_hours_of_strangers_samples(make_folder: Any, make_sample: Any, tmp_path: Path, frames: Any) -> None:
    """What their meta calls frames need not be a number; the latent's length stands in."""
    one = make_folder(1)
    with ShardWriter(tmp_path / "theirs", fps=16.0, encoder="e", latent="l", text="t", arguments={},
                     empty_prompt=one.load_empty_prompt()) as writer:  # fmt: skip
        sample = make_sample(0)
        writer.write(dataclasses.replace(sample, meta={**sample.meta, "frames": frames}))
    found = check(Manifest.load(tmp_path / "theirs"))
    assert not found.problems and found.seconds == (10 if frames == 10 else 3) / 16


def test_a_missing_shard_is_one_problem(shards: Manifest, capsys: pytest.CaptureFixture[str]) -> None:
    (shards.folder / shards.shards[0].file).unlink()
    with pytest.raises(DataError, match=r"shard-000-00000.tar: missing"):
        Manifest.load(shards.home)
    capsys.readouterr()
    assert main([shards.home]) == 1
    shown = capsys.readouterr().out
    assert "samples    2 of 4 whole" in shown
    assert shown.count("damaged: ") == 1 and "shard-000-00000.tar: cannot be read (No such file" in shown


def test_a_tar_that_ends_early_is_one_problem(shards: Manifest, capsys: pytest.CaptureFixture[str]) -> None:
    """In the first of its samples; what is there of it counts."""
    first = shards.shards[0]
    (shards.folder / first.file).write_bytes((shards.folder / first.file).read_bytes()[:600])
    found = check(shards)
    assert found.problems == [f"{shards.urls[0]}: is 600 bytes, the manifest says {first.bytes}; copy it again"]
    assert found.bytes == 600 + shards.shards[1].bytes and found.whole == [2, 3]


def test_a_manifest_that_lists_more_than_the_shard_has(shards: Manifest) -> None:
    first = shards.shards[0]
    long = dataclasses.replace(first.samples[-1], bytes=first.bytes)
    other = dataclasses.replace(first, samples=(*first.samples[:-1], long))
    found = check(dataclasses.replace(shards, shards=(other, *shards.shards[1:])))
    assert found.problems == [f"{shards.urls[0]}: ends before its sample {long.key} does; make the folder anew"]


def test_mistakes(shards: Manifest) -> None:
    with pytest.raises(Mistake, match="shards is not set, give it; folder or URL"):
        main([])
    with pytest.raises(Mistake, match="clips is 0, expected at least 1"):
        main([shards.home, "clips=0"])
    with pytest.raises(Mistake, match="shards is empty, expected a path"):
        main(["shards="])
    with pytest.raises(DataError, match="the path of the shards is empty"):
        Manifest.load("")


def test_where_a_contact_sheet_cannot_be_made_is_told_before_the_check(
    tmp_path: Path, shards: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.check.check", None)
    for word, message in [
        (f"png={tmp_path / 'sheet.foo'}", "sheet.foo, expected a name that ends in .png"),
        (f"png={tmp_path / 'nodir' / 'sheet.png'}", "sheet.png, but there is no folder .*nodir; make it first"),
        ("device=foo", "device is 'foo', expected cpu, cuda or one GPU"),
        ("device=cuda:99", "device is cuda:99, but torch .* finds"),
    ]:
        with pytest.raises(DataError, match=message):
            main([shards.home, "--contact-sheet", word])


def test_the_contact_sheet_shows_the_clips(tmp_path: Path, shards: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    png = tmp_path / "sheet.png"
    assert main([shards.home, "--contact-sheet", f"png={png}", "clips=2", "pictures=3"]) == 0
    sheet = np.asarray(Image.open(png)).astype(int)
    rows, columns = sheet.shape[0] // 2, sheet.shape[1] // 3
    assert (columns, rows) == (242, 136)
    for row, colour in enumerate(((0, 220, 0), (220, 0, 0))):
        for column in range(3):
            centre = sheet[row * rows + rows // 2 + 8, column * columns + columns // 2]
            assert np.abs(centre - colour).max() < 25, (row, column, centre)
    assert (sheet[:14, :200] < 100).any(), "the label is written"
    labels: list[str] = []
    monkeypatch.setattr("data.check.row_of", lambda frames, label: labels.append(label) or row_of(frames, label))
    assert main([shards.home, "--contact-sheet", f"png={png}", "clips=4", "pictures=1"]) == 0
    expected = [f"{name}.mp4 at {start:.2f} s" for name in ("green", "red") for start in (0, 0.625)]
    for label, sample, place in zip(labels, shards.samples, expected, strict=True):
        assert label.startswith(f"{sample.key}  {place}  "), "source and time"
    frame = np.zeros((32, 64, 3), np.uint8)
    assert row_of([frame], "one\ntwo") == row_of([frame], "one two"), "a label is one line"


@pytest.mark.parametrize(("meta", "place"), [
    ({"source": "pexels"}, "pexels  "), ({"source": "a.mp4", "clip_start": None}, "a.mp4  "), ({"source": 7}, ""),
])  # fmt: skip
def test_the_contact_sheet_takes_what_others_say_of_their_clips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, meta: dict[str, Any], place: str
) -> None:
    encoder = load_encoder("pixels", EncoderSettings(None, torch.device("cpu"), torch.float32, torch.float32))
    prompt, latent = encoder.prompt("a ball"), encoder.encode(np.zeros((8, 16, 32, 3), np.uint8))
    about: dict[str, Any] = {"fps": 16.0, "encoder": fingerprint("pixels", None), "latent": "l", "text": "t"}
    with ShardWriter(tmp_path / "out", **about, arguments={}, empty_prompt=encoder.prompt("")) as writer:
        writer.write(Sample("clip", latent, prompt.text, prompt.pooled, {}, {"caption": "a ball", **meta}))
    labels: list[str] = []
    monkeypatch.setattr("data.check.row_of", lambda frames, label: labels.append(label) or row_of(frames, label))
    assert main([str(tmp_path / "out"), "--contact-sheet", f"png={tmp_path / 'sheet.png'}"]) == 0
    assert labels == [f"clip  {place}{list(latent.shape)}  a ball"]


def test_the_contact_sheet_of_a_damaged_folder_shows_what_is_whole(
    tmp_path: Path, shards: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    png, second = tmp_path / "sheet.png", shards.folder / shards.shards[1].file
    words = [shards.home, "--contact-sheet", f"png={png}", "pictures=1"]
    damage_header(second, shards)
    assert main(words) == 1
    assert "sheet.png: contact sheet of what is whole" in capsys.readouterr().out
    sheet = np.asarray(Image.open(png)).astype(int)
    assert sheet.shape[0] == 3 * 136
    centres = [sheet[row * 136 + 76, 121].tolist() for row in range(3)]
    assert [centre.index(max(centre)) for centre in centres] == [1, 1, 0], "two green ones and a red one"
    png.unlink()
    for shard in shards.shards:
        (shards.folder / shard.file).write_bytes(bytes(shard.bytes))
    assert main(words) == 1
    assert "sheet.png: not drawn, no sample is whole" in capsys.readouterr().out and not png.exists()


def test_latents_are_decoded_by_the_vae_that_made_them(tmp_path: Path) -> None:
    write_video(tmp_path / "videos" / "v.mp4", 9, caption="a red ball")
    weights, other = save_wan(tmp_path / "wan"), save_wan(tmp_path / "other", seed=1)
    out, png = tmp_path / "out", tmp_path / "sheet.png"
    assert (
        prepare(
            [f"source={tmp_path / 'videos'}", f"out={out}", f"weights={weights}", "frames=9", "size=32x48", "cuts=keep"]
        )
        == 0
    )
    assert main([str(out), "--contact-sheet", f"png={png}", f"weights={weights}", "pictures=2"]) == 0
    assert Image.open(png).size == (484, 176)
    with pytest.raises(DataError, match=r"was made with wan:vae-\w+\+text-\w+\+ids-\w+, expected wan:vae-"):
        main([str(out), "--contact-sheet", f"weights={other}"])
    with pytest.raises(DataError, match="weights is not set, model=wan needs"):
        main([str(out), "--contact-sheet"])


def test_shards_of_another_encoder_model_or_version_are_refused(
    tmp_path: Path, shards: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    weights = save_wan(tmp_path / "wan")
    check_encoder(shards, "pixels", None)
    with pytest.raises(DataError, match=r"was made with pixels-v1\+tiny-text-v1-32x64, expected wan:vae-\w+\+text-"):
        check_encoder(shards, "wan", weights)
    (tmp_path / "transformer_alone").mkdir()
    with pytest.raises(DataError, match=r"was made with pixels-v1\+tiny-text-v1-32x64, expected wan:;"):
        check_encoder(shards, "wan", tmp_path / "transformer_alone")
    raw = json.loads((shards.folder / FILE).read_text(encoding="utf-8"))
    (shards.folder / FILE).write_text(json.dumps({**raw, "encoder": fingerprint("wan", weights)}), encoding="utf-8")
    check_encoder(Manifest.load(shards.home), "wan", weights)
    assert not caplog.messages
    check_encoder(Manifest.load(shards.home), "wan", tmp_path / "transformer_alone")
    assert "only its family is compared" in caplog.messages[-1]
    assert "has no vae, text_encoder, tokenizer" in caplog.messages[-1] and len(caplog.messages) == 1
    image = save_wan(tmp_path / "image", image=True)
    made = json.dumps({**raw, "encoder": fingerprint("wan", image, image_to_video=True)})
    (shards.folder / FILE).write_text(made, encoding="utf-8")
    check_encoder(Manifest.load(shards.home), "wan", image)
    assert len(caplog.messages) == 1
    check_encoder(Manifest.load(shards.home), "wan", weights)
    assert "all but the image encoder is compared" in caplog.messages[-1]
    save_file({"x": np.zeros(1, np.float32)}, image / "image_encoder" / "model.safetensors")
    with pytest.raises(DataError, match=r"was made with wan:.*\+image-\w+, expected wan:.*\+image-"):
        check_encoder(Manifest.load(shards.home), "wan", image)
    (shards.folder / FILE).write_text(json.dumps({**raw, "version": 4}), encoding="utf-8")
    with pytest.raises(DataError, match="version is 4, this code reads 2 and 3"):
        Manifest.load(shards.home)
