"""`python -m data.prepare` killed, stopped, started anew, and on several ranks: no clip twice, none lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from data.encoders.pixels import PixelEncoder
from data.errors import DataError
from data.prepare import merge, run, underway
from data.prepare.__main__ import main
from data.prepare.records import read_records
from data.shards import writer
from data.shards.manifest import Manifest
from data.shards.stream import read_samples
from data.shards.writer import TarShards
from radial.cli.ranks import Rank
from tests.helpers.prepared import FAST, LENGTHS, check_complete, command, spoil


def run_and_kill(words: Sequence[str], out: Path, shards: int) -> None:
    """Start a run and kill it, without a word, once so many shards are recorded."""
    process = subprocess.Popen(command(*words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
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
    (out / "shard-000-00077.tar").write_bytes(b"somebody's")
    # a kill between a shard and its record leaves a shard that is not finished, and is made anew
    recorded = [out / f"shard-{path.stem.removeprefix('record-')}.tar" for path in out.glob(".prepare/record-*.json")]
    finished = {path: path.read_bytes() for path in [*recorded, out / "shard-000-00077.tar"]}
    assert main([*words, f"out={out}"]) == 0
    kept = {
        line["path"]: line["kept"]
        for line in map(json.loads, (out / "rejected.jsonl").read_text(encoding="utf-8").splitlines())
    }
    check_complete(out, {**LENGTHS, "v6.mp4": kept["v6.mp4"]})
    assert all(path.read_bytes() == content for path, content in finished.items()), "finished shards stay"

    assert main([*words, f"out={tmp_path / 'whole'}"]) == 0
    whole = {sample.key: sample for sample in read_samples(tmp_path / "whole")}
    for sample in read_samples(out):
        assert torch.equal(sample.latent, whole.pop(sample.key).latent)
    assert not whole
    assert (out / "rejected.jsonl").read_text(encoding="utf-8") == (tmp_path / "whole" / "rejected.jsonl").read_text(
        encoding="utf-8"
    )


def test_killed_around_the_manifest(tmp_path: Path, videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shard is recorded and no manifest is there; then the manifest is there and the journal not gone."""
    out, words = tmp_path / "out", [f"source={videos}", f"out={tmp_path / 'out'}", *FAST]

    def dies(*arguments: Any) -> None:
        raise RuntimeError("killed")

    monkeypatch.setattr(merge, "finish_folder", dies)
    with pytest.raises(RuntimeError, match="killed"):
        main(words)
    for name in ("manifest.json", "rejected.jsonl", "empty_prompt.safetensors"):
        (out / f".{name}.0a1b2c3d.tmp").touch()  # a kill between writing and renaming
    shards = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*")}
    assert shards and not (out / "manifest.json").exists()
    monkeypatch.undo()
    monkeypatch.setattr(underway, "remove", lambda folder: None)
    assert main(words) == 0 and (out / ".prepare").exists()
    monkeypatch.undo()
    assert main(words) == 0
    check_complete(out)
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*")} == shards


class Interrupted:
    """Encoding, or writing, that sends this process a signal at its fourth clip."""

    def __init__(self, number: int) -> None:
        self.number, self.clips = number, 0

    def __call__(self) -> None:
        self.clips += 1
        if self.clips == 4:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("number", "raised", "writing"), [
    (signal.SIGINT, KeyboardInterrupt, False), (signal.SIGTERM, SystemExit, False), (signal.SIGTERM, SystemExit, True),
    (signal.SIGHUP, SystemExit, False),
])  # fmt: skip
def test_a_stopped_run_keeps_what_it_encoded(
    tmp_path: Path, videos: Path, monkeypatch: pytest.MonkeyPatch, number: int, raised: Any, writing: bool
) -> None:
    """A clip in the middle of its writing is written whole before the process stops."""
    out, interrupted = tmp_path / "out", Interrupted(number)
    kind, name = (TarShards, "write") if writing else (PixelEncoder, "encode")
    action: Any = getattr(kind, name)

    def interrupting(self: Any, *arguments: Any) -> Any:
        interrupted()
        return action(self, *arguments)

    monkeypatch.setattr(kind, name, interrupting)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, by data.prepare too
    try:
        with pytest.raises(raised):
            main([f"source={videos}", f"out={out}", *FAST])
    finally:
        signal.signal(signal.SIGHUP, before)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    records = read_records(out)
    assert [len(shard.samples) for shard in records.shards] == [3 + writing] and records.done == {0, 1}
    assert main([f"source={videos}", f"out={out}", *FAST]) == 0
    check_complete(out)
    assert interrupted.clips == 13 + (not writing), "nothing is encoded twice but what was in work"


