"""`python -m data.prepare` from real files to shards: whole, selected, with bad files, through the command."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from data.encoders.base import EncoderSettings
from data.encoders.pixels import PixelEncoder
from data.errors import DataError
from data.prepare import run
from data.prepare.__main__ import PUBLISHED_TOP, main
from data.prepare.video import DECODING, probe
from data.shards.manifest import FILE, Manifest
from data.shards.stream import read_samples
from tests.helpers.prepared import FAST, LENGTHS, check_complete, spoil, write_clips
from tests.helpers.tiny_models import save_wan
from tests.helpers.videos import write_video


def test_a_folder_of_videos_becomes_shards(tmp_path: Path, videos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main([f"source={videos}", f"out={out}", *FAST, "shard_gb=0.0001"]) == 0
    shown = capsys.readouterr()
    assert "6 videos chosen, 0 do not qualify, 0 files are bad" in shown.out
    assert "13 clips in 7 shards from 6 videos, 0 bad files" in shown.out
    assert "encoding: 100%" in shown.err and "clip/s" in shown.err and "bad=0" in shown.err
    samples = check_complete(out)
    manifest = Manifest.load(out)
    assert all(shard.bytes <= 100_000 for shard in manifest.shards) and len(manifest.shards) == 7
    assert manifest.encoder == "pixels-v1+tiny-text-v1-32x64" and manifest.arguments["frames"] == 10
    assert samples[0].meta["fps"] == 16 and samples[0].meta["encoder"] == manifest.encoder
    assert (out / "rejected.jsonl").read_text(encoding="utf-8") == ""
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert main([f"source={videos}", f"out={out}", *FAST]) == 0
    assert "already there" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(DataError, match=r"was begun with frames=10 \(asked: 12\)"):
        main([f"source={videos}", f"out={out}", *FAST[:1], "frames=12", *FAST[2:]])


def test_shards_of_an_earlier_decoding_are_not_gone_on_with(tmp_path: Path, videos: Path) -> None:
    """Its colours differ, though weights, videos and arguments do not."""
    words = [f"source={videos}", f"out={tmp_path / 'out'}", *FAST, "clips=1"]
    assert main(words) == 0
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.arguments["decoding"] == DECODING
    path = manifest.folder / FILE
    about = json.loads(path.read_text(encoding="utf-8"))
    del about["arguments"]["decoding"]
    path.write_text(json.dumps(about), encoding="utf-8")
    assert main(words) == 0  # nothing is to be added
    write_video(videos / "added.mp4", 40, caption="added")
    with pytest.raises(DataError, match=rf"decoded by version 1, this is version {DECODING}, which gives other pixels"):
        main(words)


def test_decoding_decides_where_a_header_may_be_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The length that a program stream's header tells lacks up to a group of pictures."""
    videos = tmp_path / "videos"
    for name, frames in (("long.mpg", 123), ("short.mpg", 112)):  # 5.125 s and 4.67 s; a clip is 81 / 16 = 5.06 s
        write_video(videos / name, frames, fps=24, codec="mpeg2video", options={"g": "12", "bf": "2"}, caption="a clip")
    seconds = {path.name: probe(path).seconds for path in videos.glob("*.mpg")}
    assert max(seconds.values()) < 81 / 16, seconds
    out = tmp_path / "out"
    words = [word for word in FAST if not word.startswith("frames=")]
    assert main([f"source={videos}", f"out={out}", "frames=81", *words]) == 0
    assert [sample.meta["source"] for sample in read_samples(out)] == ["long.mpg"]
    shown = capsys.readouterr()
    assert "too short after all: short.mpg" in shown.err
    assert "1 clips in 1 shards from 2 videos, 0 bad files" in shown.out


def test_selection_reaches_the_shards(tmp_path: Path, videos: Path) -> None:
    table = tmp_path / "list.csv"
    rows = [f"v{i}.mp4,clip of video {i},{score}" for i, score in enumerate((3, 9, 5, 1, 8, 7))]
    table.write_text("path,caption,score\n" + "\n".join(rows) + "\n", encoding="utf-8")
    out = tmp_path / "out"
    words = [f"source={table}", f"videos={videos}", "where=score>2, frames>=12", "sort=score", "top=3", "clips=1"]
    assert main([*words, f"out={out}", *FAST]) == 0
    assert [s.meta["source"] for s in read_samples(out)] == ["v1.mp4", "v5.mp4", "v2.mp4"]
    with pytest.raises(DataError, match=r"no video of 10 frames at 16 fps is left of 6: 6 are too short"):
        main([*words[:2], "where=height>=720", f"out={tmp_path / 'none'}", *FAST])


