"""`python -m data.prepare` again on a folder that is finished, has lost its manifest, or holds what nobody knows."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from data.check import main as check
from data.errors import DataError
from data.prepare import journal, merge
from data.prepare.__main__ import main
from data.prepare.records import read_records
from data.shards.manifest import EMPTY_PROMPT, FILE, Manifest
from data.shards.sample import Prompt
from data.shards.writer import ShardWriter, TarShards
from radial.errors import Mistake
from tests.helpers.prepared import FAST, LENGTHS, check_complete, write_clips


@pytest.fixture
def words(tmp_path: Path, videos: Path) -> list[str]:
    """A command of two shards."""
    return [f"source={videos}", f"out={tmp_path / 'out'}", *FAST, "shard_gb=0.0003"]


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.is_file()}


def test_finished_shards_without_a_manifest_are_not_deleted(tmp_path: Path, words: list[str]) -> None:
    out = tmp_path / "out"
    assert main(words) == 0
    (out / FILE).unlink()
    before = contents(out)
    with pytest.raises(
        DataError, match=r"out: holds shard-000-00000.tar and \d more shards, but no manifest and no jou"
    ):
        main(words)
    with pytest.raises(DataError, match=r"holds shard-000-00000.tar.* --rebuild"):
        ShardWriter(out, fps=16.0, encoder="e", latent="l", text="t", arguments={}, empty_prompt=Prompt({}, {}))
    assert contents(out) == before and not (out / ".prepare").exists()


def test_a_manifest_is_rebuilt_of_the_tars(
    tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """It lists the same places, shapes and hashes; a damaged tar is named, stays, and is not in it."""
    out = tmp_path / "out"
    assert main(words) == 0
    first = Manifest.load(out)
    with pytest.raises(DataError, match=r"manifest.json: is there; a manifest is made for a folder without one"):
        check([str(out), "--rebuild"])
    (out / FILE).unlink()
    (out / EMPTY_PROMPT).unlink()
    assert check([str(out), "--rebuild"]) == 0
    again = Manifest.load(out)
    assert (again.shards, again.fps, again.encoder) == (first.shards, first.fps, first.encoder)
    assert (again.latent, again.text) == (first.latent, first.text)
    assert not again.load_empty_prompt().text["text"].mask.any()
    check_complete(out)
    with pytest.raises(DataError, match=r"out: was begun with .*source=None \(asked: "):
        main(words)

    last = out / first.shards[-1].file
    last.write_bytes(last.read_bytes()[: first.shards[-1].samples[-1].offset + 700])
    (out / FILE).unlink()
    capsys.readouterr()
    assert check([str(out), "--rebuild"]) == 1
    assert Manifest.load(out).shards == first.shards[:-1] and last.exists()
    shown = capsys.readouterr().out
    assert f"left out: {last}: " in shown and "copy it again" in shown
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: holds no shard-\*.tar"):
        check([str(tmp_path / "empty"), "--rebuild"])


def test_an_unfinished_folder_is_not_rebuilt(tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "merge", lambda *arguments: 0)
    assert main(words) == 0
    with pytest.raises(DataError, match="is not finished; start data.prepare again"):
        check([str(tmp_path / "out"), "--rebuild"])


def test_tars_that_nothing_names_stay_and_what_was_begun_goes(
    tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tar that was begun is in the journal before it is a file; it is written anew when it has no record."""
    out, record = tmp_path / "out", journal.Journal.record

    def dies(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(journal.Journal, "record", dies)
    with pytest.raises(KeyboardInterrupt):
        main(words)
    begun = out / "shard-000-00000.tar"
    assert begun.exists() and "shard-000-00000.tar" in (out / ".prepare" / "begun-000.txt").read_text(encoding="utf-8")
    begun.write_bytes(b"torn")
    (out / "shard-000-00005.tar").write_bytes(b"somebody's")
    monkeypatch.setattr(journal.Journal, "record", record)
    capsys.readouterr()
    assert main(words) == 0
    assert "nothing says where shard-000-00005.tar are from: they are left as they are" in capsys.readouterr().out
    check_complete(out)
    assert (out / "shard-000-00005.tar").read_bytes() == b"somebody's"
    assert begun.name not in {shard.file for shard in Manifest.load(out).shards} or begun.read_bytes() != b"torn"


def test_added_videos_are_appended(tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Behind the others, whose shards stay as they are; also after a kill, and with bad files on both sides."""
    out, videos = tmp_path / "out", tmp_path / "videos"
    (videos / "bad.mp4").touch()
    (videos / "bad.txt").write_text("a caption", encoding="utf-8")
    assert main([*words, "bad_share=1"]) == 0
    before = contents(out)
    write_clips(videos, 6, 20)
    (videos / "bad.mp4").unlink()
    write_clips(videos, 5, 29).rename(videos / "a5.mp4")  # a name before all others
    (videos / "v5.txt").rename(videos / "a5.txt")
    (videos / "v5.mp4").unlink(missing_ok=True)
    capsys.readouterr()
    assert main([*words, "bad_share=1"]) == 0
    shown = capsys.readouterr().out
    assert "2 videos (such as a5.mp4) were added to the list: appending" in shown
    after = contents(out)
    assert all(after[name] == content for name, content in before.items() if name.startswith("shard"))
    manifest = Manifest.load(out)
    assert (manifest.videos, manifest.rejected) == (8, 0) and after["rejected.jsonl"] == b""
    assert len(manifest.samples) == 17 and not (out / ".prepare").exists()
    sources = [json.loads(after["videos.json"])["rows"][row]["path"] for row in (0, 5, 6, 7)]
    assert sources == ["v0.mp4", "v5.mp4", "a5.mp4", "v6.mp4"]
    assert main([*words, "bad_share=1"]) == 0
    assert "already there; 1 of its videos are no longer listed, such as v5.mp4" in capsys.readouterr().out
    assert contents(out) == after


def test_a_kill_while_appending_loses_nothing(
    tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the manifest has gone, and after."""
    out = tmp_path / "out"
    assert main(words) == 0
    write_clips(tmp_path / "videos", 6, 20)

    def dies(*arguments: Any) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="killed"):
        patched.setattr(Path, "rename", dies)
        main(words)
    assert (out / FILE).exists()
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="killed"):
        patched.setattr(TarShards, "write", dies)
        main(words)
    assert not (out / FILE).exists() and len(read_records(out).done) == 6
    assert main(words) == 0
    check_complete(out, {**LENGTHS, "v6.mp4": 2})