def test_too_little_memory_is_no_bad_file(tmp_path: Path, videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, encode, clips = tmp_path / "out", PixelEncoder.encode, 0

    def encode_three(self: PixelEncoder, frames: np.ndarray) -> torch.Tensor:
        nonlocal clips
        clips += 1
        if clips == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")
        return encode(self, frames)

    monkeypatch.setattr(PixelEncoder, "encode", encode_three)
    message = r"v2.mp4: the clip at 0.00 s, 10 frames of 16x32, does not fit .* \(CUDA out of memory\); .*device="
    with pytest.raises(DataError, match=message):
        main([f"source={videos}", f"out={out}", *FAST])
    assert len(read_records(out).shards[0].samples) == 3
    assert main([f"source={videos}", f"out={out}", *FAST]) == 0
    check_complete(out)


def test_a_disk_that_is_full_costs_only_the_shard_in_work(
    tmp_path: Path, videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    words, write, written = [f"source={videos}", f"out={out}", *FAST, "shard_gb=0.00005"], writer.OpenShard.write, 0

    def write_five(self: Any, sample: Any, entry: Any) -> None:
        nonlocal written
        written += 1
        if written == 6:
            raise OSError(28, "No space left on device")
        write(self, sample, entry)

    monkeypatch.setattr(writer.OpenShard, "write", write_five)
    with pytest.raises(OSError, match="No space left"):
        main(words)
    assert sum(len(shard.samples) for shard in read_records(out).shards) in (4, 5)
    assert main(words) == 0
    check_complete(out)


def test_a_rank_that_ends_after_the_merge_leaves_the_manifest_alone(tmp_path: Path, videos: Path) -> None:
    """Of a journal that is being removed a rank may read a part: it must not write that as the whole."""
    out, words = tmp_path / "out", [f"source={videos}", f"out={tmp_path / 'out'}", *FAST]
    assert main(words) == 0
    manifest = (out / "manifest.json").read_bytes()
    recipe, rank = SimpleNamespace(out=out), Rank(1, 2, 1)
    assert merge.finish(recipe, rank, SimpleNamespace(rows=[]), None) == 0  # type: ignore[arg-type]
    assert (out / "manifest.json").read_bytes() == manifest


def ranks(words: Sequence[str], world: int) -> list[subprocess.Popen[bytes]]:
    """The processes that torchrun would start."""
    own = [{"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)} for rank in range(world)]
    return [subprocess.Popen(command(*words), env={**os.environ, "OMP_NUM_THREADS": "1", **names}) for names in own]


def test_ranks_share_the_videos_and_one_merges(tmp_path: Path, videos: Path) -> None:
    out = tmp_path / "out"
    started = ranks([f"source={videos}", f"out={out}", *FAST], 2)
    assert [process.wait(300) for process in started] == [0, 0]
    check_complete(out)
    files = {sample.key: shard.file for shard in Manifest.load(out).shards for sample in shard.samples}
    assert {file[:9] for file in files.values()} == {"shard-000", "shard-001"}


@pytest.mark.slow
def test_ranks_that_cannot_choose_all_say_why(tmp_path: Path) -> None:
    """None waits for a list that never comes."""
    started = ranks([f"source={tmp_path / 'gone.csv'}", f"out={tmp_path / 'out'}", *FAST], 2)
    assert [process.wait(300) for process in started] == [2, 2] and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_another_number_of_ranks_goes_on(tmp_path: Path, videos: Path) -> None:
    out, words = tmp_path / "out", [f"source={videos}", *FAST, "shard_gb=0.00003"]
    started = ranks([*words, f"out={out}"], 3)
    deadline = time.monotonic() + 240
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
    out, encode_all = tmp_path / "out", run.encode_all
    words = [f"source={videos}", f"out={out}", *FAST]
    as_rank(monkeypatch, 0, 2)
    assert main(words) == 0

    def meanwhile(*arguments: Any) -> None:
        monkeypatch.setattr(run, "encode_all", encode_all)
        before = sorted(out.glob("**/*"))
        with pytest.raises(DataError, match=rf"writing rank 1 of 2 of it \(process {os.getpid()} on .*\); wait for it"):
            main(words)
        as_rank(monkeypatch, 0, 1)
        with pytest.raises(DataError, match=r"writing rank 1 of 2 of it .* before you start this one with 1 ranks"):
            main(words)
        assert sorted(out.glob("**/*")) == before
        encode_all(*arguments)

    as_rank(monkeypatch, 1, 2)
    monkeypatch.setattr(run, "encode_all", meanwhile)
    assert main(words) == 0
    check_complete(out)


@pytest.mark.parametrize("late", ["encoder_of", "shared_choice"])
def test_a_rank_that_comes_after_the_merge_leaves_the_folder_alone(
    tmp_path: Path, videos: Path, monkeypatch: pytest.MonkeyPatch, late: str
) -> None:
    """The others ran from start to end while it loaded its weights, or between its choice and its first record."""
    out, action = tmp_path / "out", getattr(run, late)
    words = [f"source={videos}", f"out={out}", *FAST]
    before: dict[str, bytes] = {}

    def others_first(*arguments: Any) -> Any:
        monkeypatch.setattr(run, late, action)
        found = None if late == "encoder_of" else action(*arguments)
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
    monkeypatch.setattr(merge, "merge", lambda *arguments: 0)
    assert main(words) == 0
    monkeypatch.undo()
    (record,) = (tmp_path / "out" / ".prepare").glob("record-*")
    raw = json.loads(record.read_text(encoding="utf-8"))
    raw["shard"]["file"] = "shard-001-00000.tar"
    record.with_name("record-001-00000.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(DataError, match=r"v0000000-0000 is in shard-000-00000.tar and in shard-001-00000.tar"):
        main(words)
