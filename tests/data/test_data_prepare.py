"""`python -m data.prepare` from real files to shards: whole, killed, on several ranks, with bad files."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import save_wan
from videos import number_of, numbered, write_sound, write_video

from data import cli
from data.errors import DataError
from data.manifest import Manifest
from data.prepare import decoders, journal, run
from data.prepare.__main__ import USAGE, main
from data.prepare.decoders import Decoders, End, Task
from data.prepare.recipe import Rank
from data.sample import Sample
from data.stream import read_samples

FAST = ["model=pixels", "frames=10", "size=16x32", "workers=1"]


def write_clips(folder: Path, i: int, length: int, **more: Any) -> Path:
    """Video i of a folder, which starts with the number 40 i."""
    picture = functools.partial(_picture, 40 * i)
    return write_video(folder / f"v{i}.mp4", length, picture=picture, caption=f"clip of video {i}", **more)


def _picture(first: int, k: int) -> np.ndarray:
    return numbered(first + k)


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Six good videos of 1 to 4 clips of ten frames."""
    folder = tmp_path / "videos"
    for i, length in enumerate((12, 20, 35, 41, 10, 29)):
        write_clips(folder, i, length)
    return folder


LENGTHS = {"v0.mp4": 1, "v1.mp4": 2, "v2.mp4": 3, "v3.mp4": 4, "v4.mp4": 1, "v5.mp4": 2}


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "data.prepare", *words]


def check_complete(folder: Path, lengths: dict[str, int] = LENGTHS) -> list[Sample]:
    """Every clip once, with its own frames and caption."""
    samples = list(read_samples(folder))
    assert len({sample.key for sample in samples}) == len(samples)
    found = sorted((s.meta["source"], s.meta["clip_start"]) for s in samples)
    assert found == sorted((name, k * 0.625) for name, count in lengths.items() for k in range(count))
    for sample in samples:
        i = int(sample.meta["source"][1])
        first = ((sample.latent[:, 0].permute(1, 2, 0).float() + 1) * 127.5).numpy()
        assert number_of(first) == 40 * i + round(sample.meta["clip_start"] * 16)
        assert sample.caption == f"clip of video {i}"
    assert not (folder / ".prepare").exists() and not list(folder.glob(".*"))
    return samples


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
    assert (out / "rejected.jsonl").read_text() == ""
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert main([f"source={videos}", f"out={out}", *FAST]) == 0
    assert "already there" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(DataError, match=r"was begun with frames=10 \(asked: 12\)"):
        main([f"source={videos}", f"out={out}", *FAST[:1], "frames=12", *FAST[2:]])


def test_selection_reaches_the_shards(tmp_path: Path, videos: Path) -> None:
    table = tmp_path / "list.csv"
    rows = [f"v{i}.mp4,clip of video {i},{score}" for i, score in enumerate((3, 9, 5, 1, 8, 7))]
    table.write_text("path,caption,score\n" + "\n".join(rows) + "\n")
    out = tmp_path / "out"
    words = [f"source={table}", f"videos={videos}", "where=score>2, frames>=12", "sort=score", "top=3", "clips=1"]
    assert main([*words, f"out={out}", *FAST]) == 0
    assert [s.meta["source"] for s in read_samples(out)] == ["v1.mp4", "v5.mp4", "v2.mp4"]
    with pytest.raises(DataError, match=r"no video of 10 frames at 16 fps is left of 6: 6 are too short"):
        main([*words[:2], "where=height>=720", f"out={tmp_path / 'none'}", *FAST])


def test_the_number_of_decoders_changes_no_byte(tmp_path: Path, videos: Path) -> None:
    for workers in (1, 3):
        assert main([f"source={videos}", f"out={tmp_path / str(workers)}", *FAST[:3], f"workers={workers}"]) == 0
    for path in (tmp_path / "1").glob("shard-*"):
        assert path.read_bytes() == (tmp_path / "3" / path.name).read_bytes()