def test_what_cannot_be_appended_is_refused_and_named(tmp_path: Path, videos: Path) -> None:
    out, table = tmp_path / "out", tmp_path / "list.csv"

    def ask(*more: str, **captions: str) -> int:
        lines = [f"{name}.mp4,{caption},{10 - int(name[1])}" for name, caption in captions.items()]
        table.write_text("\n".join(["path,caption,score", *lines, ""]), encoding="utf-8")
        return main([f"source={table}", f"videos={videos}", f"out={out}", *FAST, *more])

    assert ask("sort=score", "top=2", v1="one", v2="two") == 0
    before = contents(out)
    for captions, message in [
        ({"v1": "one", "v2": "other"}, r"is finished, but 1 video \(v2.mp4\) has another caption now; what is encoded"),
        (
            {"v0": "best", "v1": "one", "v2": "two"},
            r"1 video \(v0.mp4\) was added to the list, 1 video \(v2.mp4\) was displaced by them from the best 2;",
        ),
    ]:
        with pytest.raises(DataError, match=message):
            ask("sort=score", "top=2", **captions)
    assert ask("sort=score", "top=2", v1="one", v2="two", v3="worse") == 0, "not among the best"
    with pytest.raises(DataError, match=r"was begun with upscale=True \(asked: False\), top=2"):
        ask("sort=score", "top=3", "upscale=false", v1="one", v2="two")
    assert contents(out) == before and not (out / ".prepare").exists()


def test_a_folder_of_an_earlier_version_is_not_compared_but_goes_on(
    tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """It has no list of its videos, and does not know the younger arguments."""
    out = tmp_path / "out"
    assert main(words) == 0
    (out / "videos.json").unlink()
    raw = json.loads((out / FILE).read_text(encoding="utf-8"))
    for name in ("upscale", "min_fps"):
        del raw["arguments"][name]
    (out / FILE).write_text(json.dumps(raw), encoding="utf-8")
    write_clips(tmp_path / "videos", 6, 20)
    assert main(words) == 0
    assert (
        "already there; it was not compared with the list of videos, as it has no videos.json"
        in capsys.readouterr().out
    )


def test_a_shard_is_finished_after_some_time(tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the first sample after it, so that a kill costs no more than that time."""
    clock = [0.0]
    monkeypatch.setattr("data.shards.writer.time", type("Clock", (), {"monotonic": lambda: clock[0]}))
    write, records = TarShards.write, []

    def slow(self: Any, sample: Any) -> None:
        clock[0] += 25.0
        write(self, sample)
        records.append(len(list((tmp_path / "out" / ".prepare").glob("record-*"))))

    monkeypatch.setattr(TarShards, "write", slow)
    assert main([*words[:-1], "shard_minutes=1"]) == 0
    assert [len(shard.samples) for shard in Manifest.load(tmp_path / "out").shards] == [4, 4, 4, 1]
    assert records[3] == 1 and records[11] == 3, "on disk as soon as its time is over"
    with pytest.raises(Mistake, match="shard_minutes is 0.0, expected a positive number"):
        main([*words, "shard_minutes=0"])


def test_a_full_disk_is_told_with_its_file(
    tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from data.shards import writer

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer.OpenShard, "write", full)
    with pytest.raises(SystemExit) as caught:
        main.run(words)
    assert caught.value.code == 2
    told = capsys.readouterr().err.splitlines()[-1]
    place = tmp_path / "out" / "shard-000-00000.tar"
    assert told.endswith(
        f"error: {place}: cannot be written (No space left on device); make room, then start the same command again"
    )