def test_of_a_sorted_list_as_many_are_kept_as_in_the_published_recipe(
    tmp_path: Path, videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert PUBLISHED_TOP == 2000
    monkeypatch.setattr("data.prepare.__main__.PUBLISHED_TOP", 2)
    table = tmp_path / "list.csv"
    table.write_text(
        "path,caption,score\n" + "\n".join(f"v{i}.mp4,clip,{i}" for i in range(6)) + "\n", encoding="utf-8"
    )
    words = [f"source={table}", f"videos={videos}", "clips=1", *FAST]
    kept = {}
    for name, more in {"sorted": ["sort=score"], "all": [], "three": ["sort=score", "top=3"]}.items():
        assert main([*words, *more, f"out={tmp_path / name}"]) == 0
        kept[name] = [s.meta["source"] for s in read_samples(tmp_path / name)]
    assert kept["sorted"] == ["v5.mp4", "v4.mp4"]
    assert len(kept["all"]) == 6 and len(kept["three"]) == 3


def test_the_number_of_decoders_changes_no_byte(tmp_path: Path, videos: Path) -> None:
    for workers in (1, 3):
        assert (
            main([f"source={videos}", f"out={tmp_path / str(workers)}", *FAST[:3], f"workers={workers}", "cuts=keep"])
            == 0
        )
    for path in (tmp_path / "1").glob("shard-*"):
        assert path.read_bytes() == (tmp_path / "3" / path.name).read_bytes()


def test_bad_files_are_listed_and_fail_the_run_above_their_share(
    tmp_path: Path, videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(videos)
    (videos / "uncaptioned.txt").write_bytes("caf\u00e9".encode("latin-1"))
    out = tmp_path / "out"
    assert main([f"source={videos}", f"out={out}", *FAST]) == 1
    assert "40.0% of the files are bad, more than bad_share=0.05; see rejected.jsonl" in capsys.readouterr().err
    rejected = {
        line["path"]: line
        for line in map(json.loads, (out / "rejected.jsonl").read_text(encoding="utf-8").splitlines())
    }
    assert set(rejected) == {"empty.mp4", "sound.mp4", "uncaptioned.mp4", "v6.mp4"}
    reasons = [rejected[name]["reason"] for name in ("sound.mp4", "uncaptioned.mp4")]
    assert reasons == [
        "no video stream",
        "caption cannot be used: is not in UTF-8 (unexpected end of data, byte 3); save it as UTF-8",
    ]
    kept = rejected["v6.mp4"]["kept"]
    assert 1 <= kept <= 4
    check_complete(out, {**LENGTHS, "v6.mp4": kept})
    for share, code in ((0.05, 1), (0.4, 0)):
        assert main([f"source={videos}", f"out={out}", *FAST, f"bad_share={share}"]) == code, "the second time, too"
        shown = capsys.readouterr()
        assert "already there" in shown.out and ("40.0% of the files are bad" in shown.err) == code
    counts = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert [counts[name] for name in ("samples", "videos", "rejected")] == [13 + kept, 10, 4]


def test_only_bad_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut = write_clips(tmp_path / "v", 0, 60, options={"g": "10"}, container={"movflags": "faststart"})
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    words = [f"source={cut.parent}", f"out={tmp_path / 'out'}", *FAST[:1], "frames=50", *FAST[2:]]
    for _ in range(2):
        assert main(words) == 1
        assert "no clip came out, all 1 files are bad" in capsys.readouterr().err
    with pytest.raises(DataError, match="no manifest"):
        Manifest.load(tmp_path / "out")


def test_only_files_that_are_bad_before_decoding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        (tmp_path / "v" / f"{name}.mp4").parent.mkdir(exist_ok=True)
        (tmp_path / "v" / f"{name}.mp4").touch()
    write_video(tmp_path / "v" / "c.mp4", 5, caption="too short")
    out = tmp_path / "out"
    assert main([f"source={tmp_path / 'v'}", f"out={out}", *FAST]) == 1
    why = "Invalid data found when processing input"
    told = f"no clip came out, all 2 files are bad, such as a.mp4: {why}; 1 more did not qualify; see rejected.jsonl"
    assert told in capsys.readouterr().err
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(entry["path"], entry["reason"]) for entry in rejected] == [("a.mp4", why), ("b.mp4", why)]
    assert [path.name for path in out.iterdir()] == ["rejected.jsonl"]


def test_names_and_captions_that_are_no_text_are_bad_files(tmp_path: Path, videos: Path) -> None:
    """A name of another coding than UTF-8, and half a character: neither can be stored in a shard."""
    shutil.copy(videos / "v0.mp4", os.fsencode(videos) + b"/caf\xe9.mp4")
    Path(os.fsdecode(os.fsencode(videos) + b"/caf\xe9.txt")).write_text("a caption", encoding="utf-8")
    assert main([f"source={videos}", f"out={tmp_path / 'named'}", *FAST, "bad_share=1"]) == 0
    check_complete(tmp_path / "named")
    table = tmp_path / "list.jsonl"
    captions = ["half a \ud83d", *(f"clip of video {i}" for i in range(1, 6))]
    table.write_text(
        "\n".join(json.dumps({"path": f"v{i}.mp4", "caption": c}) for i, c in enumerate(captions)), encoding="utf-8"
    )
    words = [f"source={table}", f"videos={videos}", f"out={tmp_path / 'half'}", *FAST, "bad_share=1"]
    assert main(words) == 0
    check_complete(tmp_path / "half", {name: count for name, count in LENGTHS.items() if name != "v0.mp4"})
    found = [json.loads((tmp_path / name / "rejected.jsonl").read_text(encoding="utf-8")) for name in ("named", "half")]
    assert [(entry["path"], entry["reason"]) for entry in found] == [
        ("caf\udce9.mp4", "file name is not UTF-8; rename it"),
        ("v0.mp4", "caption has half a character (a lone surrogate)"),
    ]


def test_a_caption_is_embedded_once_a_video(tmp_path: Path, videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, asked = PixelEncoder.prompt, []
    monkeypatch.setattr(PixelEncoder, "prompt", lambda self, text: asked.append(text) or prompt(self, text))
    assert main([f"source={videos}", f"out={tmp_path / 'out'}", *FAST]) == 0
    assert asked == [*(f"clip of video {i}" for i in range(6)), ""]


def test_each_rank_takes_its_own_gpu(tmp_path: Path, videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    taken: list[str] = []

    def load(family: str, settings: EncoderSettings) -> None:
        taken.append(str(settings.device))
        raise DataError("enough")

    monkeypatch.setattr(run, "load_encoder", load)
    for local, asked in ((0, "null"), (3, "cuda"), (6, "cuda"), (3, "cuda:1"), (3, "cpu")):
        for name, value in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK"), (8 + local, 16, local), strict=True):
            monkeypatch.setenv(name, str(value))
        with pytest.raises(DataError, match="enough"):
            main([f"source={videos}", f"out={tmp_path / 'out'}", *FAST, f"device={asked}"])
    assert taken == ["cuda:0", "cuda:3", "cuda:2", "cuda:1", "cpu"]
    with pytest.raises(DataError, match="there is no column 'scor'"):
        (tmp_path / "list.csv").write_text("path,caption,score\nv0.mp4,a,1\n", encoding="utf-8")
        main([f"source={tmp_path / 'list.csv'}", f"out={tmp_path / 'other'}", *FAST, "sort=scor"])
    with pytest.raises(DataError, match="no video of 900 frames at 16 fps is left of 6: 6 are too short"):
        main([f"source={videos}", f"out={tmp_path / 'other'}", "model=pixels", "frames=900"])
    assert len(taken) == 5 and not (tmp_path / "other").exists(), "told before weights are loaded"
    with pytest.raises(DataError, match="enough"):
        main([f"source={videos}", f"out={tmp_path / 'out'}", *FAST, "clips=1"])
    assert len(taken) == 6, "videos of which nothing was written are chosen anew"


def test_wan_end_to_end(tmp_path: Path) -> None:
    """The real classes from disk, two buckets, image conditions, through the command."""
    videos = tmp_path / "videos"
    write_video(videos / "wide.mp4", 20, height=64, width=96, caption="a red ball")
    write_video(videos / "tall.mp4", 20, height=96, width=64, caption="a moving bar")
    weights, out = save_wan(tmp_path / "wan", image=True), tmp_path / "out"
    words = [
        f"source={videos}",
        f"out={out}",
        f"weights={weights}",
        "frames=9",
        "size=32x48,48x32",
        "workers=1",
        "cuts=keep",
    ]
    assert main([*words, "--image-to-video"]) == 0
    manifest = Manifest.load(out)
    assert {tuple(info.shape) for info in manifest.samples} == {(16, 3, 4, 6), (16, 3, 6, 4)}
    assert manifest.encoder.startswith("wan:vae-") and manifest.fps == 16
    samples = list(read_samples(out))
    assert len(samples) == 4 and {sample.caption for sample in samples} == {"a red ball", "a moving bar"}
    for sample in samples:
        assert sample.latent.dtype == torch.bfloat16 and sample.text["text"].tokens.shape[1] == 32
        assert sample.image["condition"].shape == sample.latent.shape and sample.image["clip"].shape == (17, 32)
    assert manifest.load_empty_prompt().text["text"].tokens.shape == (1, 32)
    other = save_wan(tmp_path / "other", seed=1, image=True)
    with pytest.raises(DataError, match=r"was begun with encoder=wan:vae-.* \(asked: wan:vae-"):
        main([*words[:2], f"weights={other}", *words[3:], "--image-to-video"])


def test_help_and_mistakes_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    main.run(["--help"])
    shown = capsys.readouterr().out
    assert "source " in shown and "torchrun" in shown
    with pytest.raises(SystemExit) as caught:
        main.run(["sorce=x"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: sorce is not a known key; did you mean source?\n"


def test_how_long_the_rest_takes_is_told_once_a_minute_is_encoded(
    tmp_path: Path, videos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"source={videos}", *FAST]
    assert main([*words, f"out={tmp_path / 'short'}"]) == 0
    assert "hours" not in capsys.readouterr().out
    monkeypatch.setattr(run, "RATED", 0.0)
    assert main([*words, f"out={tmp_path / 'out'}"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "hours" in line]
    assert len(lines) == 1 and re.fullmatch(r"1 clips in \d+ s: 12 more take about [\d.e-]+ hours", lines[0])