def spoil(videos: Path) -> None:
    """Bad files of all kinds beside the good ones."""
    (videos / "empty.mp4").touch()
    write_sound(videos / "sound.mp4")
    for name in ("empty", "sound"):
        (videos / f"{name}.txt").write_text("a caption")
    write_video(videos / "uncaptioned.mp4", 12)
    write_video(videos / "short.mp4", 5, caption="too short")
    cut = write_clips(videos, 6, 60, options={"g": "10"}, container={"movflags": "faststart"})
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])


def test_bad_files_are_listed_and_fail_the_run_above_their_share(
    tmp_path: Path, videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(videos)
    out = tmp_path / "out"
    assert main([f"source={videos}", f"out={out}", *FAST]) == 1
    assert "40.0% of the files are bad, more than bad_share=0.05; see rejected.jsonl" in capsys.readouterr().err
    rejected = {line["path"]: line for line in map(json.loads, (out / "rejected.jsonl").read_text().splitlines())}
    assert set(rejected) == {"empty.mp4", "sound.mp4", "uncaptioned.mp4", "v6.mp4"}
    assert (
        rejected["sound.mp4"]["reason"] == "no video stream" and rejected["uncaptioned.mp4"]["reason"] == "no caption"
    )
    kept = rejected["v6.mp4"]["kept"]
    assert 1 <= kept <= 4
    check_complete(out, {**LENGTHS, "v6.mp4": kept})
    for share, code in ((0.05, 1), (0.4, 0)):
        assert main([f"source={videos}", f"out={out}", *FAST, f"bad_share={share}"]) == code, "the second time, too"
        shown = capsys.readouterr()
        assert "already there" in shown.out and ("40.0% of the files are bad" in shown.err) == code
    counts = json.loads((out / "manifest.json").read_text())
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


def run_and_kill(words: Sequence[str], out: Path, shards: int) -> None:
    """Start a run and kill it, without a word, once so many shards are recorded."""
    process = subprocess.Popen(command(*words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list((out / ".prepare").glob("record-*"))) < shards and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_killed_run_goes_on_without_a_clip_twice_or_lost(tmp_path: Path, videos: Path) -> None:
    spoil(videos)
    out, words = tmp_path / "out", [f"source={videos}", *FAST, "bad_share=1", "shard_gb=0.00003"]
    for shards in (1, 3):
        run_and_kill([*words, f"out={out}"], out, shards)
        assert len(list((out / ".prepare").glob("record-*"))) >= shards and not (out / "manifest.json").exists()
    (out / "shard-000-00077.tar").write_bytes(b"of a run that was killed before its record")
    finished = {path: path.read_bytes() for path in out.glob("shard-*") if "77" not in path.name}
    assert main([*words, f"out={out}"]) == 0
    kept = {line["path"]: line["kept"] for line in map(json.loads, (out / "rejected.jsonl").read_text().splitlines())}
    check_complete(out, {**LENGTHS, "v6.mp4": kept["v6.mp4"]})
    assert all(path.read_bytes() == content for path, content in finished.items()), "finished shards stay"

    assert main([*words, f"out={tmp_path / 'whole'}"]) == 0
    whole = {sample.key: sample for sample in read_samples(tmp_path / "whole")}
    for sample in read_samples(out):
        assert torch.equal(sample.latent, whole.pop(sample.key).latent)
    assert not whole
    assert (out / "rejected.jsonl").read_text() == (tmp_path / "whole" / "rejected.jsonl").read_text()


def test_killed_around_the_manifest(tmp_path: Path, videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shard is recorded and no manifest is there; then the manifest is there and the journal not gone."""
    out, words = tmp_path / "out", [f"source={videos}", f"out={tmp_path / 'out'}", *FAST]

    def dies(*arguments: Any) -> None:
        raise RuntimeError("killed")

    monkeypatch.setattr(run, "finish_folder", dies)
    with pytest.raises(RuntimeError, match="killed"):
        main(words)
    for name in ("manifest.json", "rejected.jsonl", "empty_prompt.safetensors"):
        (out / f".{name}.0a1b2c3d.tmp").touch()  # a kill between writing and renaming
    shards = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*")}
    assert shards and not (out / "manifest.json").exists()
    monkeypatch.undo()
    monkeypatch.setattr(journal, "remove", lambda folder: None)
    assert main(words) == 0 and (out / ".prepare").exists()
    monkeypatch.undo()
    assert main(words) == 0
    check_complete(out)
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*")} == shards


def test_a_rank_that_ends_after_the_merge_leaves_the_manifest_alone(tmp_path: Path, videos: Path) -> None:
    """Of a journal that is being removed a rank may read a part: it must not write that as the whole."""
    out, words = tmp_path / "out", [f"source={videos}", f"out={tmp_path / 'out'}", *FAST]
    assert main(words) == 0
    manifest = (out / "manifest.json").read_bytes()
    recipe, rank = SimpleNamespace(out=out), Rank(1, 2, 1)
    assert run._finish(recipe, rank, SimpleNamespace(rows=[]), None, "") == 0  # type: ignore[arg-type]
    assert (out / "manifest.json").read_bytes() == manifest


def ranks(words: Sequence[str], world: int) -> list[subprocess.Popen[bytes]]:
    """The processes that torchrun would start."""
    own = [{"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)} for rank in range(world)]
    return [subprocess.Popen(command(*words), env={**os.environ, "OMP_NUM_THREADS": "1", **names}) for names in own]


def test_ranks_share_the_videos_and_one_merges(tmp_path: Path, videos: Path) -> None:
    out = tmp_path / "out"
    started = ranks([f"source={videos}", f"out={out}", *FAST], 2)
    assert [process.wait(120) for process in started] == [0, 0]
    check_complete(out)
    files = {sample.key: shard.file for shard in Manifest.load(out).shards for sample in shard.samples}
    assert {file[:9] for file in files.values()} == {"shard-000", "shard-001"}


def test_ranks_that_cannot_plan_all_say_why(tmp_path: Path) -> None:
    """None waits for a plan that never comes."""
    started = ranks([f"source={tmp_path / 'gone.csv'}", f"out={tmp_path / 'out'}", *FAST], 2)
    assert [process.wait(120) for process in started] == [2, 2] and not (tmp_path / "out").exists()


def test_ranks_come_from_torchrun_or_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert Rank.from_environment() == Rank(0, 1, 0)
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_LOCALID", "0")
    assert Rank.from_environment() == Rank(0, 1, 0), "a batch script outside srun is alone"
    monkeypatch.setenv("SLURM_PROCID", "9")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "16")
    monkeypatch.setenv("SLURM_LOCALID", "1")
    assert Rank.from_environment() == Rank(9, 16, 1)
    for name, value in zip(names[:3], "352", strict=True):
        monkeypatch.setenv(name, value)
    assert Rank.from_environment() == Rank(3, 5, 2), "torchrun inside srun"


def test_another_number_of_ranks_goes_on(tmp_path: Path, videos: Path) -> None:
    out, words = tmp_path / "out", [f"source={videos}", *FAST, "shard_gb=0.00003"]
    started = ranks([*words, f"out={out}"], 3)
    deadline = time.monotonic() + 60
    while len(list((out / ".prepare").glob("record-*"))) < 2:
        assert time.monotonic() < deadline and any(process.poll() is None for process in started)
        time.sleep(0.01)
    for process in started:
        process.kill()
        process.wait()
    if not (out / "manifest.json").exists():
        assert main([*words, f"out={out}"]) == 0
    check_complete(out)


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    for name, value in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK"), (rank, world, rank), strict=True):
        monkeypatch.setenv(name, str(value))


def test_two_runs_do_not_write_one_folder(tmp_path: Path, videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither as the same rank nor with another number of ranks, whose videos are others."""
    out, encode_all = tmp_path / "out", run._encode_all
    words = [f"source={videos}", f"out={out}", *FAST]
    as_rank(monkeypatch, 0, 2)
    assert main(words) == 0

    def meanwhile(*arguments: Any) -> None:
        monkeypatch.setattr(run, "_encode_all", encode_all)
        before = sorted(out.glob("**/*"))
        with pytest.raises(DataError, match=rf"writing rank 1 of 2 of it \(process {os.getpid()} on .*\); wait for it"):
            main(words)
        as_rank(monkeypatch, 0, 1)
        with pytest.raises(DataError, match=r"writing rank 1 of 2 of it .* before you start this one with 1 ranks"):
            main(words)
        assert sorted(out.glob("**/*")) == before
        encode_all(*arguments)

    as_rank(monkeypatch, 1, 2)
    monkeypatch.setattr(run, "_encode_all", meanwhile)
    assert main(words) == 0
    check_complete(out)


@pytest.mark.parametrize("late", ["_load", "_plan"])
def test_a_rank_that_comes_after_the_merge_leaves_the_folder_alone(
    tmp_path: Path, videos: Path, monkeypatch: pytest.MonkeyPatch, late: str
) -> None:
    """The others ran from start to end while it loaded its weights, or between its plan and its first record."""
    out, action = tmp_path / "out", getattr(run, late)
    words = [f"source={videos}", f"out={out}", *FAST]
    before: dict[str, bytes] = {}

    def others_first(*arguments: Any) -> Any:
        monkeypatch.setattr(run, late, action)
        found = None if late == "_load" else action(*arguments)
        for rank in (0, 1):
            as_rank(monkeypatch, rank, 2)
            assert main(words) == 0
        before.update({path.name: path.read_bytes() for path in out.iterdir()})
        return action(*arguments) if found is None else found

    as_rank(monkeypatch, 1, 2)
    monkeypatch.setattr(run, late, others_first)
    assert main(words) == 0
    check_complete(out)
    assert before and {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_key_in_two_shards_is_no_manifest(tmp_path: Path, videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [f"source={videos}", f"out={tmp_path / 'out'}", *FAST]
    monkeypatch.setattr(run, "_merge", lambda *arguments: 0)
    assert main(words) == 0
    monkeypatch.undo()
    (record,) = (tmp_path / "out" / ".prepare").glob("record-*")
    raw = json.loads(record.read_text())
    raw["shard"]["file"] = "shard-001-00000.tar"
    record.with_name("record-001-00000.json").write_text(json.dumps(raw))
    with pytest.raises(DataError, match=r"v0000000-0000 is in shard-000-00000.tar and in shard-001-00000.tar"):
        main(words)


def dying(path: Any, **options: Any) -> Any:
    """`read_clips` in a process that dies at the second video, as a crash in native code would."""
    from data.prepare.video import read_clips

    if "v1" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
    return read_clips(path, **options)


def test_a_decoder_that_dies_takes_one_video_with_it(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Spawned processes cannot import a test module; forked ones need not.
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: fork)
    monkeypatch.setattr(decoders, "_decode", _patched(decoders._decode))
    tasks = [Task(i, videos / f"v{i}.mp4", ()) for i in range(4)]
    running = Decoders(tasks, 2, fps=16, frames=10, sizes=[(16, 32)], most=1)
    try:
        events = list(running)
    finally:
        running.close()
    ends = {event.row: event.reason for event in events if isinstance(event, End)}
    assert ends == {0: None, 1: "the decoder died (SIGKILL)", 2: None, 3: None}


def _patched(decode: Any) -> Any:
    def run(*arguments: Any) -> None:
        decoders.read_clips = dying  # type: ignore[assignment]
        decode(*arguments)

    return run


def test_wan_end_to_end(tmp_path: Path) -> None:
    """The real classes from disk, two buckets, image conditions, through the command."""
    videos = tmp_path / "videos"
    write_video(videos / "wide.mp4", 20, height=64, width=96, caption="a red ball")
    write_video(videos / "tall.mp4", 20, height=96, width=64, caption="a moving bar")
    weights, out = save_wan(tmp_path / "wan", image=True), tmp_path / "out"
    words = [f"source={videos}", f"out={out}", f"weights={weights}", "frames=9", "size=32x48,48x32", "workers=1"]
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
    cli.run(main, "data.prepare", USAGE, ["--help"])
    shown = capsys.readouterr().out
    assert "source " in shown and "torchrun" in shown and "(2000)" in shown
    with pytest.raises(SystemExit) as caught:
        cli.run(main, "data.prepare", USAGE, ["sorce=x"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "data.prepare: sorce is not a known key; did you mean source?\n"
